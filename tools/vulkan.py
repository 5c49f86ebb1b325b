"""Runs tests with the models on a Vulkan device (`make test-vulkan`).

    python tools/vulkan.py [--placement all] [--jobs 2] [--build-only] [arguments of pytest]

ggml's Vulkan backend is built from the source of the installed llama-cpp-python, once, and put beside copies of the
other libraries in .processors/vulkan (tools/processors.py). The Python packages stay as they are. The device is Mesa's
software device, unless VK_DRIVER_FILES names another driver. What is needed of the system is installed where apt-get
is and may be used; elsewhere the error names it.

That device follows descriptors of buffers that are gone, which Vulkan allows to be there; stock llama.cpp crashes on it
too. In this build the buffers stay (tools/vulkan_headers.hpp). What may still crash is told apart: tests run in worker
processes that are replaced (pytest-xdist), and a test that ended one is run again in a process of its own. If that ends
as well, stock llama.cpp is asked in a third process: the same test, with no callback in any context
(tests/helpers/gpu.py). Where stock crashes too the test shows nothing of us, and says so; where stock does not the test
has failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from pathlib import Path

from processors import ROOT, build, environment_of

HEADERS = Path(__file__).with_name("vulkan_headers.hpp")
LIBRARIES = ("libggml.so", "libggml-vulkan.so")
ICD_FOLDERS = ("/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/etc/vulkan/icd.d")
# placement (tests/helpers/gpu.py) -> files of the suite
SUITES = {
    "all": "exact faithful windows families reuse vision repair encoder_units tap_inputs",
    "half": "exact families",
    "encoder": "exact families",
}
SECONDS = 600  # for a test in a process of its own


def software_device() -> str:
    """Mesa's driver of its software device, "" where it is not installed."""
    return next((str(f) for folder in ICD_FOLDERS for f in sorted(Path(folder).glob("lvp_icd*.json"))), "")


def missing() -> list[str]:
    """Debian's packages of what is not there."""
    there = {
        "glslc": shutil.which("glslc"),
        "libvulkan-dev": any(Path(p, "vulkan/vulkan.hpp").exists() for p in ("/usr/include", "/usr/local/include")),
        "spirv-headers": any(Path(p, "spirv/unified1").exists() for p in ("/usr/include", "/usr/local/include")),
        "mesa-vulkan-drivers": os.environ.get("VK_DRIVER_FILES") or software_device(),
    }
    return [package for package, found in there.items() if not found]


def prepare() -> None:
    """Installs what is missing. Raises SystemExit where it cannot."""
    packages = missing()
    if packages and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages], check=True)
        packages = missing()
    if packages:
        sys.exit(f"install {' '.join(packages)} (so Debian calls them), then run this again")


def environment(libraries: Path, placement: str) -> dict[str, str]:
    """That of the tests. ggml leaves out processors among the devices unless they are asked for by number. Mesa's own
    threads are off: every core has a worker already."""
    driver = os.environ.get("VK_DRIVER_FILES") or software_device()
    return {
        "GGML_VK_VISIBLE_DEVICES": "0",
        "LP_NUM_THREADS": "0",
        **environment_of(libraries),
        "VK_DRIVER_FILES": driver,
        "VK_ICD_FILENAMES": driver,  # the name before Vulkan 1.3.207
        "STAR_EDGE_TEST_GPU": placement,
    }


def device(variables: dict[str, str]) -> str:
    """What the models run on. Raises SystemExit if ggml sees no Vulkan device."""
    code = (
        "from star_edge.llamacpp.devices import list_devices as ds\nfor d in ds(): print(d['name'], d['description'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("Vulkan")]
    if not found:
        sys.exit(f"ggml sees no Vulkan device:\n{done.stdout}{done.stderr}")
    return found[0]


def pytest(variables: dict[str, str], arguments: Sequence[str], **options: object) -> int:
    """Its status; below 0: the signal that ended it."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, **options).returncode


def read_report(path: Path) -> tuple[int, int, int, list[str]]:
    """(passed, failed, skipped, ids of tests that ended a worker), of a JUnit report of pytest-xdist."""
    passed = failed = skipped = 0
    crashed = []
    for case in xml.parse(path).getroot().iter("testcase"):
        problems = [*case.findall("failure"), *case.findall("error")]
        ended = [re.search(r"crashed while running '(.+)'", p.attrib.get("message", "")) for p in problems]
        if any(ended):
            crashed += [match[1] for match in ended if match]
        elif problems:
            failed += 1
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, failed, skipped, crashed


def ask_again(variables: dict[str, str], test: str) -> str:
    """What becomes of a test that has ended a worker: "passed", "failed", "stock" (it crashes too) or "ours"."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": SECONDS}
    statuses = []
    for stock in ("", "1"):
        try:
            statuses.append(pytest({**variables, "STAR_EDGE_TEST_STOCK": stock}, [test], **quiet))
        except subprocess.TimeoutExpired:
            statuses.append(-9)
        if not stock and statuses[0] >= 0:
            return "failed" if statuses[0] else "passed"
    return "stock" if statuses[1] < 0 else "ours"


def run(libraries: Path, placement: str, jobs: int, arguments: Sequence[str]) -> bool:
    """The files of one placement. Whether all is well."""
    start, variables = time.time(), environment(libraries, placement)
    files = [f"tests/test_{name}.py" for name in SUITES[placement].split()]
    chosen = [*(() if any(Path(ROOT, a.partition("::")[0]).exists() for a in arguments) else files), *arguments]
    print(f"== {placement}: on {device(variables)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        workers = ["-n", str(jobs), "--max-worker-restart", "100000", f"--junitxml={report}"]
        workers += ["--deselect=tests/test_families.py::test_support_table"]  # docs/models.md speaks of processors
        status = pytest(variables, [*workers, *chosen])
        if not report.exists():
            return False
        passed, failed, skipped, crashed = read_report(report)
    found: dict[str, list[str]] = {}
    for test in dict.fromkeys(crashed):
        found.setdefault(ask_again(variables, test), []).append(test)
    told = {
        "passed": "passed in a process of its own",
        "failed": "failed in a process of its own",
        "stock": "ends with stock llama.cpp too",
        "ours": "ends, and does not with stock llama.cpp",
    }
    for outcome, tests in found.items():
        for test in tests:
            print(f"{test}: {told[outcome]}")
    counts = ", ".join(f"{len(tests)} {told[outcome]}" for outcome, tests in found.items())
    minutes, n_crashed = (time.time() - start) / 60, len(dict.fromkeys(crashed))
    print(
        f"== {placement}: {passed} passed, {failed} failed, {skipped} skipped; {n_crashed} ended a worker"
        f"{': ' + counts if counts else ''}; {minutes:.0f} minutes",
        flush=True,
    )
    return status in (0, 1) and not failed and not found.keys() & {"failed", "ours"} and passed + len(crashed) > 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs tests with the models on a Vulkan device.")
    parser.add_argument("--placement", choices=SUITES, help="default: all three, one after the other")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="worker processes (default: one for each core)"
    )
    parser.add_argument("--build-only", action="store_true", help="stop when the libraries are there")
    options, arguments = parser.parse_known_args()
    prepare()
    libraries = build("vulkan", "ggml", LIBRARIES, ["-DGGML_VULKAN=ON"], f"-include {HEADERS}")
    if options.build_only:
        return
    placements = [options.placement] if options.placement else list(SUITES)
    failed = [placement for placement in placements if not run(libraries, placement, options.jobs, arguments)]
    if failed:
        sys.exit(f"not all is well: {', '.join(failed)}")


if __name__ == "__main__":
    main()
