"""benchmarks/gpu.sh, as far as it can be run without a GPU and a compiler for it."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_it_takes_the_newest_version_that_is_allowed():
    """An empty version would ask the registry for anything."""
    lines = (ROOT / "benchmarks/gpu.sh").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VERSION="))
    done = subprocess.run(
        ["bash", "-c", f"{line}; echo $VERSION"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    allowed = re.search(r'"llama-cpp-python>=[0-9.]+,<=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    assert done.stdout.strip() == allowed[1]


def test_it_says_how_it_is_used():
    done = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "gpu.sh pack" in done.stdout


def test_the_pack_has_what_the_package_needs():
    """But for what the head of the script asks of the machine, and the library that it compiles."""
    project = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("\n]")[0]
    needed = set(re.findall(r'^    "([a-z0-9-]+)', project, re.M)) - {"llama-cpp-python", "numpy", "pillow"}
    packed = (ROOT / "benchmarks/gpu.sh").read_text().partition("\nWHEELS=(")[2].partition(")")[0].split()
    assert needed and needed <= set(packed)
