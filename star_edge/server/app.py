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
from ..engine import _physical_cores
from ..errors import ConfigError
from ..io.configs import resolve_prune
from ..llamacpp.gguf_check import read_text_model
from ..llamacpp.llama_options import load_llama
from ..llamacpp.names import KV_TYPES
from ..pruning.config import PruneConfig
from .bodies import Bodies
from .guard import Guard
from .jobs import Engine, Pictures
from .routes import error_handlers, make_routes
from .settings import Policy


def make_app(
    model: str | PathLike[str],
    mmproj: str | PathLike[str],
    policy: Policy = Policy(),
    prune: PruneConfig | str | None = "balanced",
    *,
    alias: str,
    n_ctx: int = 4096,
    n_ubatch: int = 512,
    n_gpu_layers: int = 0,
    flash_attn: bool = True,
    type_k: str = "f16",
    type_v: str = "f16",
    n_threads: int | None = None,
    encoder: str = "repaired",
    chat_template: str | PathLike[str] | None = None,
    verbose: bool = False,
) -> Starlette:
    """Loads the model, and returns the app. Its lifespan closes the model; `app.state.engine` ends running requests.

    Args not named here are as for StarVLM.

    Args:
        policy: What is allowed.
        prune: Config of requests without `prune`.
        alias: Name of the model for clients.

    Raises:
        ConfigError: An option cannot be used.
        ModelFileError: A file is missing, damaged, or of another kind.
        ModelMismatchError: The mmproj file does not belong to the text model.
        UnsupportedModelError: A file cannot be used, or has no chat template.
        EngineError: llama.cpp could not create a context.
    """
    default = resolve_prune(prune)
    check_numbers(n_ctx, n_ubatch, n_gpu_layers, n_threads)
    if type_v not in ("f32", "f16", "bf16") and not flash_attn:
        raise ConfigError(f"type_v={type_v!r} needs flash attention", "use it, or an unquantized type_v")
    path = read_text_model(model).path
    pictures = Pictures(policy.image_limits)
    handler = StarChatHandler(
        mmproj,
        verbose=verbose,
        use_gpu=n_gpu_layers != 0,
        prune=default,
        encoder=encoder,
        chat_template=chat_template,
        image_loader=pictures,
    )
    n_threads = n_threads or _physical_cores()
    llama = load_llama(
        str(path),
        n_ctx=n_ctx,
        n_batch=2048,
        n_ubatch=n_ubatch,
        n_gpu_layers=n_gpu_layers,
        flash_attn=flash_attn,
        type_k=KV_TYPES[type_k],
        type_v=KV_TYPES[type_v],
        n_threads=n_threads,
        n_threads_batch=n_threads,
        chat_handler=handler,
        verbose=verbose,
    )
    try:
        handler.attach(llama)  # now, so that files that do not fit together show before the first request
        handler.check_template()
    except BaseException:
        llama.close()
        raise
    engine = Engine(llama, handler, pictures, alias)
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


def check_numbers(n_ctx: int, n_ubatch: int, n_gpu_layers: int, n_threads: int | None) -> None:
    """Raises ConfigError for numbers that llama.cpp would abort on or misread. Names are those of the command line."""
    for option, value, least in (
        ("-c", n_ctx, 0),
        ("-ub", n_ubatch, 1),
        ("-ngl", n_gpu_layers, -1),
        ("-t", 1 if n_threads is None else n_threads, 1),
    ):
        if not least <= value < 2**31 or (option == "-c" and value == 1):
            least = 2 if option == "-c" else least
            raise ConfigError(f"{option} {value} cannot be used", f"use a number of {least} or more, or leave it out")
