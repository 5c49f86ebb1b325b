"""`star-edge eval` with the shipped model: what is recorded, resuming after a kill, refusals, and the command line."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from star_edge import PruneConfig, StarVLM, refvlm
from star_edge.errors import ConfigError
from star_edge.evaluation.configs import OFF, NamedConfig
from star_edge.evaluation.metrics import kl_divergence
from star_edge.evaluation.results import Records
from star_edge.evaluation.runner import ask_questions
from star_edge.io.questions import read_questions

FOLDER = Path(__file__).parent / "refvlm_questions"
COMMON = ("-n", "4", "-t", "1", "--image-root", str(FOLDER))
QUESTIONS = [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def ask(star_edge_here):
    """`star-edge eval` on the model's questions, answers of at most 4 tokens, with one thread: two wait for each other
    on a busy machine.
    """
    return lambda *args, status=0: star_edge_here("eval", *COMMON, *args, status=status)


def write(path, questions):
    path.write_text("".join(json.dumps(q) + "\n" for q in questions))
    return path


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def answers_of(path):
    """{(task, config): what does not depend on the clock}, and no pair twice."""
    records = lines_of(path)[1:]
    pairs = {(r["task"], r["config"]): {k: v for k, v in r.items() if not k.endswith("_ms")} for r in records}
    assert len(pairs) == len(records)
    return pairs


@pytest.fixture(scope="module")
def vlm():
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_threads=1) as engine:
        yield engine


# ---- what is recorded ----


def test_records_are_what_the_engine_says(vlm, tmp_path):
    write(tmp_path / "q.jsonl", [QUESTIONS[i] for i in (2, 3, 9)])
    tasks = read_questions(tmp_path / "q.jsonl", FOLDER)
    keep_all = NamedConfig("all", "m", PruneConfig(decoder_layer=2))
    hard = NamedConfig("hard", "m", PruneConfig(0.25, 0.0625, 2, representatives="none"))
    results = Records(None, {}, tasks, [OFF, keep_all, hard])
    ask_questions(vlm, tasks, [OFF, keep_all, hard], results, metric="exact", max_tokens=4)
    for task in tasks:
        off, same, other = (results.records[task.id, name] for name in ("off", "all", "hard"))
        logits = {c.name: vlm.read_prompt(task.prompt, task.sources, c.prune)[0].logits.copy() for c in (OFF, hard)}
        assert off["kl"] == same["kl"] == 0
        assert (
            other["kl"] == pytest.approx(kl_divergence(logits["off"], logits["hard"]), rel=1e-6) and other["kl"] > 1e-5
        )
        assert (off["average_tokens"], same["average_tokens"]) == (144, 144)
        assert other["average_tokens"] == (2 * 36 + 4 * 9) / 6 and other["image_tokens"] == 144
        for record, prune in ((off, None), (other, hard.prune)):
            answer = vlm.generate(task.prompt, task.sources, prune, 4)
            assert record["answer"] == answer.text and record["finish_reason"] == answer.finish_reason
            assert record["score"] == float(answer.text.strip() == task.answers[0])
        assert other["first_token_ms"] > 0 and other["unpruned_first_token_ms"] == off["first_token_ms"]


class Recorder:
    """Stands for an engine: notes what is asked."""

    def __init__(self, engine):
        self.engine, self.asked = engine, []
        self.image_limits, self.decoder = engine.image_limits, engine.decoder

    def generate(self, prompt, images, prune, *args, **options):
        self.asked.append((prompt, prune, [type(i) for i in images]))
        return self.engine.generate(prompt, images, prune, *args, **options)

    def read_prompt(self, prompt, images, prune):
        self.asked.append(("read", prune))
        return self.engine.read_prompt(prompt, images, prune)


def test_order_is_rotated_and_what_is_done_is_not_asked_again(vlm, tmp_path):
    write(tmp_path / "q.jsonl", QUESTIONS[:3])
    tasks = read_questions(tmp_path / "q.jsonl", FOLDER)
    configs = [OFF, *(NamedConfig(str(i), "m", PruneConfig(decoder_keep=i, decoder_layer=2)) for i in (10, 11))]
    off, a, b = (c.prune for c in configs)
    results = Records(None, {}, tasks, configs)
    done = []
    recorder = Recorder(vlm)
    run = lambda: ask_questions(
        recorder, tasks, configs, results, metric="exact", max_tokens=1, prompt_suffix="!", progress=done.append
    )
    run()
    assert recorder.asked[:3] == [("read", off), ("read", a), ("read", b)]  # each warms up
    assert [prune for _, prune, _ in recorder.asked[3:]] == [off, a, b, a, off, b, b, off, a]
    assert all(prompt.endswith("?!") and kinds == [np.ndarray] for prompt, _, kinds in recorder.asked[3:])
    assert sum(done) == 9
    first = dict(results.records)
    # One config is missing for one question: the unpruned prompt is read again for it, and nothing else
    del results.records["1", "11"]
    recorder.asked.clear(), done.clear()
    run()
    assert [entry[1] for entry in recorder.asked] == [off, a, b, off, b] and [
        entry[0] for entry in recorder.asked[:4]
    ] == ["read"] * 4
    assert sum(done) == 9 and results.records["1", "11"]["kl"] == first["1", "11"]["kl"]
    assert results.records["1", "11"]["unpruned_first_token_ms"] != first["1", "11"]["unpruned_first_token_ms"]
    recorder.asked.clear()
    run()
    assert not recorder.asked


def test_a_layer_that_the_model_lacks_ends_the_run_before_it_begins(vlm):
    with pytest.raises(ConfigError, match="1..5"):
        ask_questions(vlm, [], [NamedConfig("k", "m", PruneConfig(decoder_layer=6))], None, metric=None, max_tokens=1)


# ---- the command ----


def test_json_plot_and_tables(ask, tmp_path):
    write(tmp_path / "q.jsonl", QUESTIONS[:6])
    args = (
        "q.jsonl",
        "--vision-keep",
        "0.25,1.0",
        "--decoder-keep",
        "0.5,0.0625",
        "--set",
        "vision_share=0,0.5",
        "--out",
        "r.jsonl",
    )
    out, err = ask(*args, "--json")
    assert not err
    data = json.loads(out)
    assert [row["name"] for row in data["configs"]] == ["off"] + [
        f"vision {v} decoder {d} vision_share={m}"
        for v, d in ((0.25, 0.0625), (1.0, 0.5), (1.0, 0.0625))
        for m in (0.0, 0.5)
    ]
    assert len(data["notes"]) == 2 and "vision 0.25 decoder 0.5" in data["notes"][0]
    assert data["metric"] == "exact" and data["n_tasks"] == 6 and data["n_errors"] == 0
    off, hard = data["configs"][:2]
    assert (
        set(off["accuracy_by_category"]) == {q["family"] for q in QUESTIONS[:6]}
        and off["accuracy_by_category"]["color"] == 1
    )
    assert (
        off["relative_accuracy"] == off["agreement"] == off["speed_up"] == 1
        and off["kl"] == 0
        and off["difference"] is None
    )
    assert (
        hard["average_tokens"] == (4 * 36 + 2 * 9) / 6
        and hard["kl"] > 0
        and 0 <= hard["mcnemar_p"] <= 1
        and hard["interval"] is None
    )
    assert hard["config"]["vision_keep"] == 0.25 and hard["method"] == "vision 0.25 vision_share=0.0"
    # Everything is there: tables and pictures need no answer
    begun = Path("r.jsonl").read_bytes()
    pytest.importorskip("matplotlib")
    out, err = ask(*args, "--plot", "p.png")
    assert Path("r.jsonl").read_bytes() == begun
    for words in (
        "exact match in %: 6 questions, 1 images",
        "color",
        "vision 0.25 decoder 0.0625",
        "note: dropped",
        "written: p.png",
    ):
        assert words in out
    picture = Image.open("p.png")
    assert picture.width >= 1200 and len(picture.convert("RGB").resize((100, 50)).getcolors(10000)) > 5
    ask(*args, "--plot", "p.svg")
    svg = Path("p.svg").read_text()
    assert all(
        words in svg for words in ("unpruned", "exact match, %", "time to first token", "vision 0.25 vision_share=0.5")
    )


def test_without_answers_agreement_is_what_is_compared(ask, tmp_path):
    write(
        tmp_path / "q.jsonl",
        [{"image": q["image"], "text": q["question"], "question_id": q["id"]} for q in QUESTIONS[2:5]],
    )
    out, _ = ask("q.jsonl", "--preset", "balanced", "--plot", "p.svg")
    assert "same answer" in out and "exact match" not in out
    data = json.loads(ask("q.jsonl", "--preset", "balanced", "--json")[0])
    off, balanced = data["configs"]
    assert data["metric"] is None and off["accuracy"] is balanced["accuracy"] is balanced["mcnemar_p"] is None
    assert (
        balanced["agreement"] == 1
        and 0 < balanced["kl"] < 1
        and "same answer as unpruned, %" in Path("p.svg").read_text()
    )


def test_pope(ask, tmp_path):
    questions = [q for q in QUESTIONS if q["family"] == "exist"][:6]
    write(tmp_path / "q.jsonl", [{"image": q["image"], "text": q["question"], "label": q["answer"]} for q in questions])
    out, _ = ask("q.jsonl", "--preset", "quality")
    assert "POPE accuracy in %" in out and "yes ratio" in out
    data = json.loads(ask("q.jsonl", "--preset", "off", "--limit", 2, "--seed", 1, "--json")[0])
    assert data["n_tasks"] == 2 and [row["name"] for row in data["configs"]] == ["off"]
    data = json.loads(ask("q.jsonl", "--preset", "quality", "--json")[0])
    assert data["metric"] == "pope"
    pope = data["configs"][0]["pope"]
    assert pope["accuracy"] == data["configs"][0]["accuracy"] and pope["yes_ratio"] * 6 in range(7)


def test_a_broken_image_is_counted_and_the_run_goes_on(ask, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    broken = [{"image": str(tmp_path / "broken.png"), "question": "?", "answer": "x", "id": "bad"}]
    write(tmp_path / "q.jsonl", [QUESTIONS[2], *broken, QUESTIONS[3]])
    args = ("q.jsonl", "--preset", "fast", "--out", "r.jsonl")
    out, _ = ask(*args)
    assert "failed: question bad, off:" in out and "broken.png" in out
    errors = [r for r in lines_of("r.jsonl")[1:] if "error" in r]
    assert [(r["task"], r["config"]) for r in errors] == [("bad", "off"), ("bad", "fast")]
    data = json.loads(ask(*args, "--json")[0])
    assert [(row["n"], row["n_errors"]) for row in data["configs"]] == [(2, 1), (2, 1)] and data["n_errors"] == 2
    # Once it is there, the same command asks what failed, and only that
    n_lines = len(lines_of("r.jsonl"))
    (tmp_path / "broken.png").write_bytes((FOLDER / QUESTIONS[2]["image"]).read_bytes())
    data = json.loads(ask(*args, "--json")[0])
    assert data["n_errors"] == 0 and len(lines_of("r.jsonl")) == n_lines + 2
    write(tmp_path / "q.jsonl", [{"image": "nope.png", "question": "?"}])
    _, err = ask("q.jsonl", status=2)
    assert "no question could be answered" in err and "nope.png" in err and len(err.splitlines()) == 1


def test_a_config_that_fails_on_one_image_is_counted(vlm, tmp_path):
    """More tokens than a small context holds, unpruned only; and a count that is over the image's tokens."""
    write(tmp_path / "q.jsonl", [QUESTIONS[0], {**QUESTIONS[1], "image": "nope.png"}])
    tasks = read_questions(tmp_path / "q.jsonl", FOLDER)
    done = []
    configs = [OFF, NamedConfig("many", "m", PruneConfig(500)), NamedConfig("few", "m", PruneConfig(10))]
    results = Records(None, {}, tasks, configs)
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=100, n_threads=1) as small:
        ask_questions(small, tasks, configs, results, metric="exact", max_tokens=2, progress=done.append)
    assert sum(done) == 6 and all("nope.png" in results.records["1", c.name]["error"] for c in configs)
    off, many, few = (results.records["0", name] for name in ("off", "many", "few"))
    assert "context" in off["error"] and "144 tokens" in many["error"]
    assert few["answer"] and few["kl"] is None and few["unpruned_first_token_ms"] is None


