"""Feeds random bad input to everything that takes some: `make fuzz`, or

    python tests/fuzz/run.py --seconds 60                               # an equal part of it for each target
    python tests/fuzz/run.py --target gguf --first 0 --cases 5000       # exactly those cases
    python tests/fuzz/run.py --target gguf --first 2857 --cases 1 -v    # one of them again

What ends a process, hangs, or raises something untyped is written down as small as it was found to do so, and the exit
status is 1.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from cases import Case
from forking import run
from targets import TARGETS

CASE_SECONDS = 30
SHRINKING_SECONDS = 20  # for one failure
SAVED = Path(__file__).parent.parent.parent / "build" / "fuzz"


def kind_of(result: str) -> str:
    """What two failures of one cause share."""
    return (
        result
        if result.startswith("death")
        else " ".join(result.split()[:3])
        if result.startswith(("untyped", "bad"))
        else result.split(":")[0]
    )


def is_bad(result: str) -> bool:
    return result.startswith(("death", "hang", "untyped", "bad"))


def shrunk(case: Case, result: str) -> bytes:
    """The smallest part of the payload that was found to fail in the same way."""
    data = case.payload
    if not case.divides or result == "hang":
        return data
    end, n = time.monotonic() + SHRINKING_SECONDS, 2
    while n <= min(len(data), 64) and time.monotonic() < end:
        size = -(-len(data) // n)
        for start in range(0, len(data), size):
            part = data[:start] + data[start + size :]
            if time.monotonic() > end:
                break
            if kind_of(run(lambda part=part: case.check(part), CASE_SECONDS)) == kind_of(result):
                data, n = part, 2
                break
        else:
            n *= 2
    return data


def fuzz(name: str, first: int, cases: int, seconds: float, save: Path, verbose: bool) -> int:
    """Number of failures."""
    end, counts, bad = time.monotonic() + seconds, collections.Counter(), 0
    for seed in range(first, first + cases):
        if time.monotonic() > end:
            break
        if counts and sum(counts.values()) % 500 == 0:
            print(f"{name}: {sum(counts.values())} cases so far, {bad} bad", flush=True)
        case = TARGETS[name](seed)
        result = run(lambda case=case: case.check(case.payload), CASE_SECONDS)
        counts[kind_of(result)] += 1
        failed = is_bad(result)
        if failed or verbose:
            print(f"{name} {seed}: {case.said}\n    {result[:600]}", flush=True)
        if failed:
            bad += 1
            save.mkdir(parents=True, exist_ok=True)
            (save / f"{name}-{seed}{case.suffix}").write_bytes(shrunk(case, result))
            (save / f"{name}-{seed}.txt").write_text(f"{case.said}\n{result}\n")
    print(f"{name}: {sum(counts.values())} cases, {bad} bad; {dict(counts.most_common())}", flush=True)
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, help="default: all, with equal time")
    parser.add_argument("--first", type=int, default=None, help="first seed; default: another one each time")
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--save", type=Path, default=SAVED)
    parser.add_argument("-v", "--verbose", action="store_true", help="print every case")
    options = parser.parse_args()
    if options.cases == 10**9 and options.seconds == float("inf"):
        parser.error("give --cases or --seconds")
    first = options.first if options.first is not None else int(time.time()) * 1000 if options.cases == 10**9 else 0
    names = [options.target] if options.target else list(TARGETS)
    bad = sum(
        fuzz(name, first, options.cases, options.seconds / len(names), options.save, options.verbose) for name in names
    )
    if bad:
        print(f"{bad} failures in {options.save}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
