"""Puts the server together: a Llama with StarChatHandler, its guard, and the routes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from os import PathLike
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from ..chat_handler import StarChatHandler
from ..io.configs import resolve_prune
from ..llamacpp.gguf_check import read_text_model
from ..llamacpp.llama_options import load_llama
from ..options import LoadOptions
from ..pruning.config import PruneConfig
from .bodies import Bodies
from .guard import Guard
from .jobs import Engine, Pictures
from .routes import error_handlers, make_routes
from .settings import Policy
from .verifying import Verifier


def make_app(
    model: str | PathLike[str],
    mmproj: str | PathLike[str],
    policy: Policy = Policy(),
    prune: PruneConfig | str | None = "balanced",
    *,
    alias: str,
    chat_template: str | PathLike[str] | None = None,
    **options: Any,
) -> Starlette:
    """Loads the model, and returns the app. Its lifespan closes the model; `app.state.engine` ends running requests.

    Args:
        model: As in StarVLM.
        mmproj: As in StarVLM.
        policy: What is allowed.
        prune: Config of requests without `prune`.
        alias: Name of the model for clients.
        chat_template: As in StarVLM.
        **options: Of LoadOptions, EncoderOptions and CacheOptions.

    Raises:
        ConfigError: An option cannot be used.
        ModelFileError: A file is missing, damaged, or of another kind.
        ModelMismatchError: The mmproj file does not belong to the text model.
        UnsupportedModelError: A file cannot be used, or has no chat template.
        EngineError: llama.cpp could not create a context.
    """
    default = resolve_prune(prune)
    load = LoadOptions.take(options)
    path = read_text_model(model).path
    pictures = Pictures(policy.image_limits)
    handler = StarChatHandler(
        mmproj,
        verbose=load.verbose,
        use_gpu=load.uses_gpu,
        prune=default,
        chat_template=chat_template,
        image_loader=pictures,
        **options,
    )
    llama = load_llama(str(path), chat_handler=handler, **load.for_llama())
    try:
        handler.attach(llama)  # now, so that files that do not fit together show before the first request
        handler.check_template()
    except BaseException:
        llama.close()
        raise
    engine = Engine(llama, handler, pictures, alias)
    if policy.verify is not None:
        engine.verifier = Verifier(engine, policy.verify)
    bodies = Bodies(policy.max_body_bytes, policy.max_held_bytes, policy.body_seconds)
    routes = make_routes(engine, policy, default, bodies)
    posts = {route.path for route in routes if "POST" in (route.methods or ())}
    middleware = [Middleware(Guard, policy=policy, on_post=engine.metrics.request, paths=posts, bodies=bodies)]
    if policy.cors_origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=list(policy.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
        middleware.insert(0, cors)  # outermost: a browser asks first, without a key

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await engine.stop()
            llama.close()

    app = Starlette(routes=routes, middleware=middleware, exception_handlers=error_handlers(routes), lifespan=lifespan)
    app.router.redirect_slashes = False  # a redirect would repeat whatever Host a client has sent
    app.state.engine = engine
    return app
