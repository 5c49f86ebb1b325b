"""Puts the server together: a Llama with StarChatHandler, its guard, and the routes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
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
from .request_log import RequestLog
from .routes import error_handlers, make_routes
from .schema import Configs
from .settings import Policy
from .verifying import Verifier


def make_app(
    model: str | PathLike[str],
    mmproj: str | PathLike[str],
    policy: Policy = Policy(),
    prune: PruneConfig | str | None = "balanced",
    *,
    alias: str,
    configs: Mapping[str, PruneConfig | None] = {},
    encode_ahead: bool | None = None,
    chat_template: str | PathLike[str] | None = None,
    **options: Any,
) -> Starlette:
    """Loads the model, and returns the app. Its lifespan closes the model; `app.state.engine` ends running requests.

    Args:
        model: As in StarVLM.
        mmproj: As in StarVLM.
        policy: What is allowed.
        prune: Config of requests without `prune`; it may be the name of one of `configs`.
        alias: Name of the model for clients.
        configs: Further configs that requests may name, beside the presets.
        encode_ahead: Encode the pictures of the next request while one is answered. None: if there are cores for both.
        chat_template: As in StarVLM.
        **options: Of LoadOptions, EncoderOptions and CacheOptions.

    Raises:
        ConfigError: An option cannot be used.
        ModelFileError: A file is missing, damaged, or of another kind.
        ModelMismatchError: The mmproj file does not belong to the text model.
        UnsupportedModelError: A file cannot be used, or has no chat template.
        EngineError: llama.cpp could not create a context.
    """
    of_requests = choose_default(prune, configs)
    log = None if policy.request_log is None else RequestLog(policy.request_log, policy.request_log_format)
    load = LoadOptions.take(options)
    path = read_text_model(model).path
    pictures = Pictures(policy.image_limits)
    handler = StarChatHandler(
        mmproj,
        verbose=load.verbose,
        use_gpu=load.uses_gpu,
        prune=of_requests.default,
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
    engine.encodes_ahead = load.has_spare_cores and not load.uses_gpu if encode_ahead is None else encode_ahead
    if policy.verify is not None:
        engine.verifier = Verifier(engine, policy.verify)
    bodies = Bodies(policy.max_body_bytes, policy.max_held_bytes, policy.body_seconds)
    routes = make_routes(engine, policy, of_requests, bodies)
    posts = {route.path for route in routes if "POST" in (route.methods or ())}
    on_line = None if log is None else log.write
    middleware = [
        Middleware(Guard, policy=policy, on_post=engine.metrics.request, paths=posts, bodies=bodies, log=on_line)
    ]
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
            if log is not None:
                log.close()

    app = Starlette(routes=routes, middleware=middleware, exception_handlers=error_handlers(routes), lifespan=lifespan)
    app.router.redirect_slashes = False  # a redirect would repeat whatever Host a client has sent
    app.state.engine = engine
    return app


def choose_default(prune: PruneConfig | str | None, configs: Mapping[str, PruneConfig | None]) -> Configs:
    """The configs of a server: those by name, and the one for requests that say nothing.

    Raises:
        ConfigError: `prune` is unknown.
    """
    if isinstance(prune, str) and prune in configs:
        return Configs(configs[prune], prune, configs)
    name = "off" if prune is None else prune if isinstance(prune, str) else "custom"
    return Configs(resolve_prune(prune), name, configs)
