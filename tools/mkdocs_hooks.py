"""Hooks of mkdocs.yml: pages of the repository's root are pages of the site too, and links between the two hold there.

On the site all pages lie in one folder. In the repository those of docs link to `../ACCURACY.md`, and those of the root
to `docs/install.md`.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
FROM_ROOT = (
    "README.md",
    "ACCURACY.md",
    "BENCHMARKS.md",
    "CONTRIBUTING.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "LICENSE",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in FROM_ROOT:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return re.sub(r"(\]\()(?:docs|\.\.)/", r"\1", markdown)
