"""The generator of tools/refvlm: seeded, and its answers follow from what is in the picture. Needs no torch."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TOOL = Path(__file__).parent.parent / "tools" / "refvlm"
PLURALS = ("circles", "squares", "triangles", "stars", "crosses", "rings", "hearts")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart")


@pytest.fixture(scope="module")
def tool():
    """The tool's modules: it is a folder of scripts, which import each other by bare names."""
    sys.path.insert(0, str(TOOL))
    try:
        import questions
        import scenes
        import sprites
        import vocabulary
    finally:
        sys.path.remove(str(TOOL))
    return {"questions": questions, "scenes": scenes, "sprites": sprites, "vocabulary": vocabulary}


@pytest.fixture(scope="module")
def generator(tool):
    """Makes generators with few backgrounds and sprites. Where Matplotlib's fonts are missing, stripes stand for
    text.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        tool["sprites"].draw_text = lambda text, size, font: np.tile(np.float32([1.0, 0.0]), (size, 4 * len(text)))
    make = tool["scenes"].SceneGenerator
    return lambda split="test", seed=0, **options: make(split, seed, n_backgrounds=4, n_variants=2, **options)


def draw(generator, tool, index):
    rng = generator.rng("scene", index)
    scene = generator.scene(rng)
    return scene, tool["questions"].held_out_questions(scene, rng), tool["questions"].training_questions(scene, rng)


def test_a_seed_gives_the_same_pixels_and_questions_in_any_order(tool, generator):
    first, second = generator(), generator()
    for index in (3, 0, 7):
        draw(second, tool, 5)
        (a, asked_a, train_a), (b, asked_b, train_b) = draw(first, tool, index), draw(second, tool, index)
        assert np.array_equal(a.pixels, b.pixels) and np.array_equal(a.labels, b.labels) and a.objects == b.objects
        assert asked_a == asked_b and train_a == train_b
    assert not np.array_equal(draw(first, tool, 0)[0].pixels, draw(generator(seed=1), tool, 0)[0].pixels)


def test_splits_share_no_pictures_and_no_backgrounds(tool, generator):
    splits = [generator(split) for split in ("train", "dev", "test")]
    backgrounds = [b.tobytes() for g in splits for b in g.backgrounds]
    assert len(set(backgrounds)) == len(backgrounds)
    pictures = [draw(g, tool, i)[0].pixels.tobytes() for g in splits for i in range(10)]
    assert len(set(pictures)) == len(pictures)


def recount(question, objects, size):
    """The answer, from the objects' descriptions alone; None where the question has no single answer."""
    words = question.removesuffix("?").split()
    if question.startswith("is there a"):
        return "yes" if any([o.get("color"), o["kind"]] == words[3:] for o in objects) else "no"
    if question.startswith("how many"):
        return str(sum(o["kind"] == SHAPES[PLURALS.index(words[2])] for o in objects))
    if question.startswith("what number"):
        found = [" ".join(map(str, o["num"])) for o in objects if o["kind"] == "plate"]
    elif question.startswith("what digit"):
        found = [o["kind"] for o in objects if o["kind"].isdigit() and o["color"] == words[3]]
    elif question.startswith("what color"):
        found = [o["color"] for o in objects if o["kind"] == words[4]]
    else:
        middles = [
            (o["box"][0] + o["box"][2] / 2, o["box"][1] + o["box"][3] / 2) for o in objects if o["kind"] == words[3]
        ]
        found = [f"{'top' if y < size / 2 else 'bottom'} {'left' if x < size / 2 else 'right'}" for x, y in middles]
    return found[0] if len(found) == 1 else None


@pytest.mark.parametrize("large", [False, True])
def test_answers_follow_from_the_objects(tool, generator, large):
    config = tool["scenes"].LARGE_SCENES if large else tool["scenes"].SMALL_SCENES
    made = generator(config=config)
    asked = Counter()
    for index in range(15 if large else 60):
        scene, held_out, training = draw(made, tool, index)
        objects = [o.as_dict() for o in scene.objects]
        assert len({q.question for q in held_out}) == len(held_out)
        for q in held_out + training:
            assert q.answer == recount(q.question, objects, config.image_size), (index, q)
            asked[q.family, q.answer if q.family == "exist" else ""] += 1
            tool["vocabulary"].encode_question(q.question)
            assert tool["vocabulary"].decode(tool["vocabulary"].encode(q.answer)) == q.answer
    assert {family for family, _ in asked} == set(tool["questions"].FAMILIES)
    assert 0.35 < asked["exist", "yes"] / (asked["exist", "yes"] + asked["exist", "no"]) < 0.65


def test_objects_are_where_they_are_said_to_be(tool, generator):
    """Pixels at the middle of a full shape have its colour; objects lie inside the picture and apart; labels name what
    is there.
    """
    scenes, vocabulary = tool["scenes"], tool["vocabulary"]
    made = generator()
    for index in range(40):
        scene = draw(made, tool, index)[0]
        taken = np.zeros(scene.pixels.shape[:2], int)
        named = set(scene.labels[:, 0]) - {0}
        assert named == {scenes.KINDS.index(o.kind) + 1 for o in scene.objects}
        for o in scene.objects:
            x, y, width, height = o.box
            assert x >= 0 and y >= 0 and x + width <= 168 and y + height <= 168
            taken[y : y + height, x : x + width] += 1
            if o.kind in ("circle", "square", "cross", "heart"):
                pixel = scene.pixels[y + height // 2, x + width // 2].astype(int)
                nearest = min(vocabulary.COLORS, key=lambda name: np.abs(pixel - vocabulary.COLORS[name]).sum())
                assert nearest == o.color
        assert taken.max() <= 1


def test_written_split_reads_back(tool, generator, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL))
    import make_questions

    monkeypatch.setattr(
        make_questions, "SceneGenerator", lambda split, seed, config, n: generator(split, seed, config=config)
    )
    counts, digest = make_questions.write_split("dev", tmp_path / "a", n_images=4)
    assert make_questions.write_split("dev", tmp_path / "b", n_images=4) == (counts, digest)
    assert make_questions.write_split("test", tmp_path / "c", n_images=4)[1] != digest
    rows = [json.loads(line) for line in (tmp_path / "a" / "questions.jsonl").read_text().splitlines()]
    objects = {
        r["image"]: r["objects"] for r in map(json.loads, (tmp_path / "a" / "objects.jsonl").read_text().splitlines())
    }
    assert counts == Counter(row["category"] for row in rows) and [row["id"] for row in rows] == list(range(len(rows)))
    for row in rows:
        assert set(row) == {"id", "image", "category", "question", "answer"}
        assert Image.open(tmp_path / "a" / row["image"]).size == (168, 168)
        assert row["answer"] == recount(row["question"], objects[row["image"]], 168)
