"""benchmarks/openvino_beside.py, as far as it goes without OpenVINO: the other process, the run, the table."""

import base64
import io
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.synthetic_shapes import tiny
from PIL import Image

from star_edge.synthetic import SHAPES, model_files

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import openvino_beside as beside
    import tables
    from other_process import IDLE, OtherProcess, OtherProcessError
finally:
    sys.path.pop(0)

VERSIONS = dict.fromkeys(("openvino-genai", "openvino", "optimum-intel", "transformers"), "1.0")

# ---- the other process ----

CHILD = """
import os, sys, threading, time
sys.path.insert(0, sys.argv[1])
os.dup2(os.open(sys.argv[2], os.O_CREAT | os.O_WRONLY), 2)
print("a library says hello")
from other_process import serve, take_stdout
answers = take_stdout()
print("and another")

def spin():
    end = time.thread_time() + 0.2
    while time.thread_time() < end:
        pass

def answer(what, n=0):
    print("noise")
    if what == "fail":
        raise ValueError("no such side")
    if what == "die":
        os._exit(3)
    if what == "spin":  # after the answer, as a thread pool that does not sleep
        threading.Timer(0.05, spin).start()
    return {"what": what, "n": n + 1, "text": "\\u00e4\\n"}

serve(answers, {"versions": {}}, answer)
"""


