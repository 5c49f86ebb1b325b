"""star-edge tune: odds that reject, parts, the search against brute force, the check, and the file it writes."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from star_edge import PRESETS, PruneConfig, StarVLM, errors, refvlm
from star_edge.evaluation.axes import STAGES, excludes, find_axes, make_axes, make_config
from star_edge.evaluation.configs import OFF, NamedConfig
from star_edge.evaluation.results import Records
from star_edge.evaluation.sequential import ALPHA, cannot_reach_zero, odds_against
from star_edge.evaluation.trials import LEAST, Part, Parts, split
from star_edge.evaluation.tuning import MIN_GAIN, Search, check_score, guard, plan
from star_edge.io.configs import load_config, resolve_prune
from star_edge.io.questions import Question, read_questions

IMAGE = str(refvlm.DEMO_IMAGE)
FOLDER = Path(__file__).parent / "refvlm_questions"
TASKS = read_questions(FOLDER / "questions.jsonl", None)


# ---- the odds ----


@pytest.mark.parametrize("values", [(-1.0, 1.0), (-0.98, 0.49, 0.49), (-0.5, 0.0, 0.5), (-1.0, 1 / 3, 1 / 3, 1 / 3)])
def test_a_fair_game_is_rejected_no_more_often_than_it_says(values):
    """Over every sequence of a mean of 0, whatever the distribution, and looked at after each value."""
    n = 12 if len(values) == 2 else 8 if len(values) == 3 else 6
    assert sum(values) == pytest.approx(0)
    rejected = [odds_against(sequence) >= 1 / ALPHA for sequence in itertools.product(values, repeat=n)]
    assert np.mean(rejected) <= ALPHA


def test_the_odds_find_what_is_worse():
    rng = np.random.default_rng(0)
    for lost, least in ((0.5, 25), (0.2, 100)):
        values = np.where(rng.random((200, least)) < lost, -0.98, 0.02)
        assert np.mean([odds_against(row) >= 1 / ALPHA for row in values]) > 0.8
    assert odds_against([0.02] * 500) < 1.01
    assert odds_against([]) == 1


def test_what_no_question_can_change():
    assert cannot_reach_zero(-1.0, 0.9) and not cannot_reach_zero(-1.0, 1.0)


# ---- parts ----


def test_parts():
    parts = split(TASKS)
    everything = [*parts.choice, *parts.guard, *parts.report]
    assert sorted(q.id for q in everything) == sorted(q.id for q in TASKS)
    of_image = {}
    for name, part in vars(parts).items():
        for question in part:
            assert of_image.setdefault(question.images, name) == name
    shares = [len(part) / len(TASKS) for part in vars(parts).values()]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.02)
    assert {q.id for q in split(list(reversed(TASKS))).choice} == {q.id for q in parts.choice}
    two = split(TASKS[:60])
    assert len(two.guard) >= LEAST and not two.report
    one = split(TASKS[: 2 * LEAST])
    assert len(one.choice) == 2 * LEAST and not one.guard and not one.report


def test_questions_of_one_image_stand_together():
    for part in vars(split(TASKS)).values():
        runs = [image for image, _ in itertools.groupby(q.images for q in part)]
        assert len(runs) == len(set(runs))


# ---- axes ----


def test_every_point_is_a_config_and_strong_ones_keep_less():
    axes = make_axes([10, 8, 6, 4], 12)
    assert {axis.stage for axis in axes} == set(STAGES)
    rng = np.random.default_rng(0)
    for _ in range(500):
        point = tuple(int(rng.integers(len(axis.values) + 1)) for axis in axes)
        if excludes(axes, point):
            continue
        config = make_config(axes, point)
        assert (config == OFF) == (not any(point))
        for i, axis in enumerate(axes):
            if point[i] < len(axis.values) and not excludes(
                axes, stronger := (*point[:i], point[i] + 1, *point[i + 1 :])
            ):
                assert token_layers(make_config(axes, stronger).prune) <= token_layers(config.prune) + 1e-9


def token_layers(prune, n_layers=12):
    """Of encoder and decoder, over those of the unpruned model. Redundancy counts as if each step left out a tenth."""
    if prune is None:
        return 2.0
    picture = prune.image_max_tokens * (1 - 0.1 * ("off", "exact", 0.05, 0.1).index(prune.redundancy))
    first = (prune.encoder_layer or n_layers // 4) / n_layers if prune.encoder_keep < 1 else 1.0
    encoder = first + (1 - first) * prune.encoder_keep
    rows = min(prune.vision_keep, prune.encoder_keep)
    k = (prune.decoder_layer or n_layers) / n_layers
    return picture * (encoder + k * rows + (1 - k) * min(prune.decoder_keep, rows))


def test_names_tell_configs_apart():
    axes = make_axes([10, 8, 6, 4], None)
    by_name = {}
    for point in itertools.product(*(range(0, len(axis.values) + 1, 2) for axis in axes)):
        if not excludes(axes, point):
            config = make_config(axes, point)
            assert by_name.setdefault(config.name, config.prune) == config.prune


# ---- a world in which everything is known ----


class World:
    """Questions with scores and times for every config.

    The unpruned model is right on a share of the questions. A config loses those that the sum of its strengths harms
    more than they bear: accuracy falls along each axis, and harms add up. Times follow `token_layers`.
    """

    def __init__(self, seed, n, *, noise=0.0, per_image=1, tolerance=1.0):
        rng = np.random.default_rng(seed)
        keep = {"resolution", "vision", "decoder, an eighth", "decoder, half"}
        self.axes = [axis for axis in make_axes([10, 8, 6, 4], None) if axis.name in keep]
        self.questions = [
            Question(str(i), (f"{seed} {i // per_image}.png",), ("",), "what?", ("yes",)) for i in range(n)
        ]
        self.place = {q.id: i for i, q in enumerate(self.questions)}
        self.base = rng.random(n) < 0.9
        self.harm = rng.gamma(0.5, 1.0, (n, len(self.axes))) * rng.gamma(0.6, 1.0, len(self.axes))
        self.bears = tolerance * rng.lognormal(0.5, 1.0, n)
        self.overhead, self.noise, self.rng = rng.uniform(0.05, 0.5), noise, rng
        self.points = {}
        for point in itertools.product(*(range(len(axis.values) + 1) for axis in self.axes)):
            if not excludes(self.axes, point):
                name = make_config(self.axes, point).name
                if name not in self.points or sum(point) < sum(self.points[name]):
                    self.points[name] = point
        self.records, self.asked = {}, []

    def right(self, name):
        strength = [(n / len(axis.values)) ** 2 for axis, n in zip(self.axes, self.points[name])]
        return self.base & (self.harm @ np.array(strength) < self.bears)

    def time(self, name):
        return self.overhead + token_layers(make_config(self.axes, self.points[name]).prune)

    def speed(self, name):
        return self.time(OFF.name) / self.time(name)

    def ask(self, questions, configs):
        known = {c.name: (self.right(c.name), self.time(c.name)) for c in configs} if questions else {}
        off = self.time(OFF.name)
        for question in questions:
            for config in configs:
                if (question.id, config.name) in self.records:
                    continue
                self.asked.append((question.id, config.name))
                right, time = known[config.name]
                good = bool(right[self.place[question.id]])
                noise = np.exp(self.rng.normal(0, self.noise, 2))
                self.records[question.id, config.name] = {
                    "score": float(good),
                    "answer": "yes" if good else f"no, says {config.name}",
                    "first_token_ms": time * noise[0],
                    "unpruned_first_token_ms": off * noise[1],
                }
        return self.records

    def fastest(self, questions, keep):
        """By brute force: the speed of the fastest config that keeps enough, 1 if none does."""
        places = [self.place[q.id] for q in questions]
        unpruned = self.base[places].sum()
        return max(
            self.speed(name) if self.right(name)[places].sum() >= keep * unpruned - 1e-9 else 1.0
            for name in self.points
        )


def search(world, questions, keep, metric="exact", **options):
    part = Part(world.ask, questions, metric, keep)
    return Search(world.axes, part, **options).run()


@pytest.mark.parametrize("keep", [0.9, 0.98])
def test_the_search_against_brute_force(keep):
    shares = []
    for seed in range(12):
        world = World(seed, 120)
        best = search(world, world.questions, keep).best
        fastest = world.fastest(world.questions, keep)
        speed = 1.0 if best is None else world.speed(best.config.name)
        assert speed <= fastest + 1e-9  # nothing that loses too much is found
        shares.append(speed / fastest)
        assert len(world.asked) <= plan(world.axes, Parts(world.questions, [], []), 1.0).most_answers
    assert np.median(shares) > 0.97 and min(shares) > 0.7


def test_agreement_without_answers():
    """What the unpruned model answers is right then, wrong answers too: each config has its own wrong ones."""
    world = World(3, 120)
    world.base[:] = True
    with_answers = search(world, world.questions, 0.95).best
    without = search(world, world.questions, 0.95, metric=None).best
    assert with_answers.config == without.config and with_answers.config != OFF


def test_noise_of_times_costs_little():
    shares = []
    for seed in range(8):
        world = World(seed, 120, noise=0.2)
        best = search(world, world.questions, 0.95).best
        fastest = world.fastest(world.questions, 0.95)
        shares.append((1.0 if best is None else world.speed(best.config.name)) / fastest)
    assert np.median(shares) > 0.9


def test_bad_configs_are_dropped_early():
    world = World(3, 400, tolerance=0.1)
    trials = search(world, world.questions, 0.98).trials.values()
    bad = [t for t in trials if world.right(t.config.name).sum() < 0.8 * world.base.sum()]
    assert len(bad) >= 3 and all(t.verdict == "accuracy" and t.n <= 80 for t in bad)
    good = [t for t in trials if t.verdict == "kept" and t.n == 400]
    assert good and all(world.right(t.config.name).sum() >= 0.98 * world.base.sum() for t in good)


def test_a_config_that_is_not_faster_is_not_chosen():
    world = World(2, 60, tolerance=1e9)  # nothing is ever lost
    slow = {name for name, point in world.points.items() if point[0]}  # a smaller picture takes longer here
    time = world.time
    world.time = lambda name: 3 * time(OFF.name) if name in slow else time(name)
    choice = search(world, world.questions, 0.98)
    assert world.speed(choice.best.config.name) > max(map(world.speed, world.points)) / MIN_GAIN
    alone = {t.config.name for t in choice.trials.values() if sum(map(bool, world.points[t.config.name])) == 1}
    verdicts = {name: choice.trials[name].verdict for name in alone}
    assert {name for name, verdict in verdicts.items() if verdict == "time"} == alone & slow


def test_nothing_is_kept():
    world = World(4, 60)
    world.bears[:] = 1e-300  # every config loses every answer
    world.harm += 1.0
    choice = search(world, world.questions, 0.9)
    assert choice.best is None and not choice.kept
    assert all(t.n <= 10 for t in choice.trials.values())
    assert guard(choice, Part(world.ask, world.questions, "exact", 0.9), None).best is None


def test_nothing_to_keep():
    world = World(4, 60)
    world.base[:] = False
    with pytest.raises(errors.EvaluationError, match="no answer right"):
        check_score(Part(world.ask, world.questions, "exact", 0.9))


@pytest.mark.parametrize("everyone", [True, False])
def test_failed_questions(everyone):
    """A question that fails unpruned too speaks against no config; one that a config alone fails on, against it."""
    world = World(5, 60, tolerance=1e9)

    def ask(questions, configs):
        records = dict(world.ask(questions, configs))
        for question_id, name in list(records):
            if question_id == "7" and (everyone or name != OFF.name):
                records[question_id, name] = {"error": "no such image"}
        return records

    best = Search(world.axes, Part(ask, world.questions, "exact", 0.98)).run().best
    assert (best is None) != everyone
    if everyone:
        assert world.speed(best.config.name) == pytest.approx(max(map(world.speed, world.points)), rel=MIN_GAIN - 1)


def test_questions_about_one_image_are_not_cut():
    world = World(6, 120, per_image=7)
    seen = []

    def ask(questions, configs):
        seen.append(list(questions))
        return world.ask(questions, configs)

    Search(world.axes, Part(ask, split(world.questions).choice, "exact", 0.95)).run()
    images = {q.images: sum(other.images == q.images for other in world.questions) for q in world.questions}
    for batch in seen:
        for question in batch:
            assert sum(other.images == question.images for other in batch) == images[question.images]


# ---- the check ----


def parts_of(world, n):
    return Parts(world.questions[:n], world.questions[n:], [])


def test_the_check_rejects_what_fits_the_choice_alone():
    world = World(0, 160)
    parts = parts_of(world, 80)
    choice = search(world, parts.choice, 0.98)
    fast = choice.best.config.name
    right = world.right

    def spoiled(name):
        """The choice's fastest ones lose a fifth of the other questions."""
        result = right(name).copy()
        if world.speed(name) > 0.8 * world.speed(fast):
            result[80::5] = False
        return result

    world.right = spoiled
    chosen_on, checking = (Part(world.ask, part, "exact", 0.98) for part in (parts.choice, parts.guard))
    guarded = guard(choice, chosen_on, checking)
    assert [t.verdict for t in guarded.checked][:-1] == ["accuracy"] * (len(guarded.checked) - 1)
    assert guarded.is_checked and len(guarded.checked) > 1
    assert guarded.best is not None and world.speed(guarded.best.config.name) <= 0.8 * world.speed(fast)
    speeds = [world.speed(t.config.name) for t in guarded.checked]
    assert speeds == sorted(speeds, reverse=True)
    # what is taken keeps enough on both parts together, and what rounding allows on the second
    places = slice(0, 160)
    assert spoiled(guarded.best.config.name)[places].sum() >= 0.98 * world.base[places].sum() - 1e-9
    lost = world.base[80:].sum() - spoiled(guarded.best.config.name)[80:].sum()
    assert lost <= math.ceil(0.02 * world.base[80:].sum())


