"""ARCHITECTURE.md against the files: its tree names every module of the package and of the C core, once."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def listed(text):
    """Paths of the tree between its two comments, with what is said of each: folders end in a slash."""
    tree = re.search(r"<!-- tree: begin.*?-->\n```\n(.*?)```\n<!-- tree: end -->", text, re.DOTALL).group(1)
    entries, folder = [], ""
    for line in tree.splitlines():
        if not line.strip():
            continue
        name, _, about = line.strip().partition(" ")
        if not line.startswith(" "):
            folder = name
            name = ""
        entries.append((folder + name, about.strip()))
    return entries


def on_disk():
    """Modules and packages of star_edge, and the C files of csrc. A package stands for its __init__.py."""
    package = ROOT / "star_edge"
    modules = {path for path in package.rglob("*.py")}
    files = {path for path in modules if path.name != "__init__.py"} | {
        path for path in (ROOT / "csrc").iterdir() if path.suffix in (".c", ".h")
    }
    folders = {path.parent for path in modules if path.name == "__init__.py"} | {ROOT / "csrc"}
    name = lambda path: path.relative_to(ROOT).as_posix()
    return {name(path) for path in files} | {name(path) + "/" for path in folders}


def test_tree_lists_every_module_once():
    entries = Counter(path for path, _ in listed(ARCHITECTURE))
    assert not {path: n for path, n in entries.items() if n > 1}
    assert set(entries) == on_disk()


def test_tree_says_something_of_each():
    said = Counter(about for _, about in listed(ARCHITECTURE))
    assert "" not in said


def test_what_the_tree_test_catches():
    """A module that is missing in the tree, one that is there no more, and one that stands there twice."""
    line = "  budget.py                 how images share a budget\n"
    assert line in ARCHITECTURE
    assert {path for path, _ in listed(ARCHITECTURE.replace(line, ""))} != on_disk()
    assert {path for path, _ in listed(ARCHITECTURE.replace("budget.py", "budgets.py"))} != on_disk()
    assert len(listed(ARCHITECTURE.replace(line, line * 2))) == len(listed(ARCHITECTURE)) + 1


def test_links():
    """Links between the pages of the repository, and their sections, exist."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    missing = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, section = target.partition("#")
            file = page if not path else page.parent / path
            if not file.exists():
                missing.append(f"{page.name}: {target}")
            elif section and section not in anchors(file.read_text(encoding="utf-8")):
                missing.append(f"{page.name}: {target}")
    assert not missing


def anchors(text):
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