@pytest.fixture
def child(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    with OtherProcess(
        [sys.executable, str(tmp_path / "child.py"), str(BENCHMARKS), str(tmp_path / "stderr")]
    ) as process:
        yield process


def test_lines_go_to_and_fro_whatever_is_printed_beside_them(capsys, child, tmp_path):
    assert child.hello == {"versions": {}}
    for n in range(3):
        answer = child.ask(what="x" * 200_000, n=n)  # more than a pipe holds
        assert answer.pop(IDLE) >= 0 and answer == {"what": "x" * 200_000, "n": n + 1, "text": "\u00e4\n"}
    child.close()
    before, after = capsys.readouterr().err, (tmp_path / "stderr").read_text()
    assert sorted((before + after).split()) == sorted("a library says hello and another".split() + 3 * ["noise"])


def test_an_error_is_told_and_the_process_goes_on(child):
    for request in ({"what": "fail"}, {"unknown": 1}):
        with pytest.raises(OtherProcessError, match=r"child\.py: (ValueError: no such side|TypeError: .*unknown)"):
            child.ask(**request)
    assert child.ask(what="on")["n"] == 1


def test_an_ended_process_is_told(child):
    for _ in range(2):
        with pytest.raises(OtherProcessError, match=r"child\.py ended with status 3"):
            child.ask(what="die")


def test_a_process_that_never_begins(tmp_path):
    with pytest.raises(OtherProcessError, match="cannot be started"):
        OtherProcess([str(tmp_path / "none")])
    with pytest.raises(OtherProcessError, match="ended with status 5"):
        OtherProcess([sys.executable, "-c", "print('broken'); raise SystemExit(5)"])


def test_work_between_requests_is_counted(child):
    child.ask(what="spin")
    worked = 0.0
    for _ in range(1000):  # until the thread has spun, however busy the machine is
        worked += child.ask(what="look")[IDLE]
        if worked >= 0.15:
            break
        time.sleep(0.02)
    assert worked >= 0.15


# ---- the run ----


class Fake:
    """OpenVINO's end: it counts tokens as its tokenizer does, a byte each beside the template's, and what is kept."""

    def __init__(self, says, extra=0):
        self.hello = {"versions": VERSIONS}
        self.asked, self.says, self.extra = [], says, extra

    def ask(self, ratio, picture, before, after):
        self.asked.append((ratio, picture, before, after))
        image = Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2])))
        kept = image.width * image.height // 28**2 * (100 - ratio) // 100
        n = 6 + len(before) + 2 + kept + len(after) + 13 + self.extra
        return {
            "first_token_ms": self.says(len(self.asked)),
            "genai_first_token_ms": 1.0,
            "embeddings_ms": 0.5,
            "prompt_tokens": n,
            IDLE: 0.25,
        }


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("STAR_EDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(beside, "PAUSE", 0)
    shape = tiny("qwen2-vl-2b")
    shape = replace(shape, picture=(336, 336), n_image_tokens=144)
    monkeypatch.setitem(SHAPES, "qwen2-vl-2b", shape)
    with model_files(shape, tmp_path) as made:
        yield made


def test_all_sides_in_turn_each_with_a_prompt_of_its_own(files, monkeypatch):
    openvino, asked, log = Fake(float), [], []
    of_llama = beside.Workbench.ask
    monkeypatch.setattr(
        beside.Workbench,
        "ask",
        lambda self, spec, request, n: asked.append((spec, request)) or of_llama(self, spec, request, n),
    )
    result = beside.measure(files, openvino, 1, 2, say=log.append)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["image_tokens"] == 144 and result["prompt_tokens"] == 35 + 1 + 144 + 1 + 40
    rows = {(row["step"], row["kind"]): row for row in result["sides"]}
    assert len(rows) == len(result["sides"]) == 11 and len({row["name"] for row in rows.values()}) == 11
    assert {kind for step, kind in rows if step == "all"} == {"stock", "converted", "openvino"}
    # Of 144: what CDPruner leaves, and the square that a smaller picture of so many tokens has at most
    for step, tokens, smaller in (("a quarter", 36, 36), ("a tenth", 14, 9)):
        assert rows[step, "openvino"]["average_tokens"] == tokens
        assert rows[step, "star_edge"]["average_tokens"] == pytest.approx(tokens, abs=1.5)
        assert {rows[step, kind]["average_tokens"] for kind in ("stock", "converted")} == {smaller}
    # Three requests of each side: one to warm up, and one in each repeat, in which none is asked twice
    assert [ratio for ratio, *_ in openvino.asked[:3]] == [0, 75, 90] and len(openvino.asked) == 9
    assert sorted(ratio for ratio, *_ in openvino.asked[3:6]) == [0, 75, 90]
    assert len(asked) == 24 and len({spec.name for spec, _ in asked[8:16]}) == 8 and len(log) == 33
    texts = [request.messages[0]["content"] for _, request in asked]
    prompts = [(t[1]["image_url"]["url"], t[0]["text"], t[2]["text"]) for t in texts] + [a[1:] for a in openvino.asked]
    for part in zip(*prompts):
        assert len(set(part)) == 33
    # Of the requests after the warm-up the fake said their numbers
    assert rows["all", "openvino"]["first_token_ms"]["all"] != rows["a tenth", "openvino"]["first_token_ms"]["all"]
    assert sorted(n for row in rows.values() if row["kind"] == "openvino" for n in row["first_token_ms"]["all"]) == [
        4, 5, 6, 7, 8, 9
    ]  # fmt: skip
    for step, ratios in result["ratios"].items():
        ours = rows[step, "star_edge"]["first_token_ms"]["median"]
        for kind in ("openvino", "stock", "converted"):
            assert ratios[kind] * rows[step, kind]["first_token_ms"]["median"] == pytest.approx(ours)
    assert result["idle"]["openvino"]["cpu_s"] == 6 * 0.25  # of the six after the warm-up
    assert result["idle"]["llama.cpp"]["seconds"] > 0
    beside.table(result | {"command": "x"})


def test_prompts_that_differ_are_refused(files):
    with pytest.raises(ValueError, match="221 tokens on llama.cpp and 222 on OpenVINO"):
        beside.measure(files, Fake(float, extra=1), 1, 1)


# ---- the table ----


def side(kind, step, first, before, tokens):
    return {
        "name": f"{kind} {step}",
        "kind": kind,
        "step": step,
        "average_tokens": tokens,
        "first_token_ms": {"median": first, "min": first - 100, "max": first + 1000, "all": [first]},
        "embeddings_ms": before,
    }


RESULT = {
    "title": "A model",
    "date": "2026-01-02",
    "versions": {"star_edge": "0.1", "llama-cpp-python": "0.2", "python": "3.9", **VERSIONS},
    "machine": {"processor": "A processor", "threads": 2},
    "prompt_tokens": 477,
    "image_tokens": 400,
    "repeats": 5,
    "sides": [side("stock", "all", 8000, 6000, 400), side("star_edge", "a tenth", 2500, 1234, 40.26)],
    "ratios": {"a tenth": {"openvino": 0.5, "stock": 1.256, "converted": 1.5}},
    "idle": {"llama.cpp": {"share": 0.0012}, "openvino": {"share": 0.01}},
    "command": "python x",
}


def test_table():
    lines = beside.table(RESULT).split("\n")
    assert lines[0].startswith(
        "A model; a prompt of 477 tokens. A processor, 2 threads; star_edge 0.1, llama-cpp-python 0.2,"
    )
    assert "    python x" in lines
    assert "| stock all | 400.0 | 8.00 | 7.90-9.00 | 6.00 | 1.00 |" in lines
    assert "| star_edge a tenth | 40.3 | 2.50 | 2.40-3.50 | 1.23 | 3.20 |" in lines
    assert "| a tenth | 0.50 | 1.26 | 1.50 |" in lines
    assert lines[-1].endswith("took 0.12% of a processor, and OpenVINO's 1.00%.")


def test_the_page_has_the_place_of_the_table():
    page = tables.PAGE.read_text()
    written = tables.put(page, beside.BEGIN, "new")
    assert f"{beside.BEGIN}\n\nnew\n\n{tables.END}" in written and tables.put(written, beside.BEGIN, "new") == written
    assert written.endswith(page.partition(beside.BEGIN)[2].partition(tables.END)[2])
    with pytest.raises(ValueError, match="has no <!-- begin"):
        tables.put("a page", beside.BEGIN, "new")


def test_the_page_is_what_the_result_says():
    """Once there is one."""
    if not beside.RESULT.exists():
        pytest.skip("it has not been measured")
    page = tables.PAGE.read_text()
    assert tables.put(page, beside.BEGIN, beside.table(json.loads(beside.RESULT.read_text()))) == page
