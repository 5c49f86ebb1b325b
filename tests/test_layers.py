"""The walls of the package: who may import whom, and that only star_edge/llamacpp knows llama.cpp's inside."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "star_edge"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up. A module may import modules of the layers before its own, and of its own package; modules that
# share a layer know nothing of each other. ARCHITECTURE.md draws this.
LAYERS = (
    ("errors", "suggestions"),
    (
        "arguments",
        "cluster",
        "frame_texts",
        "messages",
        "progress",
        "report_json",
        "rows",
        "stopwatch",
        "refvlm",
        "synthetic",
        "pruning",
        "verify",
    ),
    ("llamacpp", "io"),
    ("vision", "decoder"),
    ("decoder_stage", "report", "chat", "chat_options", "inspection", "options"),
    ("generation", "asked"),
    ("reader",),
    ("request",),
    ("answers",),
    ("answering",),
    ("engine", "chat_handler"),
    ("batch", "evaluation", "server"),
    ("batch_ray", "benchmarking", "serve_ray"),
    ("cli",),
    ("__main__",),
)
WHERE = {part: i for i, layer in enumerate(LAYERS) for part in layer}


def module_name(path):
    """Within the package: "vision.encoder", "" for star_edge itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path):
    """Modules of the package that a file imports, wherever in it."""
    name, found = module_name(path), set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = [part for part in package if part][: len([p for p in package if p]) - node.level + 1]
        target = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{target}.{alias.name}".lstrip(".")
            found.add(inner if inner in MODULES else target)
    return found - {name, "", "_core"}


def part(module):
    return module.partition(".")[0]


def test_every_module_has_a_layer():
    assert {part(name) for name in MODULES if name} == set(WHERE)


@pytest.mark.parametrize("path", [p for p in FILES if module_name(p)], ids=lambda p: module_name(p))
def test_imports_point_down(path):
    own = part(module_name(path))
    upward = [m for m in imports(path) if part(m) != own and WHERE[part(m)] >= WHERE[own]]
    assert upward == []


def test_no_circle():
    graph = {name: imports(path) for name, path in MODULES.items() if name}
    graph = {name: {m for m in below if m in graph and m != part(name)} for name, below in graph.items()}
    while graph:
        leaves = [name for name, below in graph.items() if not below & graph.keys()]
        assert leaves, f"a circle among {sorted(graph)}"
        for name in leaves:
            del graph[name]


def test_pruning_knows_numbers_only():
    for path in (PACKAGE / "pruning").glob("*.py"):
        assert {part(m) for m in imports(path)} <= {"pruning", "errors", "suggestions"}
        assert "llama_cpp" not in path.read_text(encoding="utf-8")


# ---- the wall ----

PUBLIC = {
    "llama_cpp": {"Llama", "LogitsProcessorList", "LlamaGrammar", "MinTokensLogitsProcessor", "__version__"},
    "llama_cpp.llama_grammar": {"LlamaGrammar"},
    "llama_cpp.llama_chat_format": {"Jinja2ChatFormatter", "MTMDChatHandler"},
    "llama_cpp.server.types": {"CreateChatCompletionRequest"},
}
# Attributes of Llama, of its context, of MTMDChatHandler and of LlamaGrammar that are private, or that only the
# hand-over writes
PRIVATE = re.compile(
    r"_internals|_ctx|_stack|_logits_all|_requires_eval|_lora_adapter|_batch|_n_ctx|_mtmd_cpp|_init_sampler|_exit_stack"
    r"|_grammar|_root|input_ids|kv_cache_\w+|_init_mtmd_context|_get_chat_template|_create_bitmap_from_bytes"
    r"|_postprocess_template_text|_get_template_messages|mtmd_(?!ctx)\w+|llama_[a-z_]+|LLAMA_\w+|GGML_\w+"
)
TENSOR = re.compile(
    r"(l_out|inp_|attn_inp|result_norm|cache_[kv]_l|window_idx|inv_window_idx|v\.|mm\.|blk\.)[\w.%{}-]*|GGML_OP_\w+"
    r"|FLASH_ATTN_EXT|SOFT_MAX|SET_ROWS"
)
INPUT_CALLS = ("set_input", "watching", "watch_input", "find_concat")


