"""Train the page model in a given time: first the encoder on patch labels, then everything on questions.

python3 tools/pagevlm/train.py --seconds 420 --out DIR

Needs torch, numpy and nothing else. The run keeps to its clock, counted from the start of the process: schedules follow
the share of the time that is gone, so that a slow machine ends with a trained model too, of fewer steps. DIR gets
log.jsonl (a line every few seconds) and part-*.npz (weights in float16, saved every minute and at the end; export.py
reads them). With --init another run's weights are the start.
"""

from __future__ import annotations

import time

STARTED = time.time()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # batches differ in shape

import torch  # noqa: E402
from compiling import compile_blocks  # noqa: E402
from config import SIZES  # noqa: E402
from curriculum import SMOKE_STAGES, Curriculum, Plan  # noqa: E402
from feeder import Feeder  # noqa: E402
from model import whitened_cosines  # noqa: E402
from trainer import Trainer  # noqa: E402

_FIRST_STEP_SECONDS = 150  # a compiler that hangs in another thread is not stopped by an alarm


def wait(child: subprocess.Popen, log: Path, until: float, first_step_until: float) -> int | str:
    """The child's exit status, or why it is not waited for any longer."""
    seen = log.read_text().count('"step": ') if log.exists() else 0
    while child.poll() is None:
        if time.time() > until:
            return "out of time"
        if time.time() > first_step_until:
            if (log.read_text().count('"step": ') if log.exists() else 0) > seen:
                first_step_until = math.inf
            else:
                return "no first step"
        time.sleep(0.5)
    return child.returncode


def supervise(seconds: float, out: Path) -> None:
    """Runs the training in a process of its own. If that fails, again in the time that is left, more carefully, from
    what it has saved.
    """
    deadline = STARTED + seconds
    out.mkdir(parents=True, exist_ok=True)
    careful = [[], ["--compile-seconds", "0"], ["--compile-seconds", "0", "--tokens", "4096"]]
    for attempt, extra in enumerate(careful):
        left = deadline - time.time() - attempt
        if attempt and left < 40:
            break
        command = [sys.executable, "-u", __file__, *sys.argv[1:], "--unsupervised", "--seconds", f"{left:.0f}", *extra]
        if attempt and sorted(out.glob("part-*.npz")):
            command += ["--init", str(out)]
        child = subprocess.Popen(command, start_new_session=True)
        status = wait(
            child, out / "log.jsonl", time.time() + left + 8, math.inf if extra else time.time() + _FIRST_STEP_SECONDS
        )
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # its processes that draw, and itself where it hangs
        if status == 0:
            return
        with open(out / "log.jsonl", "a") as file:
            print(
                json.dumps({"attempt": attempt, "status": status, "seconds": round(time.time() - STARTED, 1)}),
                file=file,
            )
        if status == "out of time":
            break
    raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, default=420, help="from the start of the process to its end (%(default)s)"
    )
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)), help="processes that make pictures"
    )
    parser.add_argument("--tokens", type=int, help="image tokens in a step")
    parser.add_argument("--compile-seconds", type=float, default=75, help="0: do without torch.compile")
    parser.add_argument("--init", type=Path, help="go on from another run's weights, or from GGUF files")
    parser.add_argument(
        "--encoder", type=Path, help="take the encoder from another run's weights, and train the decoder at once"
    )
    parser.add_argument("--smoke", action="store_true", help="the smallest pictures only")
    parser.add_argument("--rate", type=float)
    parser.add_argument(
        "--smaller-share", type=float, help=f"of the batches: pictures that were made smaller ({Plan.smaller_share})"
    )
    parser.add_argument("--unsupervised", action="store_true", help="in this process, without a second try")
    args = parser.parse_args()
    if not args.unsupervised:
        supervise(args.seconds, args.out)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    plan = replace(
        Plan(),
        **{
            k: v
            for k, v in {
                "tokens": args.tokens,
                "rate": args.rate,
                "smaller_share": args.smaller_share,
            }.items()
            if v is not None
        },
    )
    feeder = Feeder(args.workers)
    curriculum = Curriculum(plan, args.seed + 1000, SMOKE_STAGES)
    feeder.submit(curriculum.next(0.0))
    _, arrays = feeder.take()  # starts the processes before CUDA does
    if torch.device(args.device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.enable_cudnn_sdp(False)  # it compiles for each shape
    trainer = Trainer(args, plan, feeder, STARTED)
    name = torch.cuda.get_device_name() if trainer.cuda else "cpu"
    trainer.write(
        {
            "device": name,
            "torch": torch.__version__,
            "workers": args.workers,
            "seconds": trainer.seconds(),
        }
    )
    if not args.init and not args.encoder:
        batch = trainer.tensors(arrays)
        with torch.no_grad():
            filters = whitened_cosines(trainer.model.c.v_width, trainer.drawn(batch)[:64], trainer.model.vision)
            trainer.model.vision.patch.weight.copy_(filters)
    if args.compile_seconds > 0:
        compile_blocks(trainer, min(args.compile_seconds, args.seconds / 4))
    try:
        trainer.run()
        trainer.evaluate(args.smoke)
    finally:
        feeder.close()
    trainer.write({"done": trainer.step, "seconds": trainer.seconds()})
    sys.stdout.flush()
    os._exit(0)  # processes that still draw are not waited for


if __name__ == "__main__":
    main()
