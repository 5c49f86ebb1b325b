"""Peak memory of each side, measured in a fresh process that asks it once.

The memory of several sides in one process could not be told apart. Times, in contrast, are compared within one process.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import EngineError
from ..llamacpp.devices import list_devices
from ..pruning.config import PruneConfig
from .sides import Request, SideSpec, Workbench


def measure(
    model: str, mmproj: str, options: dict[str, Any], spec: SideSpec, request: Request
) -> dict[str, int | None]:
    """Memory of a process that loads the model and answers the request with one token.

    Returns:
        peak_rss_bytes, which includes the pages of the model file that were touched; and device_bytes, by how much free
        memory of all GPUs shrank, other programs included. The latter is None without a GPU.

    Raises:
        EngineError: The process failed. Its last line says why.
    """
    job = {
        "model": model,
        "mmproj": mmproj,
        "options": options,
        "spec": {**asdict(spec), "prune": None if spec.prune is None else spec.prune.to_dict()},
        "request": asdict(request),
    }
    done = subprocess.run([sys.executable, "-m", __name__], input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise EngineError(
            f"{spec.name}: its memory could not be measured ({reason[:300]})", "leave it out with --no-memory"
        )
    used: dict[str, int | None] = json.loads(done.stdout.splitlines()[-1])
    return used


def peak_rss() -> int:
    """Largest resident set of this process so far, in bytes."""
    try:
        # Not ru_maxrss: Linux carries it over from the parent through fork and exec (exec_mmap)
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _free_on_devices() -> int | None:
    free = [
        int(d["free_bytes"])
        for d in list_devices()
        if d["total_bytes"] and not str(d["name"]).startswith(("CPU", "BLAS"))
    ]
    return sum(free) if free else None


def _main() -> None:
    job = json.load(sys.stdin)
    before = _free_on_devices()
    prune = None if job["spec"]["prune"] is None else PruneConfig(**job["spec"]["prune"])
    spec = SideSpec(**{**job["spec"], "prune": prune})
    with Workbench(job["model"], job["mmproj"], **job["options"]) as bench:
        bench.ask(spec, Request(**job["request"]), 1)
        after = _free_on_devices()
        rss = peak_rss()
    device = None if before is None or after is None else before - after
    print(json.dumps({"peak_rss_bytes": rss, "device_bytes": device}))


if __name__ == "__main__":
    _main()