def breaches(source):
    """(line, what) for each place that knows llama.cpp's or llama_cpp's inside."""
    tree, found = ast.parse(source), []
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        say = lambda what, node=node: found.append((node.lineno, what))
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("llama_cpp") and alias.name not in ("llama_cpp",):
                    say(f"import {alias.name}")
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("llama_cpp"):
            for alias in node.names:
                if alias.name not in PUBLIC.get(node.module, ()):
                    say(f"from {node.module} import {alias.name}")
        elif isinstance(node, ast.Attribute):
            is_llama_cpp = isinstance(node.value, ast.Name) and node.value.id == "llama_cpp"
            if is_llama_cpp and node.attr not in PUBLIC["llama_cpp"]:
                say(f"llama_cpp.{node.attr}")
            elif PRIVATE.fullmatch(node.attr) and not is_llama_cpp:
                say(f".{node.attr}")
            elif node.attr == "_model" and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                say("._model")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docs and TENSOR.fullmatch(node.value):
                say(repr(node.value))
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
            right = node.comparators[0]
            if isinstance(right, ast.Call) and isinstance(right.func, ast.Name) and right.func.id == "str":
                say(f"{node.left.value!r} in the text of an error")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in INPUT_CALLS:
            if node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value is not None:
                say(f"{node.func.attr}({node.args[0].value!r})")
        elif (
            isinstance(node, ast.keyword)
            and node.arg == "index_input"
            and isinstance(node.value, ast.Constant)
            and node.value.value is not None
        ):
            found.append((node.value.lineno, f"index_input={node.value.value!r}"))
    return found


# synthetic writes GGUF files, whose tensors have names
OUTSIDE = [p for p in FILES if part(module_name(p)) not in ("llamacpp", "synthetic")]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda p: module_name(p) or "star_edge")
def test_only_llamacpp_knows_the_inside_of_llama_cpp(path):
    assert breaches(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import llama_cpp.mtmd_cpp as mtmd",
        "from llama_cpp import _internals",
        "from llama_cpp import llama_batch",
        "llama_cpp.llama_memory_clear(memory, False)",
        "params.flash = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED",
        "llama._ctx = context",
        "vocab = llama._model.vocab",
        "llama._stack.callback(close)",
        "handler._mtmd_cpp = watched",
        "llama.input_ids[:n] = tokens",
        "llama._requires_eval = False",
        "name = 'l_out-3'",
        "tap.set_input('positions', data)",
        "profile = Profile(index_input='patches')",
        "x = 'v.class_embd' in tensors",
        "if 'context' in str(error): pass",
        "op = 'FLASH_ATTN_EXT'",
    ],
)
def test_the_rules_find_breaches(line):
    assert breaches(line), line


@pytest.mark.parametrize(
    "line",
    [
        "import llama_cpp",
        "from llama_cpp import Llama, LogitsProcessorList",
        "version = llama_cpp.__version__",
        "self._model = model",
        "llama.n_tokens",
        '"""The input inp_pos of a graph."""',
        "tap.set_input(name, data)",
    ],
)
def test_the_rules_let_the_public_through(line):
    assert breaches(line) == []


def test_a_circle_and_an_upward_import_would_be_found(tmp_path, monkeypatch):
    monkeypatch.setitem(MODULES, "pruning.made_up", tmp_path / "made_up.py")
    (tmp_path / "made_up.py").write_text("from ..engine import StarVLM\nfrom . import choose\nfrom .. import errors\n")
    monkeypatch.setattr("test_layers.PACKAGE", tmp_path.parent)
    (tmp_path.parent / "pruning").mkdir(exist_ok=True)
    path = tmp_path.parent / "pruning" / "made_up.py"
    path.write_text((tmp_path / "made_up.py").read_text())
    assert imports(path) == {"engine", "pruning.choose", "errors"}