def test_logits_that_are_no_numbers_are_an_error(vlm, tmp_path, monkeypatch):
    write(tmp_path / "q.jsonl", QUESTIONS[:1])
    tasks = read_questions(tmp_path / "q.jsonl", FOLDER)
    results = Records(None, {}, tasks, [OFF])

    def generate(prompt, images, prune, max_tokens, logits_processor):
        for processor in logits_processor:
            processor(None, np.float32([0, np.nan]))

    monkeypatch.setattr(vlm, "generate", generate)
    ask_questions(vlm, tasks, [OFF], results, metric="exact", max_tokens=1)
    assert "not all finite" in results.records["0", "off"]["error"]


# ---- resuming ----


# The command, which asks nothing more once the file has so many lines: however late the kill comes, it finds the run on
# its way
WAITS_FOR_THE_KILL = """
import signal
from pathlib import Path
from star_edge import StarVLM
from star_edge.cli import main

def generate(self, *args, _generate=StarVLM.generate, **options):
    path = Path({path!r})
    if path.exists() and path.read_bytes().count(b"\\n") >= {n_lines}:
        signal.pause()
    return _generate(self, *args, **options)

StarVLM.generate = generate
main()
"""


def test_a_killed_run_goes_on_where_it_stopped(ask, tmp_path):
    write(tmp_path / "q.jsonl", QUESTIONS[:12])
    args = ["eval", "q.jsonl", "--preset", "balanced", "--preset", "fast", *COMMON, "--out", "killed.jsonl"]
    path = tmp_path / "killed.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS_FOR_THE_KILL.format(path=str(path), n_lines=5), *args],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    begun = path.read_bytes()
    whole = begun[: begun.rfind(b"\n") + 1]
    assert 5 <= whole.count(b"\n") < 37
    path.write_bytes(whole + b'{"task": "3", "config": "ba')  # as if the kill had cut a line
    ask(*args[1:4], "--preset", "fast", "--out", "killed.jsonl")
    assert path.read_bytes().startswith(whole)
    ask(*args[1:4], "--preset", "fast", "--out", "straight.jsonl")
    assert answers_of("killed.jsonl") == answers_of("straight.jsonl") and len(answers_of("killed.jsonl")) == 36
    straight = lines_of("straight.jsonl")
    assert straight[0] == lines_of("killed.jsonl")[0]
    # More questions and another config extend the file
    write(tmp_path / "q.jsonl", QUESTIONS[:13])
    ask("q.jsonl", "--preset", "fast", "--preset", "quality", "--out", "straight.jsonl", "--limit", 13)
    assert lines_of("straight.jsonl")[: len(straight)] == straight and len(answers_of("straight.jsonl")) == 36 + 2 + 13


