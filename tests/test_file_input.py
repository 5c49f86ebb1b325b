"""Files that others wrote or replace: JSON as it may be, devices, results that another process puts in place."""

from __future__ import annotations

import json
import os

import pytest

from star_edge import batch
from star_edge.batch import Settings, Task, open_results, read_tasks
from star_edge.errors import ConfigError, EvaluationError, OutputError
from star_edge.evaluation.configs import OFF, file_configs
from star_edge.evaluation.results import Records
from star_edge.io import results_file
from star_edge.io.configs import load_config
from star_edge.io.json_input import MAX_DEPTH, parse_json
from star_edge.io.questions import Question, read_questions

SETTINGS = Settings(None)
DEEP, LONG = "[" * 100_000 + "]" * 100_000, "1" * 5_000

# ---- JSON ----


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_newlines_end_a_line_of_json(tmp_path, character):
    """JSON allows most of them in strings as they are; those that it does not are no line ends either."""
    path = tmp_path / "t.jsonl"
    text = json.dumps(
        {"image": "a.png", "prompt": f"one{character}line", "question": f"one{character}line"}, ensure_ascii=False
    )
    task = {"image": "a.png", "prompt": f"one{character}line"}
    path.write_text(
        json.dumps(task, ensure_ascii=False) + "\r\n\n" + json.dumps({**task, "prompt": "two"}) + "\n", encoding="utf-8"
    )
    assert [t.prompt for t in read_tasks(path, None, SETTINGS)] == [f"one{character}line", "two"]
    path.write_text(text, encoding="utf-8")
    [question] = read_questions(path)
    assert question.prompt == f"one{character}line"


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8-sig")
    assert read_tasks(tmp_path / "t.jsonl", None, SETTINGS)[0].prompt == "a"


@pytest.mark.parametrize(
    "value", [DEEP, DEEP.replace("[", '{"a":').replace("]", "}"), LONG, "[" * 70 + "]" * 70], ids=lambda v: v[:6]
)
def test_json_that_python_cannot_take_is_an_error_of_one_line(tmp_path, value):
    text = '{"prompt": "x", "image": "a.png", "id": ' + value + "}"
    paths = {
        name: tmp_path / name
        for name in ("tasks.jsonl", "eval.jsonl", "config.json", "configs.json", "out.jsonl", "results.jsonl")
    }
    for path in paths.values():
        path.write_text(text + "\n")
    header = json.dumps({"star_edge_eval": 1})
    paths["results.jsonl"].write_text(f"{header}\n{text}\n")
    reads = [
        (ConfigError, "line 1", lambda: read_tasks(paths["tasks.jsonl"], None, SETTINGS)),
        (EvaluationError, "line 1", lambda: read_questions(paths["eval.jsonl"])),
        (ConfigError, "config.json", lambda: load_config(str(paths["config.json"]))),
        (ConfigError, "configs.json", lambda: file_configs(paths["configs.json"])),
        (OutputError, "line 1", lambda: open_results(paths["out.jsonl"], [], "model")),
        (EvaluationError, "line 2", lambda: Records(str(paths["results.jsonl"]), {}, [], [OFF])),
    ]
    for kind, where, read in reads:
        with pytest.raises(kind, match=where) as caught:
            read()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and "set_int_max" not in str(caught.value)


def test_nesting_has_a_bound():
    assert parse_json("[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH)
    with pytest.raises(ValueError, match="nested"):
        parse_json("[" * (MAX_DEPTH + 1) + "1" + "]" * (MAX_DEPTH + 1))


# ---- files without an end ----


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no such device")
def test_reading_has_a_bound(monkeypatch):
    monkeypatch.setattr("star_edge.io.json_input.MAX_CHARACTERS", 1000)
    for kind, read in (
        (ConfigError, lambda: read_tasks("/dev/zero", None, SETTINGS)),
        (EvaluationError, lambda: read_questions("/dev/zero")),
        (ConfigError, lambda: load_config("/dev/zero")),
        (ConfigError, lambda: file_configs("/dev/zero")),
    ):
        with pytest.raises(kind, match="/dev/zero"):
            read()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
@pytest.mark.parametrize("device", ["/dev/full", "/dev/zero", "/dev/null"])
def test_results_go_into_files_alone(device):
    """Devices are neither read, which may have no end, nor replaced."""
    with pytest.raises(OutputError, match=f"{device} cannot be written"):
        open_results(device, [], "model", fresh=device == "/dev/null")
    with pytest.raises(EvaluationError, match=f"{device} cannot be written"):
        Records(device, {}, [], [])


def test_results_do_not_go_into_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="not a regular file"):
        open_results(tmp_path / "pipe", [], "model")


# ---- a file that is replaced ----


def replace_between(monkeypatch, path, text):
    """Another process puts its file in place after this one has opened the old one, and before it has the lock; as
    often as there are texts.
    """
    texts, flock = [text], results_file.fcntl.flock

    def late(file, how):
        if texts:
            beside = path.with_suffix(".other")
            beside.write_text(texts.pop())
            os.replace(beside, path)
        return flock(file, how)

    monkeypatch.setattr(results_file.fcntl, "flock", late)


def task(name):
    return Task(name, (), (), "x", SETTINGS)


def test_a_file_that_was_replaced_is_opened_again(tmp_path, monkeypatch):
    """What the other process wrote is seen and stays, and new lines are where everybody looks."""
    path = tmp_path / "out.jsonl"
    first = open_results(path, [task("a")], "model")
    first.add({"id": "a", "text": "1"})
    first.close()
    replace_between(monkeypatch, path, path.read_text())
    second = open_results(path, [task("a"), task("b")], "model")
    assert second.done == {("a",)}
    second.add({"id": "b", "text": "2"})
    second.close()
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_so_are_results_of_eval(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    Records(str(path), {"x": 1}, [], [OFF]).close()
    replace_between(monkeypatch, path, path.read_text())
    question = Question("q", (), (), "?")
    with Records(str(path), {"x": 1}, [question], [OFF]) as results:
        results.add(question, OFF, answer="half a pair: \ud800")
    with Records(str(path), {"x": 1}, [question], [OFF]) as results:
        assert results.done(question, OFF)


def test_two_at_once_are_told_apart(tmp_path):
    path = tmp_path / "out.jsonl"
    first = open_results(path, [], "model")
    with pytest.raises(OutputError, match="another run"):
        open_results(path, [], "model")
    first.close()
    open_results(path, [], "model").close()


def test_a_batch_warms_up_with_its_first_task_alone():
    class Engine:
        read, answered = [], []

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def read_prompt(self, prompt, images, prune, chat):
            self.read.append(prompt)

        def generate(self, prompt, *args, **options):
            self.answered.append(prompt)
            raise RuntimeError("no answer")

    tasks = [Task(i, (), (), prompt, SETTINGS) for i, prompt in enumerate("ab")]
    batch.run_tasks(tasks, Engine, lambda result: None, warm=True)
    assert (Engine.read, Engine.answered) == (["a"], ["a", "b"])


@pytest.mark.parametrize(
    "values", [{"windows": 5}, {"windows": None}, {"windows": {"a": 1}}, {"budget": ["image"]}, {"seed": "x"}]
)
def test_a_config_of_wrong_types_is_a_config_error(tmp_path, values):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"config": values}))
    with pytest.raises(ConfigError, match=next(iter(values))):
        load_config(str(path))
