"""star-edge tune: the search, the split, and the file that run and Python take."""

import json
from pathlib import Path

import pytest

from star_edge import PRESETS, PruneConfig, StarVLM, errors, refvlm
from star_edge.evaluation.configs import OFF
from star_edge.evaluation.tuning import BUDGETS, LEAST_HELD_OUT, candidates, split, tune
from star_edge.io.configs import load_config, resolve_prune
from star_edge.io.questions import read_questions

IMAGE = str(refvlm.DEMO_IMAGE)
FOLDER = Path(__file__).parent / "refvlm_questions"
TASKS = read_questions(FOLDER / "questions.jsonl", None)


def test_candidates_fall_in_average_tokens():
    for family in candidates():
        averages = []
        for config in family:
            windows = config.prune.decoder_windows(30) if config.prune.prunes_in_decoder else []
            n1 = config.prune.vision_keep
            averages.append(sum((b - a) * n for (a, n), (b, _) in zip([(0, n1), *windows], [*windows, (30, 0)])) / 30)
        assert averages == pytest.approx(list(BUDGETS))


def test_an_image_is_on_one_side():
    choosing, reporting = split(TASKS)
    assert len(choosing) + len(reporting) == len(TASKS)
    assert not {t.images for t in choosing} & {t.images for t in reporting}
    assert 0.2 < len(reporting) / len(TASKS) < 0.45
    few = TASKS[: LEAST_HELD_OUT - 5]
    assert split(few) == (list(few), [])


def fake_ask(right, average, tasks):
    """Records as a model would give them that is right about the first right(config) of the tasks."""
    asked = []

    def ask(configs):
        asked.append(configs[-1].name)
        records = {}
        for config in configs:
            n = len(tasks) if config == OFF else right(config)
            for i, task in enumerate(tasks):
                records[task.id, config.name] = {
                    "task": task.id,
                    "config": config.name,
                    "score": float(i < n),
                    "answer": "a" if i < n else "b",
                    "kl": 0.0,
                    "average_tokens": average(config),
                    "first_token_ms": 1.0,
                    "unpruned_first_token_ms": 1.0,
                    "notes": [],
                }
        return records

    return ask, asked


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("metric", ["exact", None])
def test_the_cheapest_that_keeps_enough_is_found(keep, metric):
    tasks = TASKS[:200]
    budget = lambda config: float(config.name.split()[-1]) if config != OFF else 1.0
    # "both" keeps 1 - (1 - budget)^8, "vision" somewhat less
    quality = lambda config: 1 - (1 - budget(config)) ** (8 if config.method == "both" else 6)
    ask, asked = fake_ask(lambda c: int(200 * quality(c)), budget, tasks)
    best, rows = tune(ask, tasks, metric, keep)
    expected = min(budget(c) for family in candidates() for c in family if int(200 * quality(c)) / 200 >= keep)
    assert budget(best) == expected and len(asked) == len(set(asked)) == len(rows) <= 2 * 4


def test_nothing_keeps_enough():
    ask, _ = fake_ask(lambda config: 0, lambda config: 1.0, TASKS[:50])
    assert tune(ask, TASKS[:50], "exact", 0.9)[0] == OFF


def test_a_question_that_nobody_can_answer_speaks_against_no_config():
    tasks = TASKS[:60]
    ask, _ = fake_ask(lambda config: 60, lambda config: float(config.name.split()[-1]) if config != OFF else 1.0, tasks)

    def with_errors(configs, broken):
        records = ask(configs)
        for name in broken:
            records[tasks[3].id, name] = {"task": tasks[3].id, "config": name, "error": "no such image"}
        return records

    best, _ = tune(lambda configs: with_errors(configs, [c.name for c in configs]), tasks, "exact", 0.9)
    assert best.name == f"vision {BUDGETS[-1]:g}" or best.name == f"both {BUDGETS[-1]:g}"
    assert tune(lambda configs: with_errors(configs, [c.name for c in configs[1:]]), tasks, "exact", 0.9)[0] == OFF


def test_command_and_its_file(star_edge, tmp_path):
    questions = FOLDER / "questions.jsonl"
    args = (
        "tune",
        str(questions),
        "-t",
        "1",
        "-n",
        "4",
        "--limit",
        "60",
        "--keep",
        "0.9",
        "-o",
        "found.json",
        "--out",
        "r.jsonl",
        "--json",
    )
    data = json.loads(star_edge(*args).stdout)
    assert data["on_choosing"]["relative_accuracy"] >= 0.9 and data["n_choosing"] + data["n_held_out"] == 60
    cheaper = [row for row in data["asked"] if row["average_tokens"] < data["on_choosing"]["average_tokens"]]
    assert all(row["relative_accuracy"] < 0.9 for row in cheaper)
    config = load_config(str(tmp_path / "found.json"))
    assert config.to_dict() == data["config"]
    assert json.loads(star_edge(*args).stdout) == data  # all from r.jsonl
    run = json.loads(star_edge("run", "how many squares?", "--image", IMAGE, "--preset", "found.json", "--json").stdout)
    assert run["report"]["average_tokens"] == pytest.approx(data["on_choosing"]["average_tokens"])
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_threads=1) as vlm:
        report = vlm.generate("how many squares?", IMAGE, str(tmp_path / "found.json"), 4).report
    assert report.config == config
    assert "--keep" in star_edge("tune", str(questions), "--keep", "1.5", status=2).stderr
    assert "JSONL" in star_edge("tune", status=2).stderr
    assert ".json" in star_edge("tune", str(questions), "-o", "x.txt", status=2).stderr


def test_config_files(tmp_path):
    path = tmp_path / "c.json"
    for text, words in (
        ("nope", "not valid JSON"),
        ("[]", "no config"),
        ('{"config": {}}', "no config"),
        ('{"config": {"keep": 1}}', "unknown fields: keep"),
        ('{"config": {"vision_keep": 2.0}}', "vision_keep=2.0"),
        ('{"config": 3}', "unknown fields: config"),
    ):
        path.write_text(text)
        with pytest.raises(errors.ConfigError, match=words):
            resolve_prune(str(path))
    with pytest.raises(errors.ConfigError, match="cannot be read"):
        resolve_prune(str(tmp_path / "no.json"))
    path.write_text('{"config": null}')
    assert resolve_prune(str(path)) is None
    for config in (PruneConfig(0.5, windows=((2, 0.5), (0.5, 3))), PRESETS["visionzip"]):
        path.write_text(json.dumps({"config": config.to_dict()}))
        assert resolve_prune(str(path)) == config
