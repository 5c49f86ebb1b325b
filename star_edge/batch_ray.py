"""The tasks of a batch on Ray: one engine per worker, the next task for each free worker, results in the caller.

If a worker or its machine dies, the worker is replaced and its task is asked again.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .batch import Task, answer, failure, warm_up
from .engine import StarVLM
from .errors import ConfigError, MissingDependencyError, StarEdgeError, WorkerError

MAX_ATTEMPTS = 3  # for a task whose worker dies, and for workers in a row that do not start


class _Worker:
    """An actor with one engine."""

    def __init__(self, load: Callable[..., StarVLM], n_threads: int, warm: bool) -> None:
        self._load, self._n_threads, self._warm = load, n_threads, warm

    def start(self) -> str | None:
        """Loads the model. An error comes back as text: one that is raised in an actor looks like the actor's death."""
        try:
            self._vlm = self._load(n_threads=self._n_threads)
        except StarEdgeError as error:
            return str(error)
        return None

    def answer(self, task: Task) -> dict[str, Any]:
        if self._warm:
            warm_up(self._vlm, task)
            self._warm = False
        return answer(self._vlm, task)


def run_on_ray(
    tasks: Iterable[Task],
    load: Callable[..., StarVLM],
    emit: Callable[[dict[str, Any]], None],
    workers: int | None = None,
    *,
    n_threads: int | None = None,
    use_gpu: bool = False,
    warm: bool = False,
) -> None:
    """Answers tasks on Ray.

    Ray is the cluster that this process is connected to, or that of RAY_ADDRESS, or is started on this machine for the
    time of the call. A task whose worker died MAX_ATTEMPTS times gets an error as its result.

    Args:
        tasks: The tasks.
        load: Makes an engine; called in each worker with n_threads=. It must be picklable. Its files, and the images,
            must lie in the same place on every machine.
        emit: Called in this process with each result, as they come.
        workers: See `share_out`.
        n_threads: Threads of each worker. None: its CPUs.
        use_gpu: See `share_out`.
        warm: Warm up each engine, see `batch.warm_up`.

    Raises:
        MissingDependencyError: Ray is not installed.
        ConfigError: There are more workers than the cluster has room for.
        WorkerError: There is no cluster, or workers cannot load the model.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report home; read at import
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError("--ray needs Ray", 'pip install "star-edge[ray]"') from error
    waiting = deque(tasks)
    started_here = not ray.is_initialized()
    if started_here:
        try:
            # "local" unless an address is given: otherwise Ray joins the last cluster of this machine, even a dead one
            ray.init(
                os.environ.get("RAY_ADDRESS") or "local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise WorkerError(
                f"Ray cannot be reached or started ({error})",
                "check RAY_ADDRESS and RAY_AUTH_TOKEN, or unset RAY_ADDRESS",
            ) from error
    try:
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        workers, n_cpus, n_gpus = share_out(resources, workers, use_gpu)
        actor_class = ray.remote(_Worker).options(num_cpus=n_cpus, num_gpus=n_gpus, scheduling_strategy="SPREAD")
        _drive(ray, waiting, lambda: actor_class.remote(load, n_threads or n_cpus, warm), emit, workers)
    finally:
        if started_here:
            ray.shutdown()


def share_out(nodes: Sequence[dict[str, float]], workers: int | None, use_gpu: bool) -> tuple[int, int, int]:
    """Shares a cluster among workers.

    CPUs are divided as on the smallest node, so that every worker finds a place. They are also a worker's threads. A
    GPU belongs to one worker.

    Args:
        nodes: Resources of each node ("CPU", "GPU").
        workers: Number of workers. None: one per GPU if GPUs are used, otherwise one per node.
        use_gpu: Whether workers use GPUs.

    Returns:
        The number of workers, and the CPUs and GPUs that each reserves.

    Raises:
        ConfigError: There are more workers than GPUs, or than CPUs.
    """
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes) if use_gpu else 0
    workers = workers or gpus or len(cpus)
    for kind, there in (("GPUs", gpus or workers), ("CPUs", sum(cpus))):
        if workers > there:
            raise ConfigError(f"{workers} workers are more than the {there} {kind} of the cluster", "lower --workers")
    each = max(1, min(cpus) // math.ceil(workers / len(cpus))) if cpus else 1
    return workers, each, 1 if gpus else 0


def _drive(
    ray: Any, waiting: deque[Task], hire: Callable[[], Any], emit: Callable[[dict[str, Any]], None], workers: int
) -> None:
    """Hands out tasks until each has a result."""
    left = len(waiting)
    attempts: Counter[str] = Counter()
    failed_starts = 0
    idle: list[Any] = []
    running: dict[Any, tuple[Any, Task | None]] = {}  # a worker's task, or None while it loads the model

    def start() -> None:
        worker = hire()
        running[worker.start.remote()] = (worker, None)

    for _ in range(min(workers, left)):
        start()
    while left:
        [ended], _ = ray.wait(list(running), num_returns=1)
        worker, task = running.pop(ended)
        try:
            result = ray.get(ended)
        except ray.exceptions.RayError as error:
            ray.kill(worker)  # if only the connection broke, it must not go on
            if task is None:
                failed_starts += 1
                if failed_starts == MAX_ATTEMPTS:
                    raise WorkerError(
                        f"workers end while they load the model ({_short(error)})", "look at memory and Ray's logs"
                    ) from error
            else:
                attempts[str(task.id)] += 1
                if attempts[str(task.id)] < MAX_ATTEMPTS:
                    waiting.append(task)
                else:
                    emit(failure(task, f"its worker died {MAX_ATTEMPTS} times ({_short(error)})"))
                    left -= 1
            if left and not idle:
                start()
        else:
            if task is not None:
                emit(result)
                left -= 1
            elif result is not None:
                raise WorkerError(
                    f"a worker cannot load the model ({result})", "files must lie in the same place on every machine"
                )
            else:
                failed_starts = 0
            idle.append(worker)
        while waiting and idle:
            worker, task = idle.pop(), waiting.popleft()
            running[worker.answer.remote(task)] = (worker, task)


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
