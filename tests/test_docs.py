"""ARCHITECTURE.md against the files, links between pages, and the docstrings that the reference is made of."""

import dataclasses
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

import star_edge
from star_edge import errors, hub
from star_edge.io.images import ImageLimits, load_image
from star_edge.pruning import config, presets

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
    modules = set(package.rglob("*.py"))
    files = {path for path in modules if path.name != "__init__.py"} | {
        path for path in (ROOT / "csrc").iterdir() if path.suffix in (".c", ".h")
    }
    folders = {path.parent for path in modules if path.name == "__init__.py"} | {ROOT / "csrc"}
    return {path.relative_to(ROOT).as_posix() for path in files} | {
        path.relative_to(ROOT).as_posix() + "/" for path in folders
    }


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
            if not file.exists() or (section and section not in anchors(file.read_text(encoding="utf-8"))):
                missing.append(f"{page.name}: {target}")
    assert not missing


def anchors(text):
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_that_pages_name_exist():
    """Paths of this repository in backticks; `tests/test_tap*.py` stands for several."""
    missing = []
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"`((?:star_edge|csrc|tests|tools|benchmarks|bindings)/[\w./*-]+)`", text)
        missing += [f"{page.name}: {path}" for path in named if not list(ROOT.glob(path.rstrip("/")))]
    assert not missing


def test_makefile_targets_that_pages_name_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    missing = []
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for names in re.findall(r"`make ([\w -]+?)(?: \w+=\S+)*`", page.read_text(encoding="utf-8")):
            missing += [f"{page.name}: make {name}" for name in names.split() if name not in targets]
    assert not missing


# ---- docstrings ----

DATACLASSES = (
    star_edge.Answer,
    star_edge.PruneConfig,
    star_edge.PruneReport,
    star_edge.ImageReport,
    star_edge.Progress,
    ImageLimits,
)
CALLABLES = (
    star_edge.StarVLM,
    star_edge.StarVLM.generate,
    star_edge.StarVLM.chat,
    star_edge.StarVLM.agenerate,
    star_edge.StarVLM.achat,
    star_edge.StarVLM.cancellable,
    star_edge.StarVLM.read_prompt,
    star_edge.StarVLM.tokenize,
    star_edge.StarVLM.inspect,
    star_edge.StarChatHandler,
    star_edge.StarChatHandler.__call__,
    star_edge.StarChatHandler.pruning,
    star_edge.StarChatHandler.cancellable,
    star_edge.StarChatHandler.load_image,
    star_edge.PruneReport.picture,
    config.PruneConfig.decoder_windows,
    presets.override,
    config.keep_count,
    load_image,
    hub.fetch,
)
SECTIONS = ("Args", "Attributes", "Returns", "Raises")


def sections(thing):
    """Sections of a Google docstring: names in order, each with what is said of it. Returns has one text, under ""."""
    found, names = {}, None
    for line in (inspect.getdoc(thing) or "").splitlines():
        indent = len(line) - len(line.lstrip())
        if not indent and line.rstrip(":") in SECTIONS and line.endswith(":"):
            names = found.setdefault(line.rstrip(":"), {})
            name = ""
        elif names is not None and line and not indent:
            names = None
        elif names is not None and line:
            match = re.match(r" {4}([*\w]+): (.*)", line) if indent == 4 and names is not found.get("Returns") else None
            name, text = match.groups() if match else (name, line.strip())
            names[name] = f"{names.get(name, '')} {text}".strip()
    return found


def parameters(function):
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [stars.get(p.kind, "") + p.name for p in inspect.signature(function).parameters.values() if p.name != "self"]


@pytest.mark.parametrize("function", CALLABLES, ids=lambda f: f.__qualname__)
def test_arguments_are_those_of_the_signature(function):
    """Args names every parameter, in order; what it returns and what it raises are said too."""
    said = sections(function)
    assert list(said["Args"]) == parameters(function)
    assert all(said["Args"].values())
    if not inspect.isclass(function) and inspect.signature(function).return_annotation not in (None, "None"):
        assert said.get("Returns", {}).get("") or "Iterator" in inspect.signature(function).return_annotation


@pytest.mark.parametrize("kind", DATACLASSES, ids=lambda kind: kind.__name__)
def test_attributes_are_the_fields(kind):
    said = sections(kind)["Attributes"]
    assert list(said) == [field.name for field in dataclasses.fields(kind)]
    assert all(said.values())


@pytest.mark.parametrize("thing", (*CALLABLES, *DATACLASSES), ids=lambda thing: thing.__qualname__)
def test_raised_errors_are_typed(thing):
    """What Raises names are errors of star_edge."""
    for name in sections(thing).get("Raises", {}):
        assert issubclass(getattr(errors, name), errors.StarEdgeError)


@pytest.mark.parametrize("name", sorted(name for name in vars(errors) if name.endswith("Error")))
def test_errors_say_what_they_mean(name):
    assert vars(errors)[name].__dict__.get("__doc__")


@pytest.mark.parametrize(
    "kind",
    (
        star_edge.StarVLM,
        *star_edge.StarVLM.__bases__,
        star_edge.StarChatHandler,
        star_edge.AnswerStream,
        star_edge.AsyncAnswerStream,
        *DATACLASSES,
    ),
)
def test_public_members_have_docstrings(kind):
    own = {
        name: member
        for name, member in vars(kind).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    }
    assert not [name for name, member in own.items() if not inspect.getdoc(member)]


def test_what_the_docstring_tests_catch():
    """A parameter that is not described, one that is no more, and a line that belongs to the one before it."""

    def function(first, second):
        """Does it.

        Args:
            first: One thing.
                More of it: and more.
            third: Another.

        Returns:
            A number: of things.
        """

    said = sections(function)
    assert list(said["Args"]) == ["first", "third"] != parameters(function)
    assert said["Args"]["first"] == "One thing. More of it: and more."
    assert said["Returns"] == {"": "A number: of things."}
