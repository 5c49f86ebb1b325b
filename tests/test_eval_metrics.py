"""What `star-edge eval` computes from answers alone: metrics, statistics, questions and configs. No model runs."""

import json
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from star_edge import PRESETS, PruneConfig
from star_edge.errors import ConfigError, EvaluationError
from star_edge.evaluation import configs as configs_module
from star_edge.evaluation.configs import choose_configs, file_configs, parse_values
from star_edge.evaluation.metrics import (
    PopeScores,
    choose_metric,
    exact_match,
    kl_divergence,
    normalise_vqa,
    pope_match,
    pope_scores,
    same_answer,
    says_yes,
    vqa_accuracy,
)
from star_edge.evaluation.statistics import mcnemar_p, mean_interval, sign_counts
from star_edge.evaluation.summary import summarise
from star_edge.io.fingerprints import fingerprint_file
from star_edge.io.questions import read_questions, sample_questions

# ---- metrics ----


@pytest.mark.parametrize(
    ("answer", "truths", "score"),
    [
        (" Red.\n", ["red"], 1),
        ('"Dark  Red"', ["dark red"], 1),
        ("red", ["blue", "Red!"], 1),
        ("dark red", ["red"], 0),
        ("2.5", ["25"], 0),  # punctuation within a word stays
        ("", ["red"], 0),
        ("", ["?"], 0),
    ],
)
def test_exact_match(answer, truths, score):
    assert exact_match(answer, truths) == score
    assert same_answer(answer, truths[-1]) is bool(score)


def test_vqa_accuracy_by_number_of_people():
    """The challenge's page gives min(k / 3, 1) averaged over the ten choices of nine people: for k = 2 that is
    (2 x 1/3 + 8 x 2/3) / 10 = 0.6."""
    for k, expected in enumerate((0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1)):
        truths = ["Two cats"] * k + [f"other {i}" for i in range(10 - k)]
        assert vqa_accuracy("the 2 cats.", truths) == pytest.approx(expected, abs=1e-12), k


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat", "cat"),
        ("a man and an apple", "man and apple"),
        ("none", "0"),
        ("Ten", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("Couldn'tve", "couldn't've"),
        ("she'd", "she'd"),
        ("1,000", "1000"),  # a comma between digits: every mark goes for nothing
        ("1,000-x", "1000x"),
        ("black-white", "black white"),
        ("black- white", "black white"),
        ("black -white/grey", "black white grey"),  # "/" has no space beside it, so it becomes one
        ("yes!", "yes"),
        ("2.5 m.", "2.5 m"),
        ("U.S.A.", "usa"),
        ("9:30", "9:30"),
        ("red\nand\tblue", "red and blue"),
    ],
)
def test_vqa_normalisation(text, expected):
    assert normalise_vqa(text) == expected


def test_pope():
    said = {
        "Yes, there is.": True,
        "No": False,
        "No, there is not.": False,
        "there is not a cat": False,
        "Yes. There is no dog": True,
        "NO\n": False,
        "Nothing": True,
        "": True,
    }
    assert {text: says_yes(text) for text in said} == said
    assert pope_match("No, none.", ["no"]) == 1 and pope_match("no", ["Yes"]) == 0
    # TP 3, FN 1, FP 2, TN 4
    answers = ["yes"] * 3 + ["no"] + ["yes"] * 2 + ["no"] * 4
    labels = ["yes"] * 4 + ["no"] * 6
    assert pope_scores(answers, labels) == PopeScores(
        accuracy=7 / 10, precision=3 / 5, recall=3 / 4, f1=2 / 3, yes_ratio=1 / 2
    )
    assert pope_scores(["no"], ["no"]) == PopeScores(1.0, None, None, None, 0.0)


def test_kl_divergence():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.8, 0.1, 0.1])
    expected = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.25 / 0.1)  # 0.223; the other way round it is 0.193
    assert kl_divergence(np.log(p) + 7, np.log(q) - 100) == pytest.approx(expected, abs=1e-12)
    assert kl_divergence(np.float32([900, 901]), np.float32([-901, -900])) == 0
    assert kl_divergence(np.float32([0, -2000]), np.float32([-2000, 0])) == pytest.approx(2000)


