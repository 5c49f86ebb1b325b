"""One reader of question files and one file of results for `run`, `eval` and `tune`; files that 0.1.0 wrote."""

import json
import os

import pytest

from star_edge import PruneConfig
from star_edge.batch import Settings, Task, open_results, read_tasks
from star_edge.errors import ConfigError, EvaluationError, InputFileError, OutputError, ResultsFileError
from star_edge.evaluation.configs import OFF, NamedConfig
from star_edge.evaluation.results import Records
from star_edge.io.fingerprints import changed_fields, fingerprint
from star_edge.io.questions import read_questions

HALF = NamedConfig("half", "half", PruneConfig(0.5))
HEADER = {"model": "m", "mmproj": None}
QUESTIONS = [
    {"image": "a.png", "question": "what?", "answer": "\u00e4", "id": 7},
    {"image": ["b.png", "c.png"], "text": "is it?", "label": "yes"},
]


@pytest.fixture
def questions(tmp_path):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return read_questions(tmp_path / "q.jsonl")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "r.jsonl"


def task(name, prompt="p"):
    return Task(name, (), (), prompt, Settings(PruneConfig(0.5)))


# ---- files of 0.1.0 (commit 44aefa5 wrote these lines) ----

OF_EVAL = (
    b'{"star_edge_eval": 1, "model": "m", "mmproj": null}\n'
    b'{"task": "7", "config": "off", "task_fingerprint": "cfbbaf69e9eb5911", "config_fingerprint": "d6f6f9298bb96ab0",'
    b' "answer": "half \xed\xa0\x80 \xc3\xa4", "score": 1.0}\n'
    b'{"task": "7", "config": "half", "task_fingerprint": "cfbbaf69e9eb5911", "config_fingerprint": "e3df4225de142ec2",'
    b' "error": "broken"}\n'
    b'{"task": "2", "config": "half", "task_fingerprint": "8651af7507c5a4e3", "config_fingerprint": "e3df4225de142ec2",'
    b' "answer": "yes", "score": 1.0}\n'
)
OF_RUN = (
    b'{"id": "a", "image": "a.png", "prompt": "p", "text": "\\u00e4", "model": "m.gguf#7c0b6eb3", '
    b'"task": "12ebec5d8dd9b5fa"}\n'
)


def test_results_of_eval_from_before_are_gone_on_with(path, questions):
    path.write_bytes(OF_EVAL)
    seven = questions[0]
    with Records(str(path), HEADER, questions, [OFF, HALF]) as results:
        assert results.records["7", "off"]["answer"] == "half \ud800 \u00e4"
        done = {(q.id, c.name) for q in questions for c in (OFF, HALF) if results.done(q, c)}
        assert done == {("7", "off"), ("2", "half")}
        results.add(seven, HALF, answer="x")
    assert path.read_bytes().startswith(OF_EVAL) and path.read_bytes().count(b"\n") == 5
    with Records(str(path), HEADER, questions, [OFF, HALF]) as results:
        assert results.done(seven, HALF) and results.records["7", "half"]["answer"] == "x"


def test_results_of_run_from_before_are_refused_with_the_reason(path):
    path.write_bytes(OF_RUN)
    with pytest.raises(ResultsFileError, match=r"r\.jsonl was written by an earlier version .*another --out.*--fresh"):
        open_results(path, [task("a")], "m.gguf#0123456789abcdef")
    assert path.read_bytes() == OF_RUN
    results = open_results(path, [task("a")], "m.gguf#0123456789abcdef", fresh=True)
    results.add({"id": "a", "text": "new"})
    results.close()
    assert json.loads(path.read_text())["text"] == "new"


# ---- one file of results ----


def test_each_command_refuses_the_results_of_the_other(path, questions):
    path.write_bytes(OF_EVAL)
    with pytest.raises(OutputError, match=r"line 1 is not a result of star-edge.*--out"):
        open_results(path, [task("a")], "m")
    path.write_bytes(OF_RUN)
    with pytest.raises(EvaluationError, match=r"not a results file of star-edge eval.*--out"):
        Records(str(path), HEADER, questions, [OFF], fresh=True)
    assert path.read_bytes() == OF_RUN


def test_fresh_drops_nothing_before_there_is_something_new(path, questions):
    path.write_bytes(OF_EVAL)
    other = {**HEADER, "model": "other"}
    Records(str(path), other, questions, [OFF], fresh=True).close()
    assert path.read_bytes() == OF_EVAL
    with Records(str(path), other, questions, [OFF], fresh=True) as results:
        assert not results.records
        results.add(questions[0], OFF, answer="new")
    header, line = map(json.loads, path.read_text().splitlines())
    assert header == {"star_edge_eval": 1, **other} and line["answer"] == "new"


