"""star-edge serve: an OpenAI-compatible server with pruning, and a page to see it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..errors import ConfigError, MissingDependencyError
from ..io.configs import read_named, resolve_prune
from ..pruning.presets import DEFAULT_PRESET, PRESETS
from ..server.settings import Policy
from .config_file import config_option
from .options import check_load_options, examples, find_model, fit_reference_model, in_cli_words, model_options

_SHUTDOWN_SECONDS = 5  # for clients to take what was sent to them
_PROMPT_CACHE_BYTES = 2**30
_GRACE_SECONDS = 10  # from a signal to the end of the process, even inside llama.cpp


@click.command(epilog=examples("star-edge serve -m text.gguf --mmproj mmproj.gguf --preset balanced"))
@config_option(
    {
        **dict.fromkeys(("model", "mmproj", "request_log"), "file"),
        **dict.fromkeys(("preset", "chat_template"), "maybe"),
        "prune_configs": "named",
    },
    frozenset({"as_json"}),
)
@click.option(
    "--host", default=Policy.host, show_default=True, help="Address to listen on. Others than localhost: use --api-key."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@model_options
@click.option(
    "--preset",
    metavar="NAME|FILE.json",
    default=DEFAULT_PRESET,
    show_default=True,
    help=f"For requests without `prune`: {', '.join(PRESETS)}, a file of star-edge tune, or a name of --prune-config.",
)
@click.option(
    "--prune-config",
    "prune_configs",
    metavar="NAME=FILE",
    multiple=True,
    help="A file of star-edge tune that requests may name in `prune`; repeat for several.",
)
@click.option(
    "--api-key", envvar="STAR_EDGE_API_KEY", help="Clients must send it as Bearer token. Also: STAR_EDGE_API_KEY."
)
@click.option("--allow-remote-images", is_flag=True, help="Fetch http(s) image URLs, from public addresses only.")
@click.option("--max-image-bytes", type=int, default=Policy.max_image_bytes, show_default=True)
@click.option(
    "--max-image-pixels",
    type=int,
    default=Policy.max_image_pixels,
    show_default=True,
    help="Of one image; to read it takes about 15 bytes a pixel.",
)
@click.option("--max-images", type=int, default=Policy.max_images, show_default=True, help="Images of one request.")
@click.option(
    "--max-body-bytes",
    type=int,
    default=Policy.max_body_bytes,
    show_default=True,
    help="Size of a request; an image takes 4/3 of its bytes.",
)
@click.option(
    "--max-held-bytes",
    type=int,
    default=Policy.max_held_bytes,
    show_default=True,
    help="Size of all requests that arrive or wait, together. If there is no room, the one that began to arrive "
    "first is refused with status 503. Memory for requests, apart from the model's and for reading images, stays "
    "under twice this and 4 times --max-body-bytes.",
)
@click.option(
    "--body-seconds",
    type=float,
    default=Policy.body_seconds,
    show_default=True,
    help="Time for one request to arrive, or for a client to take what is sent.",
)
@click.option(
    "--prompt-cache-bytes",
    type=click.IntRange(0, 2**63 - 1),
    default=_PROMPT_CACHE_BYTES,
    show_default=True,
    help="Memory for what the decoder read of earlier prompts, up to their last image, so that conversations which "
    "take turns do not read their pictures again. 0: the last prompt's alone is kept.",
)
@click.option(
    "--encode-ahead/--no-encode-ahead",
    default=None,
    help="Encode the pictures of the next request while one is answered. Default: if no GPU is used, and there are "
    "cores for twice --threads.",
)
@click.option(
    "--max-queue",
    type=int,
    default=Policy.max_queue,
    show_default=True,
    help="Requests that wait; more are refused with status 503.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    help="Site whose pages may call, such as https://example.org; repeat for several.",
)
@click.option(
    "--request-log",
    metavar="FILE|-",
    help="Add a line for each request to FILE, or print it: client, status, what was pruned, times. No prompts.",
)
@click.option(
    "--request-log-format",
    type=click.Choice(["text", "json"]),
    default=Policy.request_log_format,
    show_default=True,
    help="name=value pairs, or a JSON object a line.",
)
@click.option("--request-log-prompts", is_flag=True, help="The lines have the texts of messages too. Never pictures.")
@click.option(
    "--verify",
    type=click.IntRange(min=1),
    metavar="N",
    help="Answer every Nth pruned request unpruned as well, once its answer was sent and while nobody waits, and "
    "count how many agree: /health, /metrics. A request that arrives ends it.",
)
@click.option("--ray", "use_ray", is_flag=True, help="Answer by replicas on Ray: RAY_ADDRESS, or this machine.")
@click.option("--workers", type=click.IntRange(min=1), help="With --ray: replicas, each with a model of its own.")
@click.option("--json", "as_json", is_flag=True, help="When ready, print one line of JSON with the address.")
def serve(
    host: str,
    port: int,
    preset: str,
    prune_configs: tuple[str, ...],
    use_ray: bool,
    workers: int | None,
    as_json: bool,
    model: str | None,
    mmproj: str | None,
    hf_repo: str | None,
    no_mmproj: bool,
    **options: Any,
) -> int:
    """Serve a model: OpenAI's API under /v1, a page to try it at /, /health and /metrics.

    A request may have a field `prune`: a name of a preset or of --prune-config, an object of PruneConfig's fields, or
    null for none. Ctrl-C or SIGTERM ends the server within 10 seconds.
    """
    try:
        from ..server.app import make_app
        from ..server.request_log import RequestLog
    except ImportError as error:
        raise MissingDependencyError("serve needs more packages", 'pip install "star-edge[serve]"') from error
    _refuse_empty_key(options["api_key"])
    limits = {field.name: options.pop(field.name) for field in fields(Policy) if field.name in options}
    policy = Policy(host=host, **limits)
    with in_cli_words():
        check_load_options(options)
    if policy.request_log is not None:
        with in_cli_words():
            RequestLog(policy.request_log, policy.request_log_format).close()  # a wrong one shows now, too
    configs = read_named(prune_configs)
    if preset not in configs:
        resolve_prune(preset)  # a wrong one shows before a model is downloaded
    model, mmproj, hf_repo, no_mmproj = _given_model(model, mmproj, hf_repo, no_mmproj)
    text, projector = find_model(model, mmproj, hf_repo, no_mmproj)
    if projector is None:
        raise ConfigError("the model has no mmproj", "add --mmproj FILE; for text alone use python -m llama_cpp.server")
    fit_reference_model(text, options)
    alias = hf_repo or Path(text).stem

    if workers is not None and not use_ray:
        raise ConfigError("--workers is for --ray", "add --ray, or leave it out")
    listener = _bind(host, port)
    with contextlib.ExitStack() as stack:
        if use_ray:
            from ..serve_ray import served_on_ray

            # A replica has another current folder
            files = tuple(os.path.abspath(file) for file in (text, projector))
            for name in ("chat_template", "image_cache_dir"):
                if options.get(name) and os.path.exists(options[name]):  # a template may be a name
                    options[name] = os.path.abspath(options[name])
            use_gpu = options["n_gpu_layers"] != 0
            arguments = (*files, policy, preset)
            app = stack.enter_context(
                served_on_ray(
                    arguments, {"alias": alias, "configs": configs, **options}, policy, workers, use_gpu=use_gpu
                )
            )
        else:
            with in_cli_words():
                app = make_app(text, projector, policy, preset, alias=alias, configs=configs, **options)
        _run(app, listener, policy, alias, as_json, options["verbose"])
    return 0


def _given_model(
    model: str | None, mmproj: str | None, hf_repo: str | None, no_mmproj: bool
) -> tuple[str | None, str | None, str | None, bool]:
    """The model of the command line, or else that of the file of --config: not a half of each."""
    context = click.get_current_context()
    values = {"model": model, "mmproj": mmproj, "hf_repo": hf_repo, "no_mmproj": no_mmproj}
    typed = {name for name in values if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if typed & {"model", "hf_repo"}:
        values = {name: value if name in typed else None for name, value in values.items()}
    return values["model"], values["mmproj"], values["hf_repo"], bool(values["no_mmproj"])  # type: ignore[return-value]


def _run(app: Any, listener: socket.socket, policy: Policy, alias: str, as_json: bool, verbose: bool) -> None:
    """Serves the app until a signal comes."""
    import uvicorn
    from sse_starlette.sse import AppStatus

    # uvicorn shuts down on either signal, and then calls the previous handler, which must do nothing. Until here the
    # signals end the process at once.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: None)
    config = uvicorn.Config(
        app,
        log_level="info" if verbose else "warning",
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )

    AppStatus.disable_automatic_graceful_drain()  # it cuts streams off; the engine ends them properly

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            end_after(_GRACE_SECONDS)
            app.state.engine.stop_jobs()
            await super().shutdown(sockets)

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            address = listener.getsockname()
            url = f"http://{f'[{address[0]}]' if ':' in address[0] else address[0]}:{address[1]}"
            if as_json:
                click.echo(json.dumps({"url": url, "model": alias}))
            else:
                click.echo(f"{alias} is served at {url}: the page there, OpenAI's API under {url}/v1. Ctrl-C ends it.")
            if not policy.is_local and policy.api_key is None:
                click.echo("warning: anyone who can reach this address can use it: add --api-key", err=True)

    Server(config).run([listener])


def _refuse_empty_key(key: str | None) -> None:
    """Refuses an empty environment variable. Click takes it for none, and the server would be open by mistake.

    Raises:
        ConfigError: STAR_EDGE_API_KEY is set and empty, and there is no --api-key.
    """
    if key is None and os.environ.get("STAR_EDGE_API_KEY") is not None:
        raise ConfigError("STAR_EDGE_API_KEY is set, and the API key is empty", "give a key, or unset the variable")


def end_after(seconds: float) -> None:
    """Ends the process after a time, because a thread inside llama.cpp cannot be stopped."""

    def end() -> None:
        with contextlib.suppress(Exception):
            print(
                f"the engine did not stop within {seconds:g} s: the process ends without it",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket. It does not listen before the server can answer.

    Raises:
        ConfigError: The address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(
            f"{host} port {port} cannot be used ({error.strerror or error})", "give another --host or --port"
        ) from error
    return listener