def test_the_check_passes_what_is_good():
    world = World(0, 160, tolerance=1e9)
    parts = parts_of(world, 80)
    choice = search(world, parts.choice, 0.98)
    chosen_on, checking = (Part(world.ask, part, "exact", 0.98) for part in (parts.choice, parts.guard))
    guarded = guard(choice, chosen_on, checking)
    assert guarded.best is choice.best and guarded.is_checked and len(guarded.checked) == 1


def test_nothing_passes_the_check():
    world = World(0, 160, tolerance=1e9)
    parts = parts_of(world, 80)
    choice = search(world, parts.choice, 0.98)
    right = world.right
    world.right = lambda name: right(name) & ((np.arange(160) < 80) | (name == OFF.name))
    chosen_on, checking = (Part(world.ask, part, "exact", 0.98) for part in (parts.choice, parts.guard))
    guarded = guard(choice, chosen_on, checking)
    assert guarded.best is None and guarded.is_checked


def test_too_few_questions_for_a_check():
    world = World(0, 40)
    choice = search(world, world.questions, 0.9)
    guarded = guard(choice, Part(world.ask, world.questions, "exact", 0.9), None)
    assert guarded.best is choice.best and not guarded.is_checked


# ---- stopping and going on ----


@pytest.mark.parametrize("calls", [3, 8, 20])
def test_the_time_is_up(calls):
    world = World(7, 120)
    left = iter(range(calls))
    is_over = lambda: next(left, None) is None
    choice = search(world, world.questions, 0.95, is_over=is_over)
    assert not choice.is_complete
    n_asked = len(world.asked)
    again = search(world, world.questions, 0.95, is_over=lambda: True)  # what is there is looked at, whatever the time
    assert again.trials == choice.trials and again.best == choice.best and len(world.asked) == n_asked
    assert (choice.best is None) == (not choice.kept)
    assert all(t.verdict == "kept" for t in choice.kept)


