"""Batches for train.py, made ahead by other processes."""

from __future__ import annotations

import multiprocessing
import traceback
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor

import numpy as np
from batches import BatchPlan, make_batch


class Feeder:
    """Batches made ahead by other processes, or here if those fail."""

    def __init__(self, workers: int):
        self.workers = workers
        self.waiting: deque[tuple[BatchPlan, Future | None]] = deque()
        self.pool = self._pool()
        self.misses = 0

    def _pool(self) -> ProcessPoolExecutor | None:
        if not self.workers:
            return None
        return ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("fork"))

    def submit(self, plan: BatchPlan) -> None:
        future = None
        if self.pool is not None:
            try:
                future = self.pool.submit(make_batch, plan)
            except Exception:
                traceback.print_exc()
                self.pool = None
        self.waiting.append((plan, future))

    @property
    def wanted(self) -> int:
        return max(1, 3 * self.workers) - len(self.waiting)

    def take(self) -> tuple[BatchPlan, dict[str, np.ndarray]]:
        plan, future = self.waiting.popleft()
        if future is not None:
            self.misses += not future.done()
            try:
                return plan, future.result(timeout=60)
            except Exception:
                traceback.print_exc()
        return plan, make_batch(plan)

    def close(self) -> None:
        """Ends the processes: one that lives on would keep the caller's pipe open."""
        if self.pool is not None:
            processes = list((getattr(self.pool, "_processes", None) or {}).values())
            self.pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
            self.pool = None
