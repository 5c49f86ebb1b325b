"""Pictures that a model cuts into crops, on the fixture of LLaVA-NeXT: picture 0 fits into the encoder, picture 1 is of
2 x 2 crops and an overview, in that order. What each crop's features, scores and kept tokens are is tested in
test_families.py."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.families import load_fixtures
from PIL import Image

from star_edge import PruneConfig, StarVLM
from star_edge.cli import cli
from star_edge.cli.options import save_overlay
from star_edge.errors import ConfigError
from star_edge.io.images import ImageLimits
from star_edge.pruning.config import PRESETS

FIXTURE = load_fixtures()["llava-next"]
PROMPT = FIXTURE.prompts[1]
PICTURES = [0, 1, 1, 1, 1, 1]


@pytest.fixture(scope="module")
def vlm():
    with FIXTURE.engine() as engine:
        yield engine


@pytest.mark.parametrize(
    "config",
    [
        PruneConfig(0.5, 0.25, 1),
        PruneConfig(35, 15, 2, representatives="none"),
        replace(PRESETS["balanced"], vision_tolerance=None),
    ],
)
def test_no_crop_starves(vlm, config):
    """The crops of a picture share its tokens, and none has less than a quarter of an equal share; by the crop, all
    have as many.
    """
    _, report = vlm.read_prompt(PROMPT.text, PROMPT.pictures, config, chat=False)
    assert [image.picture for image in report.images] == PICTURES
    assert all(image.grid == (6, 6) for image in report.images)
    crops = report.images[1:]
    for name in ("vision_kept", "decoder_kept"):
        counts = [len(getattr(image, name)) for image in crops]
        assert sum(counts) < 36 * 5 and min(counts) >= sum(counts) // 5 // 4 and len(set(counts)) > 1
    _, report = vlm.read_prompt(PROMPT.text, PROMPT.pictures, replace(config, budget="crop"), chat=False)
    n1, n2 = ({len(kept) for kept in stage} for stage in zip(*((i.vision_kept, i.decoder_kept) for i in report.images)))
    assert len(n1) == len(n2) == 1 and 0 < n2.pop() < n1.pop() <= 36


def test_parts_of_a_picture_are_cached_apart(vlm):
    config = PruneConfig(0.5, 0.25, 1)
    vlm.encoder.cache.clear()
    first, report = vlm.read_prompt(PROMPT.text, PROMPT.pictures, config, chat=False)
    assert not any(image.cached for image in report.images)
    expected = first.logits.copy()
    again, report = vlm.read_prompt(PROMPT.text, PROMPT.pictures, config, chat=False)
    assert all(image.cached for image in report.images) and np.array_equal(again.logits, expected)
    assert [image.picture for image in report.images] == PICTURES


def test_pictures_are_told_apart_without_a_cache():
    with StarVLM(FIXTURE.text, FIXTURE.mmproj, n_ctx=512, n_threads=2, image_cache_bytes=0) as engine:
        _, report = engine.read_prompt(PROMPT.text, PROMPT.pictures, None, chat=False)
    assert [image.picture for image in report.images] == PICTURES


def test_tokens_of_crops_are_drawn_beside_the_picture(vlm, tmp_path):
    """Nobody says where they lie: each crop is a grid of its own, of its own kept cells."""
    config = PruneConfig(0.5, 0.25, 1)
    _, report = vlm.read_prompt(PROMPT.text, PROMPT.pictures, config, chat=False)
    written, problems = save_overlay(report, PROMPT.pictures, str(tmp_path / "a.png"), ImageLimits())
    assert [Path(path).name for path in written] == ["a-0.png", "a-1.png"] and not problems
    drawn = np.asarray(report.picture(PROMPT.pictures[1], 1)).reshape(-1, 3)
    colours = {tuple(int(c) for c in pixel) for pixel in np.unique(drawn, axis=0)}
    assert {(255, 224, 150), (70, 70, 80)} <= colours  # kept and dropped cells
    for image in report.images[1:]:
        image.vision_kept = image.decoder_kept = np.arange(36)
    everything = np.asarray(report.picture(PROMPT.pictures[1], 1)).reshape(-1, 3)
    assert not (everything == (70, 70, 80)).all(axis=1).any()  # nothing is dropped
    for image in report.images[1:3]:
        image.grid = None
    report.picture(PROMPT.pictures[1], 1)
    for image in report.images[1:]:
        image.grid = None
    written, problems = save_overlay(report, PROMPT.pictures, str(tmp_path / "c.png"), ImageLimits())
    assert len(written) == 1 and len(problems) == 1 and "image 1" in problems[0] and "no grid" in problems[0]


def test_an_overlay_never_costs_the_answer(tmp_path):
    """The answer is printed whatever becomes of the picture, and the exit status tells."""
    for name, pixels in zip("ab", PROMPT.pictures):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    model = ["-m", str(FIXTURE.text), "--mmproj", str(FIXTURE.mmproj), "-c", "512", "--raw", "-n", "4"]
    command = ["run", *model, "--image", str(tmp_path / "b.png"), "<__media__> what is in the red part?"]
    plain = CliRunner().invoke(cli, command, standalone_mode=False)
    assert plain.return_value == 0
    drawn = CliRunner().invoke(cli, [*command, "--overlay", str(tmp_path / "o.png")], standalone_mode=False)
    assert drawn.return_value == 0 and drawn.stdout == plain.stdout and (tmp_path / "o.png").exists()
    too_long = str(tmp_path / f"{'x' * 300}.png")
    for extra in ([], ["--json"]):
        failed = CliRunner().invoke(cli, [*command, "--overlay", too_long, *extra], standalone_mode=False)
        assert failed.return_value == 3 and "x.png cannot be written" in failed.stderr
        assert (json.loads(failed.stdout)["text"] + "\n" if extra else failed.stdout) == plain.stdout


def test_attention_over_a_picture_in_crops_is_refused(tmp_path):
    for name, pixels in zip("ab", PROMPT.pictures):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    model = ["-m", str(FIXTURE.text), "--mmproj", str(FIXTURE.mmproj), "-c", "512", "--raw"]
    out = ["--out", str(tmp_path / "o.npz"), "--picture", str(tmp_path / "p.png")]
    image = lambda name: ["--image", str(tmp_path / f"{name}.png"), "<__media__> what is in the red part?"]
    run = lambda name: CliRunner().invoke(cli, ["inspect", *model, *out, *image(name)])
    assert run("a").exit_code == 0
    done = run("b")
    assert isinstance(done.exception, ConfigError) and "crops" in str(done.exception)