def test_a_run_that_goes_on_asks_nothing_twice():
    whole = World(8, 120, noise=0.1)
    found = search(whole, whole.questions, 0.95).best

    class StoppedError(Exception):
        pass

    parted = World(8, 120, noise=0.1)
    for stop_after in (200, 400, 700, None):

        def ask(questions, configs, stop_after=stop_after):
            if stop_after is not None and len(parted.asked) >= stop_after:
                raise StoppedError
            return parted.ask(questions, configs)

        try:
            best = Search(parted.axes, Part(ask, parted.questions, "exact", 0.95)).run().best
        except StoppedError:
            continue
    assert best.config == found.config
    assert parted.asked == whole.asked and len(set(whole.asked)) == len(whole.asked)


def test_results_of_another_config_of_that_name_are_refused(tmp_path):
    question = TASKS[0]
    with Records(str(tmp_path / "r.jsonl"), {}, [question], [OFF]) as records:
        records.expect([NamedConfig("half", "", PruneConfig(0.5))])
        records.add(question, NamedConfig("half", "", PruneConfig(0.5)), answer="a")
    with Records(str(tmp_path / "r.jsonl"), {}, [question], [OFF]) as records:
        records.expect([NamedConfig("half", "", PruneConfig(0.5))])
        assert records.done(question, NamedConfig("half", "", PruneConfig(0.5)))
    changed = pytest.raises(errors.ResultsFileError, match="config 'half' has changed")
    with Records(str(tmp_path / "r.jsonl"), {}, [question], [OFF]) as records, changed:
        records.expect([NamedConfig("half", "", PruneConfig(0.25))])