def test_results_of_something_else_are_refused(ask, tmp_path):
    write(tmp_path / "q.jsonl", QUESTIONS[:1])
    Path("c.json").write_text('[{"name": "mine", "vision_keep": 0.5}]')
    args = ("q.jsonl", "--configs", "c.json", "--out", "r.jsonl")
    ask(*args)
    begun = Path("r.jsonl").read_text()

    def refused(words, *args):
        before = Path(args[args.index("--out") + 1]).read_bytes()
        _, err = ask(*args, status=2)
        assert words in err and len(err.splitlines()) == 1, err
        assert Path(args[args.index("--out") + 1]).read_bytes() == before

    refused("--prompt-suffix '', and now it is '!'", *args, "--prompt-suffix", "!")
    refused("--max-tokens 4, and now it is 5", *args, "-n", 5)
    refused("--ubatch-size 512, and now it is 64", *args, "-ub", 64)
    Path("c.json").write_text('[{"name": "mine", "vision_keep": 0.25}]')
    refused("config 'mine' has changed", *args)
    Path("c.json").write_text('[{"name": "mine", "vision_keep": 0.5}]')
    write(tmp_path / "q.jsonl", [{**QUESTIONS[0], "answer": "maybe"}])
    refused("made with metric 'pope', and now it is 'exact'", *args)
    write(tmp_path / "q.jsonl", [{**QUESTIONS[0], "question": "is there a red star?"}])
    refused("question '0' (image, question or answer) has changed", *args)
    write(tmp_path / "q.jsonl", QUESTIONS[:1])
    header, *rest = begun.splitlines(keepends=True)
    other = {**json.loads(header), "model": "0123456789abcdef"}
    Path("r.jsonl").write_text(json.dumps(other) + "\n" + "".join(rest))
    refused("made with model '0123456789abcdef'", *args)
    Path("r.jsonl").write_text(header + "garbage\n" + "".join(rest))
    refused("line 2 is not a result", *args)
    # A file of another kind is never overwritten, even with --fresh
    for option in ((), ("--fresh",)):
        refused("not a results file", "q.jsonl", "--out", "q.jsonl", *option)
    Path("r.jsonl").write_text(begun)
    ask(*args, "--fresh", "--prompt-suffix", r"\nOne word.")
    assert lines_of("r.jsonl")[0]["prompt_suffix"] == "\nOne word." and len(lines_of("r.jsonl")) == 3