# ---- statistics ----


def test_mcnemar():
    assert mcnemar_p(0, 0) == mcnemar_p(5, 5) == 1
    assert mcnemar_p(0, 5) == 2 / 32
    assert mcnemar_p(1, 9) == mcnemar_p(9, 1) == 2 * 11 / 1024
    # The approval ratings of Agresti's table 10.1: 86 and 150 changed their minds; R's exact2x2 prints 3.716e-05
    assert mcnemar_p(86, 150) == pytest.approx(3.716e-05, rel=1e-4)
    big = Fraction(2 * sum(math.comb(6100, i) for i in range(3001)), 2**6100)
    assert mcnemar_p(3000, 3100) == float(big)
    assert sign_counts([1, 1, 0, 0, 0.6], [0, 1, 1, 0, 0.3]) == (2, 1)


def test_bootstrap():
    rng = np.random.default_rng(1)
    values = rng.standard_normal(400) + 0.3
    half = 1.96 * values.std() / 20
    low, high = mean_interval(values, range(400))
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half) and high == pytest.approx(
        values.mean() + half, abs=0.1 * half
    )
    assert mean_interval(values, range(400)) == (low, high)
    assert mean_interval(values, range(400), seed=1) != (low, high)
    # Four questions that are right or wrong together tell no more than one
    together = mean_interval(np.repeat(values, 4), np.repeat(np.arange(400), 4))
    assert together == pytest.approx((low, high), abs=1e-12)
    apart_low, apart_high = mean_interval(np.repeat(values, 4), range(1600))
    assert apart_high - apart_low == pytest.approx((high - low) / 2, rel=0.15)
    assert mean_interval([1.0, 0.0], ["a", "a"]) is None
    # Clusters of unequal size: both, one or the other come in 1/2, 1/4 and 1/4 of the resamples, and the mean is over
    # questions
    uneven = [1.0] * 9 + [0.0], ["a"] * 9 + ["b"]
    assert mean_interval(*uneven) == (0, 1) and mean_interval(*uneven, level=1e-9) == pytest.approx((0.9, 0.9))


# ---- summary ----


def test_summary(tmp_path):
    """Four questions about two images; the third fails unpruned, the fourth has no answer."""
    lines = [{"image": "a.png", "question": str(i), "answer": "x", "category": "ab"[i % 2]} for i in range(3)]
    lines.append({"image": "b.png", "question": "3"})
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    tasks = read_questions(tmp_path / "t.jsonl")
    configs, _ = choose_configs(["fast"])
    common = {"kl": 0.5, "average_tokens": 10.0, "notes": ["n"]}
    answers = {"off": ["x", "x", None, "z"], "fast": ["x", "y", "x", "Z."]}
    records = {}
    for name, texts in answers.items():
        for i, (task, text) in enumerate(zip(tasks, texts)):
            ms = {"first_token_ms": 100.0 if name == "off" else 10.0 * (i + 1), "unpruned_first_token_ms": 100.0}
            score = None if not task.answers else float(text == "x")
            records[task.id, name] = {"answer": text, "score": score, **common, **ms} if text else {"error": "e"}
            records[task.id, name] |= {"task": task.id, "config": name}
    summary = summarise(tasks, configs, records, "exact")
    off, fast = summary["configs"]
    assert (
        summary["n_errors"] == 1
        and summary["errors"] == [{"task": "3", "config": "off", "error": "e"}]
        and summary["n_images"] == 2
    )
    assert (off["n"], off["n_errors"], off["n_scored"], off["accuracy"], off["difference"]) == (3, 1, 2, 1, None)
    assert (fast["n"], fast["n_scored"], fast["accuracy"]) == (4, 3, 2 / 3)
    assert fast["accuracy_by_category"] == {"a": 1.0, "b": 0.0}
    assert fast["relative_accuracy"] == 0.5 and fast["difference"] == -0.5  # over the two that both have
    assert fast["agreement"] == 2 / 3 and fast["kl"] == 0.5 and fast["mcnemar_p"] == 1 and fast["interval"] is None
    assert fast["first_token_ms"] == 25 and fast["speed_up"] == (5 + 10 / 3) / 2 and fast["notes"] == {"n": 4}
    json.dumps(summary, allow_nan=False)