# ---- the models ----


def test_what_the_reference_model_supports():
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_threads=1) as vlm:
        found = find_axes(vlm, TASKS, STAGES, 4)
        assert {axis.stage for axis in found.axes} == {"vision", "decoder"}
        assert set(found.left_out) == {"redundancy", "resolution", "encoder"} and all(found.left_out.values())
        assert found.answer_seconds > 0
        layers = [value["decoder_layer"] for axis in found.axes if axis.stage == "decoder" for value in axis.values]
        assert set(layers) <= set(range(1, vlm.decoder.n_layers))
        missing = Question("x", ("no.png",), ("no.png",), "what?")
        with pytest.raises(errors.EvaluationError, match="none of the first questions"):
            find_axes(vlm, [missing], STAGES, 4)


@pytest.mark.parametrize("name", ["qwen2vl", "llama"])
def test_what_other_models_support(families, name):
    """Qwen2-VL takes pictures of any size. A CLIP encoder of one size has an encoder stage, and no smaller pictures."""
    models = families[name]
    with StarVLM(models.text, models.mmproj, n_ctx=512, n_threads=1, chat_template="chatml") as vlm:
        found = find_axes(vlm, TASKS[:3], STAGES, 2)
    stages = {axis.stage for axis in found.axes}
    assert stages | set(found.left_out) == set(STAGES) and not stages & set(found.left_out)
    assert {"vision", "encoder", "decoder"} <= stages
    assert ("resolution" in stages) == ("redundancy" in stages) == (name == "qwen2vl")


