"""The Ray cluster that work is given to, and how workers share its machines."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

from .errors import ConfigError, MissingDependencyError, WorkerError


@contextlib.contextmanager
def joined_ray() -> Iterator[Any]:
    """The module `ray`, connected: to this process's cluster, to that of RAY_ADDRESS, or to one that is started on this
    machine and ends with the context.

    Raises:
        MissingDependencyError: Ray is not installed.
        WorkerError: There is no cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report home; read at import
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError("--ray needs Ray", 'pip install "star-edge[ray]"') from error
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
        yield ray
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
