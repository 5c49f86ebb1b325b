"""torch.compile for the blocks of a model in training, if it works here and pays."""

from __future__ import annotations

import signal
import time

import numpy as np
import torch
from batches import BatchPlan, make_batch
from curriculum import Grid, questions_for
from torch import _dynamo as dynamo
from trainer import Trainer


class _TooLong(Exception):
    pass


def compile_blocks(trainer: Trainer, seconds: float) -> None:
    """Compiles the blocks within a time, and keeps them so only if steps are then faster."""
    if not trainer.cuda:
        return
    grids: list[tuple[Grid, int]] = [((8, 8), 12), ((12, 12), 12), ((16, 24), 6), ((32, 32), 4)]
    samples = [(g, make_batch(BatchPlan("train", 99, 0, g, n, questions_for(g[0] * g[1])))) for g, n in grids]
    full = trainer.plan.tokens // 144
    timed = make_batch(BatchPlan("train", 99, 0, (12, 12), full, questions_for(144)))
    blocks = [*trainer.model.vision.blocks, *trainer.model.blocks]

    def passes(grid: Grid, arrays: dict[str, np.ndarray], frozen: bool = False) -> None:
        batch = trainer.tensors(arrays)
        pixels = trainer.drawn(batch)
        with torch.set_grad_enabled(not frozen):
            encoded = trainer.model.vision(pixels, trainer.compute)
        logits = trainer.model.decode(trainer.model.image_tokens(encoded), grid, batch["ids"], batch["at"]).float()
        trainer.answer_loss(logits, batch["targets"]).backward()
        for p in trainer.model.parameters():
            p.grad = None

    def speed() -> float:
        for _ in range(2):
            passes((12, 12), timed)
        torch.cuda.synchronize()
        start = time.time()
        for _ in range(5):
            passes((12, 12), timed)
        torch.cuda.synchronize()
        return (time.time() - start) / 5

    def too_long(signum: int, frame: object) -> None:
        raise _TooLong

    begun, eager, kept = time.time(), 0.0, False
    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(max(1, int(seconds)))
    try:
        eager = speed()
        trainer.write({"eager_step": round(eager, 4), "seconds": trainer.seconds()})
        dynamo.config.recompile_limit = 32
        for block in blocks:
            block.compile(dynamic=True)
        for grid, arrays in samples:
            passes(grid, arrays)
            trainer.write({"compiled": list(grid), "seconds": trainer.seconds()})
        passes(*samples[0], frozen=True)
        passes(*samples[2], frozen=True)
        compiled = speed()
        left = trainer.deadline - time.time()
        kept = compiled < 0.93 * eager
        trainer.write(
            {
                "compiled_step": round(compiled, 4),
                "kept": kept,
                "took": round(time.time() - begun, 1),
                "left": round(left, 1),
            }
        )
    except BaseException as error:  # whatever a compiler throws: the run goes on without it
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        trainer.write(
            {"compile_failed": f"{type(error).__name__}: {str(error)[:300]}", "took": round(time.time() - begun, 1)}
        )
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    if not kept:
        for block in blocks:
            block._compiled_call_impl = None
        dynamo.reset()
    for p in trainer.model.parameters():
        p.grad = None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