@pytest.fixture
def command(star_edge_here):
    return lambda *args, status=0: star_edge_here("tune", *args, status=status)


QUESTIONS = str(FOLDER / "questions.jsonl")
COMMON = ("-t", "1", "-n", "4", "--axes", "vision,resolution", "-o", "found.json")


@pytest.mark.parametrize("limit", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_command_and_its_file(command, limit, tmp_path):
    args = (QUESTIONS, *COMMON, "--limit", limit, "--keep", 0.9, "--out", "r.jsonl")
    data = json.loads(command(*args, "--json")[0])
    assert data["n_choosing"] + data["n_guard"] == limit and data["n_held_out"] == 0 and data["on_held_out"] is None
    assert data["on_choosing"]["relative_accuracy"] >= 0.9
    assert data["is_checked"] == (data["n_guard"] >= LEAST) == (limit == 60)
    assert data["left_out"].keys() == {"resolution"} and data["axes"] == ["vision"]
    assert data["model"]["fingerprints"].keys() == {"model", "mmproj"} and data["machine"]["threads"] == 1
    kept = {trial["name"]: trial for trial in data["trials"] if trial["verdict"] == "kept"}
    assert data["name"] in {*kept, "off"}
    if limit == 10 and kept:
        assert kept[data["name"]]["speed_up"] == max(trial["speed_up"] for trial in kept.values())
    written = json.loads((tmp_path / "found.json").read_text())
    assert written == {k: v for k, v in data.items() if k not in ("trials", "written")}
    config = load_config("found.json")
    assert (None if config is None else config.to_dict()) == data["config"]

    answers = (tmp_path / "r.jsonl").read_text()
    out, err = command(*args)
    assert (tmp_path / "r.jsonl").read_text() == answers  # nothing was asked again
    again = json.loads((tmp_path / "found.json").read_text())
    assert {key for key in written if written[key] != again[key]} <= {"asked"} and again["asked"]["answers"] == 0
    assert data["name"] in out and "found.json" in out and ("not checked" in out) == (limit == 10 and bool(config))
    assert "resolution is left out: " in err and "questions for the choice" in err
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_threads=1) as vlm:
        assert vlm.generate("how many squares?", IMAGE, "found.json", 4).report.config == config


def test_refusals(command):
    assert "--keep" in command(QUESTIONS, "--keep", "1.5", status=2)[1]
    assert "TASKS is missing" in command(status=2)[1]
    assert ".json" in command(QUESTIONS, "-o", "x.txt", status=2)[1]
    assert "no such folder" in command(QUESTIONS, "-o", "no/x.json", status=2)[1]
    assert "'depth' is not an axis" in command(QUESTIONS, "--axes", "vision,depth", status=2)[1]
    assert "--minutes 0.001 is too short" in command(QUESTIONS, *COMMON, "--minutes", "0.001", status=2)[1]
    assert "none of the axes can be varied" in command(QUESTIONS, *COMMON, "--axes", "redundancy", status=2)[1]


def test_config_files(tmp_path):
    path = tmp_path / "c.json"
    for text, words in (
        ("nope", "not valid JSON"),
        ("[]", "no config"),
        ('{"config": {}}', "no config"),
        ('{"config": {"keep": 1}}', "unknown fields: keep"),
        ('{"config": {"vision_keep": 2.0}}', "vision_keep=2.0"),
        ('{"config": 3}', "has no config"),
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