# ---- questions ----


def write(tmp_path, *lines):
    path = tmp_path / "q.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def test_read_tasks_of_each_kind(tmp_path):
    path = write(
        tmp_path,
        {"image": "a.png", "question": "what?", "answer": "cat", "family": "f", "id": "own"},
        "",
        {"question_id": 7, "image": "COCO_1.jpg", "text": "Is there a dog?", "label": "yes"},
        {"question_id": 8, "image": "b.jpg", "text": "Describe it.", "category": "detail"},
        {"question_id": 9, "image": "c.jpg", "question": "how many?", "answers": ["2"] * 6 + [{"answer": "two"}] * 4},
        {
            "images": ["https://x.org/a.png", "/abs/b.png", "data:image/png;base64,AA"],
            "prompt": "line\u2028two",
            "answer": 3,
        },
    )
    own, pope, llava, vqa, several = read_questions(path)
    assert (
        own.id == "own"
        and own.answers == ("cat",)
        and own.category == "f"
        and own.sources == (str(tmp_path / "a.png"),)
    )
    assert (pope.id, pope.prompt, pope.answers) == ("7", "Is there a dog?", ("yes",))
    assert (llava.prompt, llava.answers, llava.category) == ("Describe it.", (), "detail")
    assert vqa.answers == ("2",) * 6 + ("two",) * 4
    assert several.images == ("https://x.org/a.png", "/abs/b.png", "data:image/png;base64,AA")
    assert several.id == "6" and several.prompt == "line\u2028two" and several.answers == ("3",)
    (tmp_path / "root").mkdir()
    assert read_questions(path, tmp_path / "root")[0].sources == (str(tmp_path / "root" / "a.png"),)
    assert read_questions(path, tmp_path / "root")[0].fingerprint == own.fingerprint
    q = {"image": "a", "question": "b", "answer": "c"}
    changed = [q, {**q, "image": "x"}, {**q, "question": "x"}, {**q, "answer": "x"}, {**q, "category": "x"}]
    prints = [t.fingerprint for t in read_questions(write(tmp_path, *changed))]
    assert len(set(prints)) == 4 and prints[0] == prints[4]  # a category changes no answer


def test_metric_is_chosen_by_the_answers(tmp_path):
    q = {"image": "a.png", "question": "?"}
    vqa, yes, no = {**q, "answers": ["a"] * 10}, {**q, "answer": "Yes."}, {**q, "answer": "no"}
    choose = lambda *lines, metric="auto": choose_metric(metric, read_questions(write(tmp_path, *lines)))
    assert choose(vqa) == "vqa" and choose(vqa, q) == "vqa" and choose(yes, no) == "pope" and choose(q) is None
    assert (
        choose(yes, vqa) == "exact"
        and choose({**q, "answer": "red"}) == "exact"
        and choose({**q, "answers": ["a", "b"]}) == "exact"
    )
    assert choose(yes, metric="exact") == "exact"
    for lines, metric, words in (
        ([q], "exact", "needs answers"),
        ([vqa, {**yes, "id": "odd"}], "vqa", "'odd'"),
        ([yes, {**q, "answer": "red"}], "pope", "['red']"),
    ):
        with pytest.raises(EvaluationError, match="metric") as caught:
            choose(*lines, metric=metric)
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["{nope"], "line 1 is not valid JSON"),
        (["[]"], "line 1 is a list"),
        ([{"image": "a", "question": "b"}, {"question": "b"}], "line 2 names no image"),
        ([{"image": [], "question": "b"}], "names no image"),
        ([{"image": "a"}], "has no question"),
        ([{"image": "a", "question": " "}], "has no question"),
        ([{"image": "a", "question": "b", "answer": [["x"]]}], "answer that is a list"),
        ([{"image": "a", "question": "b", "id": 1.5}], "the id 1.5"),
        (
            [{"image": "a", "question": "b", "id": 1}, {"image": "a", "question": "b", "id": "1"}],
            "lines 1 and 2 have the same id",
        ),
        ([""], "has no questions"),
    ],
)
def test_broken_questions_name_the_line(tmp_path, lines, words):
    with pytest.raises(EvaluationError, match="q.jsonl") as caught:
        read_questions(write(tmp_path, *lines))
    assert words in str(caught.value) and caught.value.remedy


