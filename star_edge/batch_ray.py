"""The tasks of a batch on Ray: one engine per worker, the next task for each free worker, results in the caller.

If a worker or its machine dies, the worker is replaced and its task is asked again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

from .batch import Task, answer, failure, warm_up
from .cluster import joined_ray, share_out
from .engine import StarVLM
from .errors import StarEdgeError, WorkerError

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
    waiting = deque(tasks)
    with joined_ray() as ray:
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        workers, n_cpus, n_gpus = share_out(resources, workers, use_gpu)
        actor_class = ray.remote(_Worker).options(num_cpus=n_cpus, num_gpus=n_gpus, scheduling_strategy="SPREAD")
        _drive(ray, waiting, lambda: actor_class.remote(load, n_threads or n_cpus, warm), emit, workers)


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