def test_two_runs_do_not_share_a_file(ask, tmp_path):
    pytest.importorskip("fcntl")
    write(tmp_path / "q.jsonl", QUESTIONS[:1])
    with Records("r.jsonl", {"a": 1}, [], []):
        _, err = ask("q.jsonl", "--out", "r.jsonl", status=2)
        assert "in use by another run" in err


def test_a_record_is_in_the_file_before_add_returns(tmp_path):
    task = read_questions(write(tmp_path / "q.jsonl", QUESTIONS[:1]))[0]
    path = str(tmp_path / "r.jsonl")
    with Records(path, {"a": 1}, [task], [OFF]) as results:
        results.add(task, OFF, answer="\u00e4\u2028")
        assert lines_of(path)[1]["answer"] == "\u00e4\u2028" and not results.done(task, NamedConfig("other", "m", None))
    with Records(path, {"a": 1}, [task], [OFF]) as results:
        assert results.done(task, OFF)


def test_a_header_cut_short_is_written_again(tmp_path):
    path = str(tmp_path / "r.jsonl")
    Records(path, {"a": 1}, [], []).close()
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:12])
    Records(path, {"a": 1}, [], []).close()
    assert Path(path).read_bytes() == whole


# ---- errors ----


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["TASKS is missing", '"image"']),
        (["nope.jsonl"], ["nope.jsonl"]),
        (["q.jsonl", "--preset", "zzz"], ["zzz", "balanced"]),
        (["q.jsonl", "--set", "nope=1"], ["nope", "vision_share"]),
        (["q.jsonl", "--set", "vision_share"], ["FIELD=VALUE"]),
        (["q.jsonl", "--set", "vision_share=2"], ["vision_share=2"]),
        (["q.jsonl", "--vision-keep", "half"], ["--vision-keep 'half'"]),
        (["q.jsonl", "--vision-keep", "0.25", "--decoder-keep", "0.5"], ["--decoder-keep 0.5"]),
        (["q.jsonl", "--configs", "no.json"], ["no.json"]),
        (["q.jsonl", "--metric", "vqa"], ["vqa", "10"]),
        (["q.jsonl", "--metric", "bleu"], ["bleu"]),
        (["q.jsonl", "--preset", "off", "--set", "vision_share=x"], ["vision_share='x'"]),
        (["q.jsonl", "--seed", "1"], ["--limit"]),
        (["q.jsonl", "--fresh"], ["--out"]),
        (["q.jsonl", "--plot", "p.pdf"], [".svg"]),
        (["q.jsonl", "--plot", "no/such/p.png"], ["no/such"]),
        (["q.jsonl", "--out", "no/such/r.jsonl"], ["no/such/r.jsonl"]),
        (["q.jsonl", "--decoder-layer", "6"], ["1..5"]),
        (["q.jsonl", "--image-root", "no"], ["image root no"]),
        (["q.jsonl", "-m", "/nope.gguf"], ["/nope.gguf"]),
    ],
    ids=lambda value: " ".join(value)[:40].replace("/", "_") if isinstance(value, list) else "",
)
def test_errors_are_one_line_with_status_2(star_edge_here, tmp_path, args, words):
    write(tmp_path / "q.jsonl", [{"image": str(FOLDER / "0000.png"), "question": "?", "answer": "x"}])
    _, err = star_edge_here("eval", *args, status=2)
    assert len(err.splitlines()) == 1 and err.startswith("error: "), err
    assert all(word in err for word in words), err
    assert not (tmp_path / "p.png").exists()


def test_without_matplotlib(star_edge_here, tmp_path, monkeypatch):
    write(tmp_path / "q.jsonl", QUESTIONS[:1])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, err = star_edge_here("eval", "q.jsonl", "--plot", "p.png", status=2)
    assert "star-edge[plot]" in err