@pytest.mark.parametrize("end", range(len(OF_EVAL) - 60, len(OF_EVAL) + 1, 7))
def test_a_line_of_eval_cut_off_anywhere_is_dropped_or_whole(path, questions, end):
    path.write_bytes(OF_EVAL[:end])
    with Records(str(path), HEADER, questions, [OFF, HALF]) as results:
        whole = results.done(questions[1], HALF)
    assert whole == (end >= len(OF_EVAL) - 1)
    lines = OF_EVAL.splitlines(keepends=True)
    assert path.read_bytes() == b"".join(lines if whole else lines[:-1])


def test_what_others_appended_is_not_cut_off(path, questions):
    path.write_bytes(OF_EVAL + b"my notes")
    with pytest.raises(ResultsFileError, match="line 5 is not a result"):
        Records(str(path), HEADER, questions, [OFF, HALF])
    assert path.read_bytes() == OF_EVAL + b"my notes"


def test_a_write_that_takes_a_part_is_gone_on_with(path):
    """An unbuffered write may do so: a signal, a full disk, a network file system."""
    results = open_results(path, [task("a")], "m")

    class Slow:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:5])

        def close(self):
            self.file.close()

    results._file = Slow(results._file)
    results.add({"id": "a", "text": "x" * 100})
    results.close()
    assert json.loads(path.read_text())["text"] == "x" * 100


def test_a_failure_after_an_answer_is_asked_again(path, questions):
    """Of the lines about one pair the last holds."""
    with Records(str(path), HEADER, questions, [OFF]) as results:
        results.add(questions[0], OFF, answer="x")
        results.add(questions[0], OFF, error="gone")
        assert not results.done(questions[0], OFF)
    with Records(str(path), HEADER, questions, [OFF]) as results:
        assert not results.done(questions[0], OFF)


def test_a_link_stays_a_link(tmp_path, path):
    """Though the file is replaced, since a failure goes."""
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    for results in ({"id": "a", "error": "x"}, {"id": "b", "text": "x"}), ({"id": "a", "text": "x"},):
        file = open_results(link, [task("a"), task("b")], "m")
        for result in results:
            file.add(result)
        file.close()
    assert link.is_symlink() and [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["b", "a"]


# ---- one reader of questions ----


def test_a_file_of_questions_is_one_of_tasks_too(tmp_path, questions):
    first = json.dumps(QUESTIONS[0]) + "\n"
    (tmp_path / "q.jsonl").write_text(first + '{"images": ["b.png", "c.png"], "text": "is it?", "label": "yes"}\n')
    one, two = read_tasks(tmp_path / "q.jsonl", None, Settings(None))
    assert (one.id, one.prompt, one.images) == (7, "what?", ("a.png",)) and two.id == two.key
    assert [t.sources for t in (one, two)] == [q.sources for q in questions]
    assert [t.prompt for t in (one, two)] == [q.prompt for q in read_questions(tmp_path / "q.jsonl")]
    assert one.sources == (str(tmp_path / "a.png"),)


def test_paths_are_absolute(tmp_path, monkeypatch, questions):
    monkeypatch.chdir(tmp_path)
    assert read_questions("q.jsonl") == questions
    assert questions[0].sources == (os.path.join(str(tmp_path), "a.png"),) and questions[0].images == ("a.png",)


def test_errors_of_question_files_have_one_type(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"prompt": "x", "id": 1}\n{"prompt": "x", "id": "1"}\n')
    for read in (lambda path: read_tasks(path, None, Settings(None)), read_questions):
        with pytest.raises(InputFileError, match=r"q\.jsonl, line [12]") as caught:
            read(tmp_path / "q.jsonl")
        assert isinstance(caught.value, ConfigError) and isinstance(caught.value, EvaluationError)


@pytest.mark.parametrize("image", ["", ["a.png", ""], 5, ["a.png", 5], [["a.png"]]])
def test_what_names_no_image(tmp_path, image):
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": image, "question": "x"}) + "\n")
    with pytest.raises(InputFileError, match=r"line 1 .*image"):
        read_questions(tmp_path / "q.jsonl")


# ---- fingerprints ----


def test_a_field_that_is_added_later_changes_no_fingerprint():
    """Defaults do not count, so a new field at its default does not."""
    assert changed_fields(PruneConfig()) == {} and changed_fields(PruneConfig(0.5)) == {"vision_keep": 0.5}
    tasks = [task("a"), Task("a", (), (), "p", Settings(None)), Task("a", (), (), "p", Settings(PruneConfig()))]
    assert len({t.key for t in tasks}) == 3
    first = {"decoder_scorer": "text", "decoder_share": 0.5, "seen_below": False}
    assert changed_fields(PruneConfig(decoder_keep=0.5, **first)) == {"decoder_keep": 0.5}
    assert set(changed_fields(PruneConfig(decoder_keep=0.5))) == {"decoder_keep", *first}  # defaults that have changed
    assert fingerprint([(), "p"]) == fingerprint([[], "p"]) != fingerprint([[], "q"])