def test_unreadable_questions(tmp_path):
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for path, root, words in (
        ("nope.jsonl", None, "No such file"),
        (".", None, "directory"),
        ("binary.jsonl", None, "UTF-8"),
        ("binary.jsonl", tmp_path / "no", "not a folder"),
    ):
        with pytest.raises(EvaluationError, match=words):
            read_questions(tmp_path / path, root)


def test_sampling(tmp_path):
    tasks = read_questions(write(tmp_path, *({"image": "a", "question": str(i)} for i in range(20))))
    assert sample_questions(tasks, None, None) == sample_questions(tasks, 99, 1) == tasks
    assert sample_questions(tasks, 5, None) == tasks[:5]
    chosen = sample_questions(tasks, 5, 1)
    assert chosen == sample_questions(tasks, 5, 1) != sample_questions(tasks, 5, 2)
    assert [int(t.prompt) for t in chosen] == sorted({int(t.prompt) for t in chosen}) != [0, 1, 2, 3, 4]


def test_fingerprint_of_a_file(tmp_path):
    path = tmp_path / "m.gguf"
    data = bytearray(np.random.default_rng(0).bytes(3_000_000))
    path.write_bytes(data)
    first = fingerprint_file(path)
    (tmp_path / "copy.gguf").write_bytes(data)
    assert fingerprint_file(tmp_path / "copy.gguf") == first
    for place in (0, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert fingerprint_file(path) != first
    path.write_bytes(data + b"x")
    assert fingerprint_file(path) != first
    sizes = set()  # all pieces of these are the same
    for n in (100_000, 100_001):
        path.write_bytes(bytes(n))
        sizes.add(fingerprint_file(path))
    assert len(sizes) == 2
    path.write_bytes(b"short")
    assert len(fingerprint_file(path)) == 16
    with pytest.raises(EvaluationError, match="no.gguf"):
        fingerprint_file(tmp_path / "no.gguf")


# ---- configs ----


def test_values_have_the_type_of_their_field(monkeypatch):
    assert parse_values("vision_keep", "0.5, 144,1.0") == [0.5, 144, 1.0]
    assert [type(v) for v in parse_values("vision_keep", "0.5,144,1.0")] == [float, int, float]
    assert parse_values("decoder_layer", "2,none") == [2, None]
    assert parse_values("positions", "original,renumbered") == ["original", "renumbered"]
    assert [type(v) for v in parse_values("vision_share", "0,0.5")] == [float, float]
    # Kinds of field that PruneConfig may have
    more = {"flag": bool, "word": str | None, "windows": tuple[tuple[int, float], ...]}
    monkeypatch.setattr(configs_module, "_HINTS", {**configs_module._HINTS, **more})
    assert parse_values("flag", "true,False") == [True, False]
    assert parse_values("word", "a,none") == ["a", None]
    assert parse_values("windows", "[[2,0.5],[4,0.25]],[]") == [((2, 0.5), (4, 0.25)), ()]
    for field, text, words in (
        ("nope", "1", "vision_keep"),
        ("decoder_layer", "2.5", "a whole number or none"),
        ("vision_share", "much", "a number"),
        ("positions", "some", "original or renumbered"),
        ("vision_keep", "0.5,,1", "empty"),
        ("flag", "1", "true or false"),
        ("windows", "[1", "JSON"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_values(field, text)
        assert words in str(caught.value)


def test_presets_are_run_unless_others_are_named():
    configs, notes = choose_configs()
    assert [c.name for c in configs] == ["off", "quality", "balanced", "fast"] and not notes
    assert configs[0].prune is None and len({c.method for c in configs[1:]}) == 1
    configs, _ = choose_configs(["fast", "off", "fast"], sets={"vision_share": [0.0, 0.5]})
    assert [(c.name, c.method) for c in configs[1:]] == [
        ("fast vision_share=0.0", "vision_share=0.0"),
        ("fast vision_share=0.5", "vision_share=0.5"),
    ]
    assert configs[1].prune == replace(PRESETS["fast"], vision_share=0.0)
    with pytest.raises(ConfigError, match="zzz"):
        choose_configs(["zzz"])


def test_grid():
    configs, notes = choose_configs(
        budget={"vision_keep": [0.5, 0.25], "decoder_keep": [0.5, 0.125]},
        sets={"positions": ["original", "renumbered"]},
    )
    assert [c.name for c in configs] == ["off"] + [
        f"vision {v} decoder {d} positions={rows}"
        for v, d, rows in [
            (v, d, p) for v, d in ((0.5, 0.5), (0.5, 0.125), (0.25, 0.125)) for p in ("original", "renumbered")
        ]
    ]
    assert configs[-1].prune == PruneConfig(0.25, 0.125, positions="renumbered")
    assert configs[-1].method == "vision 0.25 positions=renumbered"  # a line runs along decoder_keep
    assert len(notes) == 2 and notes[0].startswith(
        "dropped vision 0.25 decoder 0.5 positions=original: decoder_keep=0.5 is more than"
    )
    configs, _ = choose_configs(["fast"], {"vision_keep": [0.5, 0.25]})
    assert [(c.name, c.method) for c in configs[1:]] == [
        ("fast", "presets"),
        ("vision 0.5", "grid"),
        ("vision 0.25", "grid"),
    ]
    configs, _ = choose_configs(budget={"decoder_keep": [0.5], "decoder_layer": [2, 3]})
    assert [c.method for c in configs[1:]] == ["grid", "grid"] and configs[1].prune.decoder_layer == 2


def test_configs_from_a_file(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('[{"name": "a", "method": "m", "vision_keep": 0.5}, {"name": "b", "decoder_keep": 9}]')
    configs, _ = choose_configs(file=path)
    assert [(c.name, c.method, c.prune) for c in configs[1:]] == [
        ("a", "m", PruneConfig(0.5)),
        ("b", "b", PruneConfig(1.0, 9)),
    ]
    for text, words in (
        ("nope", "not valid JSON"),
        ('{"name": "a"}', "not a list"),
        ('[{"vision_keep": 1}]', "with a name"),
        ('[{"name": "a", "keep": 1}]', "'a' has unknown fields: keep"),
        ('[{"name": "a", "vision_keep": 0}]', "'a': vision_keep=0"),
        ('[{"name": "a", "vision_keep": 0.5}, {"name": "a", "vision_keep": 0.25}]', "two configs have the name 'a'"),
        ('[{"name": "off", "vision_keep": 0.5}]', "two configs have the name 'off'"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            choose_configs(file=path)
        assert words in str(caught.value) and caught.value.remedy
    with pytest.raises(ConfigError, match="cannot be read"):
        file_configs(tmp_path / "no.json")
    path.write_text('[{"name": "a", "vision_keep": 0.5}]')
    with pytest.raises(ConfigError, match="--set"):
        choose_configs(sets={"vision_share": [0.5]}, file=path)


def test_fingerprint_of_a_config():
    prints = [c.fingerprint for c in choose_configs(["off", "fast", "balanced"])[0]]
    assert len(set(prints)) == 3
    assert prints == [c.fingerprint for c in choose_configs(["off", "fast", "balanced"])[0]]
