"""Puts the server together: llama-cpp-python's app, its Llama with StarChatHandler, and star_edge's routes before its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from os import PathLike
from typing import Any

import llama_cpp
import llama_cpp.server.app as llama_app
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from llama_cpp._internals import LlamaSampler
from llama_cpp.server.settings import ModelSettings, ServerSettings
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from ..chat_handler import StarChatHandler
from ..config import PruneConfig, resolve_prune
from ..engine import KV_TYPES, _physical_cores
from ..errors import ConfigError, EngineError, ModelFileError
from ..gguf_info import read_gguf_info
from .guard import Guard
from .jobs import Engine, Pictures
from .routes import make_router
from .schema import error_body
from .settings import Policy

_POST_PATHS = {
    "/v1/chat/completions", "/v1/completions", "/v1/engines/copilot-codex/completions", "/v1/embeddings",
    "/extras/tokenize", "/extras/tokenize/count", "/extras/detokenize",
}  # fmt: skip


def make_app(
    model: str | PathLike,
    mmproj: str | PathLike,
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
    chat_template: str | PathLike | None = None,
    verbose: bool = False,
) -> FastAPI:
    """The app, with the model loaded; its lifespan closes it, and `app.state.engine` ends what is under way. One at a time in a process: llama_cpp.server keeps its Llama in a module.

    alias: name of the model for clients. prune: config of requests that name none. The rest as for StarVLM.
    Environment variables and CONFIG_FILE, which llama_cpp.server reads, change nothing here.

    Raises:
        ConfigError: an option that cannot be used. ModelFileError, ModelMismatchError, UnsupportedModelError: nor the files.
        EngineError: llama.cpp could not create a context.
    """
    default = resolve_prune(prune)
    path = read_gguf_info(model).path
    if type_v not in ("f32", "f16", "bf16") and not flash_attn:
        raise ConfigError(f"type_v={type_v!r} needs flash attention", "use it, or an unquantized type_v")
    pictures = Pictures(policy.image_limits)
    handler = StarChatHandler(
        mmproj, verbose=verbose, use_gpu=n_gpu_layers != 0, prune=default, encoder=encoder, chat_template=chat_template, image_loader=pictures
    )
    n_threads = n_threads or _physical_cores()
    # model_construct: without what the environment says. n_batch as StarVLM has it.
    settings = ModelSettings.model_construct(
        model=str(path), model_alias=alias, n_ctx=n_ctx, n_batch=2048, n_ubatch=n_ubatch, n_gpu_layers=n_gpu_layers,
        flash_attn=flash_attn, type_k=KV_TYPES[type_k], type_v=KV_TYPES[type_v], n_threads=n_threads, n_threads_batch=n_threads,
        logits_all=False, verbose=verbose,
    )  # fmt: skip
    # interrupt_requests would end a stream when somebody else asks
    server_settings = ServerSettings.model_construct(interrupt_requests=False, api_key=None)
    try:
        with _without_config_file():
            app = llama_app.create_app(server_settings=server_settings, model_settings=[settings])
    except ValueError as error:
        if "context" in str(error):
            raise EngineError(f"llama.cpp could not create a context of {n_ctx} tokens", "lower -c, or quantize the KV cache") from error
        raise ModelFileError(f"{path} cannot be loaded ({error})", "check that this llama.cpp supports the model") from error
    llama = llama_app._llama_proxy(alias)
    llama.chat_handler = handler
    handler._init_mtmd_context(llama)  # now, so that files that do not fit together show before the first request
    handler.check_template()
    engine = app.state.engine = Engine(handler, pictures, alias)
    _refuse_bad_grammars()

    # The app's own has CORS open to all sites.
    app.user_middleware = [m for m in app.user_middleware if m.cls is not CORSMiddleware]
    app.user_middleware.insert(0, Middleware(Guard, policy=policy, on_post=engine.metrics.request, paths=_POST_PATHS))
    if policy.cors_origins:
        cors = Middleware(CORSMiddleware, allow_origins=list(policy.cors_origins), allow_methods=["*"], allow_headers=["*"])
        app.user_middleware.insert(0, cors)  # outermost: a browser asks first, without a key
    routes = list(app.router.routes)
    app.include_router(make_router(engine, policy, default))
    app.router.routes[:] = app.router.routes[len(routes) :] + routes  # the first that fits a path answers
    app.add_exception_handler(RequestValidationError, _refuse_invalid)
    app.title = "star_edge on llama-cpp-python"

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await engine.stop()
            llama.close()

    app.router.lifespan_context = lifespan
    return app


def _refuse_bad_grammars() -> None:
    """A grammar that cannot be parsed makes a sampler that is NULL, which llama_cpp uses: any client could crash the server."""

    def add_grammar(self: LlamaSampler, model: Any, grammar: Any) -> None:
        sampler = llama_cpp.llama_sampler_init_grammar(model.vocab, grammar._grammar.encode(), grammar._root.encode())
        if not sampler:
            raise ConfigError("the grammar cannot be parsed", "check it, or the JSON schema that it was made of")
        llama_cpp.llama_sampler_chain_add(self.sampler, sampler)

    LlamaSampler.add_grammar = add_grammar


@contextlib.contextmanager
def _without_config_file() -> Iterator[None]:
    """create_app would take every setting from the file that CONFIG_FILE names, the safe ones included."""
    value = os.environ.pop("CONFIG_FILE", None)
    try:
        yield
    finally:
        if value is not None:
            os.environ["CONFIG_FILE"] = value


async def _refuse_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """FastAPI's findings in OpenAI's form."""
    found = [f"{'.'.join(str(step) for step in item['loc'][1:])}: {item['msg']}" for item in error.errors()[:3]]
    return JSONResponse(error_body(f"the request cannot be read ({'; '.join(found)})", "invalid_request_error"), 400)
