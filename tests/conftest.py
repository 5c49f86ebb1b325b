"""Fixtures of all tests: random models, written once for a test run, and what stock llama.cpp rounds on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

# Before any library reads them: threads of the reference and of llama.cpp that spin against each other cost minutes
# when other work shares the cores, and threads that sleep at once cost as much on tiny models. Spin briefly.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

os.environ.pop("COLUMNS", None)  # pytest-xdist sets it for its workers, whose output no terminal shows

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from helpers import gpu

if gpu.ON:
    gpu.install()

from helpers import bounds, stock
from helpers.chatting import ask, complete, load, text_of
from helpers.families import MODES
from helpers.models import CLIP, LFM2, LLAMA, QWEN2VL, QWEN2VL_VISION, QWEN35, Models, random_prompt
from helpers.reference_hybrid import open_decoder

from star_edge import StarChatHandler, cli, refvlm
from star_edge.llamacpp.names import KV_TYPES
from star_edge.synthetic import write_decoder, write_encoder


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """Random f32 models: {"llama": Models, "qwen2vl": Models}; queries are scaled up so that attention is not
    uniform.
    """
    folder = tmp_path_factory.mktemp("models")
    result = {}
    for name, shape, encoder in (
        ("llama", LLAMA, CLIP),
        ("qwen2vl", QWEN2VL, QWEN2VL_VISION),
        ("qwen35", QWEN35, QWEN2VL_VISION),
        ("lfm2", LFM2, CLIP),
    ):
        models = Models(folder / f"{name}.gguf", folder / f"{name}-mmproj.gguf", shape)
        write_decoder(models.text, shape, "f32", seed=1, sharpness=2.0)
        write_encoder(models.mmproj, encoder, shape.n_embd, "f32", seed=2)
        result[name] = models
    return result


@pytest.fixture(scope="session")
def decoder_rounding(families):
    """(family, mode of tests/helpers/families.py) -> what stock llama.cpp rounds there, against the float64 reference
    (bounds.py).
    """
    measured = {}

    def get(family, mode="f32"):
        if (family, mode) not in measured:
            flash_attn, cache = MODES[mode]
            llama = stock.load(
                families[family].text, flash_attn, n_threads=1, type_k=KV_TYPES[cache], type_v=KV_TYPES[cache]
            )
            prompt = random_prompt(families[family], [12, (10, 20), 9], seed=1)
            measured[family, mode] = bounds.of_decoder(llama, prompt, open_decoder(families[family].text))
            llama.close()
        return measured[family, mode]

    return get


@pytest.fixture
def star_edge(tmp_path):
    """Runs the command: (*arguments, stdin="", status=0) -> CompletedProcess."""

    def run(*args, stdin="", status=0):
        code = "from star_edge.cli import main; main()"
        env = {**os.environ, "COLUMNS": "200"}
        done = subprocess.run(
            [sys.executable, "-c", code, *args], cwd=tmp_path, capture_output=True, text=True, input=stdin, env=env
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def star_edge_here(tmp_path, monkeypatch, capsys):
    """As `star_edge`, in this process: (*arguments, status=0, program="star-edge") -> (stdout, stderr). The command
    sets a signal handler, which is put back.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    before = signal.getsignal(signal.SIGINT)

    def run(*args, status=0, program="star-edge"):
        monkeypatch.setattr(sys, "argv", [program, *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main(program)
        out, err = capsys.readouterr()
        assert done.value.code == status, err
        return out, err

    yield run
    signal.signal(signal.SIGINT, before)


# ---- StarChatHandler ----


@pytest.fixture(scope="module")
def handler():
    """A handler that prunes with the reference model's encoder, for `llm`."""
    return StarChatHandler(clip_model_path=refvlm.MMPROJ, prune="balanced", verbose=False)


@pytest.fixture(scope="module")
def llm(handler):
    """The reference model with that handler."""
    llm = load(handler)
    yield llm
    llm.close()


@pytest.fixture
def refuses(llm):
    """Asserts that the handler refuses a request, at once and streamed, and answers the next one."""

    def check(error, words, *messages, **options):
        for stream in (False, True):
            with pytest.raises(error, match=words):
                list(ask(llm, *messages, stream=stream, **options))
        assert text_of(ask(llm)) == " red"

    return check


@pytest.fixture(scope="module")
def text_alone():
    """What a Llama without any handler makes of a text."""
    llm = load(None)
    yield complete(llm)
    llm.close()


# ---- the support table of docs/models.md (tests/helpers/support.py) ----

FAMILY_RESULTS = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption(
        "--write-support-table",
        action="store_true",
        help="write the table of docs/models.md from what the fixtures say of their families",
    )


def pytest_configure(config):
    config.stash[FAMILY_RESULTS] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    params = getattr(getattr(item, "callspec", None), "params", {})
    if "fixture" in params and (report.when == "call" or not report.passed):
        outcome = "failed" if hasattr(report, "wasxfail") else report.outcome  # what is expected to fail does not work
        item.config.stash[FAMILY_RESULTS][params["fixture"], item.originalname, params.get("mode")] = outcome
    return report


@pytest.fixture
def family_results(request):
    """(family, test function, mode) -> outcome, of the family tests that this session has run so far."""
    return request.config.stash[FAMILY_RESULTS]
