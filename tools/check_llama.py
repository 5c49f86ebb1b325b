"""Which of star_edge's assumptions about llama.cpp and llama-cpp-python hold in a version of llama-cpp-python.

    python tools/check_llama.py VERSION [TESTS ...]   builds star_edge against it, in .check-llama/VERSION
    python tools/check_llama.py here [TESTS ...]      as it is installed

Prints one line for each assumption: each function in tests/contract is one. TESTS: further arguments of pytest, such as
files of the suite that are to run there too. Status 1: something does not hold.

An environment is made once and kept; llama-cpp-python comes out of pip's cache, or is compiled, which takes minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = ROOT / "tests" / "contract"
TOOLS = ("pytest>=8", "psutil>=5.9", "scikit-build-core>=0.10", "ninja")


def words(text: str) -> str:
    """test_a_name, of a function or a file, as words."""
    return text.removeprefix("test_").replace("_", " ")


def assumptions(report: str | Path) -> dict[str, list[str]]:
    """Assumption -> why it does not hold, one line for each parameter with which it fails; from a JUnit report."""
    found: dict[str, list[str]] = {}
    for case in xml.parse(report).getroot().iter("testcase"):
        function, _, parameters = case.attrib["name"].partition("[")
        place = case.attrib.get("classname", "").rpartition(".")[2]
        lines = found.setdefault(f"{words(place)}: {words(function)}" if place else words(function), [])
        for problem in (*case.findall("failure"), *case.findall("error")):
            reason = " ".join((problem.attrib.get("message") or problem.text or "").split())
            lines.append(f"[{parameters} {reason}"[:300] if parameters else reason[:300])
    return found


def show(found: dict[str, list[str]]) -> int:
    """Prints them, and returns how many fail."""
    for assumption, problems in found.items():
        print(
            f"{'FAILS' if problems else 'holds'}  {assumption}"
            + (f"  ({'; '.join(problems)[:400]})" if problems else "")
        )
    failed = sum(map(bool, found.values()))
    print(f"{len(found) - failed} of {len(found)} assumptions hold")
    return failed


def first_error(log: str) -> str:
    """The line of a build's log that says why it failed."""
    lines = [line.strip() for line in log.splitlines() if re.search(r"\berror\b|Error:|ERROR:", line)]
    return next((line for line in lines if "error: " in line), lines[0] if lines else log[-300:])[:300]


def pip(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def requirements() -> list[str]:
    """What star_edge needs to run, llama-cpp-python apart."""
    lines = metadata.requires("star-edge") or []
    return [line for line in lines if "extra ==" not in line and not line.startswith("llama-cpp-python")]


def environment(version: str) -> Path:
    """The Python of an environment with that llama-cpp-python and star_edge compiled against it.

    Raises:
        RuntimeError: it cannot be installed, or star_edge not be compiled.
    """
    folder = ROOT / ".check-llama" / version
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    done = pip(python, f"llama-cpp-python=={version}", *TOOLS, *requirements())
    if done.returncode:
        raise RuntimeError(f"llama-cpp-python {version} can be installed", first_error(done.stdout + done.stderr))
    options = ["--no-build-isolation", "--no-deps", "-C", f"build-dir={folder / 'build'}"]
    done = pip(python, *options, "--editable", ".")
    if done.returncode:
        raise RuntimeError("the C core compiles against the headers", first_error(done.stdout + done.stderr))
    return python


def main() -> int:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    version, tests = sys.argv[1], sys.argv[2:]
    try:
        python = Path(sys.executable) if version == "here" else environment(version)
    except RuntimeError as error:
        assumption, reason = error.args
        return bool(show({assumption: [reason]}))
    done = subprocess.run(
        [str(python), "-c", "import star_edge, llama_cpp; print(llama_cpp.__version__)"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        return bool(show({"star_edge can be imported": [done.stderr.strip().rpartition("\n")[2]]}))
    print(f"llama-cpp-python {done.stdout.strip()}")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-o", "addopts="]
        subprocess.run(
            [str(python), "-m", "pytest", str(CONTRACT), *options, *(t for t in tests if t.startswith("-"))],
            cwd=ROOT, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        if not report.exists():
            return bool(show({"the contract tests can be collected": ["see python -m pytest tests/contract"]}))
        failed = show(assumptions(report))
    if any(not t.startswith("-") for t in tests):
        failed += bool(subprocess.run([str(python), "-m", "pytest", *tests], cwd=ROOT).returncode)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
