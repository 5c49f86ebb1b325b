"""The server on Ray Serve: replicas with a model each, behind one front in the calling process.

Ray Serve starts a replica anew that dies, and sends a request to a replica that already has its picture, where that has
room: for Ray the picture is a "model" of Serve's multiplexing, which every replica says it holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette

from .cluster import joined_ray, share_out
from .errors import MissingDependencyError, WorkerError
from .server.front import Message, ServerLostError, make_front
from .server.request_log import RECORD
from .server.settings import Policy

_PICTURES = 64  # of which a replica tells Ray; its cache of encoder outputs is bounded by bytes
_AT_ONCE = 2  # requests at a replica: one is answered, and the next is there. Others wait at the front


_running: set[asyncio.Task[Any]] = set()  # asyncio itself may forget a task that nobody waits for


async def messages_of(app: Any, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
    """The ASGI messages with which an app answers a request, and last what a server's log would say of it. Closing it
    tells the app that the client has left.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    left = asyncio.Event()
    parts = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        for part in parts:
            return part
        await left.wait()
        return {"type": "http.disconnect"}

    task = asyncio.create_task(app(scope, receive, messages.put))
    _running.add(task)
    task.add_done_callback(_running.discard)
    task.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        while (message := await messages.get()) is not None:
            yield message
        if RECORD in scope:
            yield {"type": RECORD, "facts": scope[RECORD].facts}
    finally:
        left.set()


class _Replica:
    """One server: `make_app`'s, called in its process."""

    def __init__(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        from .server.app import make_app

        self._app = make_app(*arguments, **options)

    async def hold(self, picture: str) -> str:
        """For Ray's books: this replica has a picture."""
        return picture

    async def answer(self, scope: dict[str, Any], body: bytes, picture: str) -> AsyncGenerator[Message, None]:
        """What the server answers, as ASGI messages."""
        if picture:
            await self.hold(picture)
        async with contextlib.aclosing(messages_of(self._app, scope, body)) as messages:
            async for message in messages:
                yield message


@contextlib.contextmanager
def served_on_ray(
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    policy: Policy,
    replicas: int | None = None,
    *,
    use_gpu: bool = False,
) -> Iterator[Starlette]:
    """The front of replicas, as an app; they end with the context.

    Args:
        arguments: Of `make_app`. Files must lie in the same place on every machine.
        options: Of `make_app`. `n_threads` None becomes the CPUs of a replica.
        policy: What is allowed.
        replicas: How many. None: one per GPU if GPUs are used, otherwise one per machine (`share_out`).
        use_gpu: Whether a replica has a GPU.

    Raises:
        MissingDependencyError: Ray Serve is not installed.
        ConfigError: There are more replicas than the cluster has room for.
        WorkerError: There is no cluster, or replicas cannot load the model.
    """
    with joined_ray() as ray:
        try:
            from ray import serve
        except ImportError as error:
            raise MissingDependencyError("serve --ray needs Ray Serve", 'pip install "star-edge[ray]"') from error
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        replicas, n_cpus, n_gpus = share_out(resources, replicas, use_gpu)
        files, (own_policy, *more) = arguments[:2], arguments[2:]
        arguments = (*files, replace(own_policy, request_log=None), *more)  # the front writes it
        options = {**options, "n_threads": options.get("n_threads") or n_cpus}
        name = f"star-edge-{uuid.uuid4().hex[:8]}"

        class Replica(_Replica):
            hold = serve.multiplexed(max_num_models_per_replica=_PICTURES)(_Replica.hold)

        deployment = serve.deployment(
            name="Replica",
            num_replicas=replicas,
            max_ongoing_requests=_AT_ONCE,
            ray_actor_options={"num_cpus": n_cpus, "num_gpus": n_gpus},
            health_check_period_s=2,
            graceful_shutdown_timeout_s=2,
        )(Replica)
        serve.start(proxy_location="Disabled")
        try:
            try:
                handle = serve.run(deployment.bind(arguments, options), name=name, route_prefix=None)
            except RuntimeError as error:
                raise WorkerError(
                    f"replicas cannot load the model ({_reason(serve, name, error)})",
                    "files must lie in the same place on every machine; see Ray's logs",
                ) from error

            async def ask(scope: dict[str, Any], body: bytes, picture: str) -> AsyncGenerator[Message, None]:
                method = handle.options(stream=True, multiplexed_model_id=picture).answer
                stream: Any = method.remote(scope, body, picture)
                try:
                    async for message in stream:
                        yield message
                except (ray.exceptions.RayError, serve.exceptions.RayServeException) as error:
                    raise ServerLostError(str(error).strip().partition("\n")[0][:200]) from error
                finally:
                    stream.cancel()

            def count() -> int:
                states: Any = serve.status().applications[name].deployments["Replica"].replica_states
                return int(states.get("RUNNING", 0))

            yield make_front(policy, ask, count)
        finally:
            with contextlib.suppress(Exception):  # the cluster may be gone
                serve.delete(name)


def _reason(serve: Any, name: str, error: Exception) -> str:
    """The last line of what Serve says about a deployment that did not start."""
    with contextlib.suppress(Exception):
        error = serve.status().applications[name].deployments["Replica"].message or error
    lines = [line.strip() for line in str(error).splitlines() if "Error" in line]
    return (lines or [str(error)])[-1][:300]
