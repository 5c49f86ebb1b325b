"""Pictures that a model cuts into crops, on the fixture of LLaVA-NeXT: picture 0 fits into the encoder, picture 1 is of
2 x 2 crops and an overview, in that order. What each crop's features, scores and kept tokens are is tested in
test_families.py."""

import json
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.families import load_fixtures
from PIL import Image

from star_edge import PruneConfig, StarVLM, Video
from star_edge.cli import cli
from star_edge.cli.options import save_overlay
from star_edge.errors import ConfigError, EngineError
from star_edge.io.images import ImageLimits
from star_edge.io.panels import MARGIN, TITLE_HEIGHT
from star_edge.pruning import choose as choosing
from star_edge.pruning.presets import PRESETS
from star_edge.vision.stage import Ahead

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


def test_tokens_of_crops_are_drawn_where_they_lie(vlm, tmp_path):
    """Each tile dims the part of the picture that it shows, and no other; the overview has a row of its own."""
    config = PruneConfig(0.5, 0.25, 1)
    _, report = vlm.read_prompt(PROMPT.text, PROMPT.pictures, config, chat=False)
    written, problems = save_overlay(report, PROMPT.pictures, str(tmp_path / "a.png"), ImageLimits())
    assert [Path(path).name for path in written] == ["a-0.png", "a-1.png"] and not problems
    crops = report.images[1:]
    places = report.places[1:]
    assert None not in places
    tile = next(i for i, place in enumerate(places) if place.top > 0.4 and place.left > 0.4)  # at the lower right
    for image in crops:
        image.vision_kept = image.decoder_kept = np.arange(36)
    everything = np.asarray(report.picture(PROMPT.pictures[1], 1)).astype(int)
    crops[tile].vision_kept = np.empty(0, np.int64)
    y, x = np.nonzero((np.asarray(report.picture(PROMPT.pictures[1], 1)) != everything).any(axis=2))
    side, row = 336, 336 + TITLE_HEIGHT
    inside = y < MARGIN + row + side  # below are the titles, whose counts differ
    y, x = y[inside] - MARGIN - row, x[inside] - 2 * MARGIN - side
    assert side // 2 - 3 <= y.min() < side // 2 + 3 and side - 3 <= y.max() < side
    assert side // 2 - 3 <= x.min() < side // 2 + 3 and side - 3 <= x.max() < side


def test_where_nobody_knows_the_places_the_picture_says_so(vlm, tmp_path):
    config = PruneConfig(0.5, 0.25, 1)
    _, report = vlm.read_prompt(PROMPT.text, PROMPT.pictures, config, chat=False)
    known = report.picture(PROMPT.pictures[1], 1)
    report = pickle.loads(pickle.dumps(report))  # as in another process
    assert report.places == [None] * 6 and "locate" not in report.to_dict()
    drawn = report.picture(PROMPT.pictures[1], 1)
    assert drawn.size != known.size
    drawn = np.asarray(drawn).reshape(-1, 3)
    colours = {tuple(int(c) for c in pixel) for pixel in np.unique(drawn, axis=0)}
    assert {(255, 224, 150), (70, 70, 80)} <= colours  # kept and dropped cells, on their own
    for image in report.images[1:]:
        image.grid = None
    written, problems = save_overlay(report, PROMPT.pictures, str(tmp_path / "c.png"), ImageLimits())
    assert len(written) == 1 and len(problems) == 1 and "image 1" in problems[0] and "no grid" in problems[0]


def test_pictures_and_frames_on_one_sheet(vlm, tmp_path):
    _, report = vlm.read_prompt(PROMPT.text, PROMPT.pictures, PruneConfig(0.5, 0.25, 1), chat=False)
    alone = [report.picture(picture, i) for i, picture in enumerate(PROMPT.pictures)]
    sheet = report.picture(list(PROMPT.pictures))
    assert sheet.height == sum(one.height for one in alone) and sheet.width == max(one.width for one in alone)
    assert report.picture(PROMPT.pictures[1:], 1).size == alone[1].size
    for some, index in (([], 0), ([*PROMPT.pictures, PROMPT.pictures[0]], 0), (PROMPT.pictures, 1)):
        with pytest.raises(ConfigError, match=f"{len(some)} pictures were given"):
            report.picture(some, index)


def test_frames_of_a_video_are_drawn_under_each_other(vlm, tmp_path):
    """After an image, whose overlay is a file of its own."""
    frames = [np.full((84, 84, 3), shade, np.uint8) for shade in (40, 120, 200)]
    question = "<__media__><__media__> what is in the red part?"
    images = [PROMPT.pictures[0], Video(frames, count=3)]
    _, report = vlm.read_prompt(question, images, PruneConfig(0.5, 0.25, 1), chat=False)
    assert len(report.pictures) == 4
    assert report.picture(images[1], 1).size == report.picture(frames, 1).size
    written, problems = save_overlay(report, images, str(tmp_path / "a.png"), ImageLimits())
    assert [Path(path).name for path in written] == ["a-0.png", "a-1.png"] and not problems
    one, sheet = (np.asarray(Image.open(path)).astype(int) for path in written)
    assert sheet.shape[0] == 3 * one.shape[0]
    tops = [i * one.shape[0] + MARGIN + 168 for i in range(3)]
    assert [int(sheet[top, MARGIN + 168, 0]) for top in tops] == [40, 120, 200]
    folder = tmp_path / "frames"
    folder.mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i}.png")
    model = ["-m", str(FIXTURE.text), "--mmproj", str(FIXTURE.mmproj), "-c", "512", "--raw", "-n", "2"]
    command = ["run", *model, "--video", str(folder), "--frames", "3", "--overlay", str(tmp_path / "v.png")]
    done = CliRunner().invoke(cli, [*command, "<__media__> what is it?"], standalone_mode=False)
    assert done.return_value == 0, done.output
    assert Image.open(tmp_path / "v.png").height == sheet.shape[0]


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


def test_attention_over_a_picture_in_crops(vlm, tmp_path):
    """The brightest cell is drawn where its tile lies. The picture names the layer, the scale and the question."""
    result = vlm.inspect(PROMPT.text, PROMPT.pictures, decoder_layers=[1], mean_heads=True, chat=False)
    assert result.pictures == PICTURES and None not in result.places
    assert result.question and "<image" not in result.question
    place = next(i for i, p in enumerate(result.places) if i and p.top > 0.4 and p.left > 0.4)
    token = int(np.flatnonzero(result.image_of_token == place)[7])  # row 1, column 1 of that tile
    result.decoder[1][:] = 0.001
    result.decoder[1][:, token] = 1.0
    drawn = np.asarray(result.picture(PROMPT.pictures[1], 1, 1)).astype(int)
    light = drawn.sum(axis=2)
    header = drawn.shape[0] - MARGIN - 2 * (336 + TITLE_HEIGHT)
    heat = light[header + MARGIN + 336 + TITLE_HEIGHT :][:336, 2 * MARGIN + 336 :][:, :336]
    y, x = np.unravel_index(np.argmax(heat), heat.shape)
    cell = 168 / 6
    assert 168 + cell - 2 <= y < 168 + 2 * cell + 2 and 168 + cell - 2 <= x < 168 + 2 * cell + 2
    assert header >= 22 and light[:header].min() < 200  # the question
    with pytest.raises(ConfigError, match="no picture 2"):
        result.picture(PROMPT.pictures[1], 1, 2)
    for name, pixels in zip("ab", PROMPT.pictures):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    model = ["-m", str(FIXTURE.text), "--mmproj", str(FIXTURE.mmproj), "-c", "512", "--raw"]
    out = ["--out", str(tmp_path / "o.npz"), "--picture", str(tmp_path / "p.png")]
    for name in "ab":
        image = ["--image", str(tmp_path / f"{name}.png"), "<__media__> what is in the red part?"]
        done = CliRunner().invoke(cli, ["inspect", *model, *out, *image])
        assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "p.png").height > 2 * 336


def test_attention_over_frames(vlm):
    """Frames are pictures of the prompt, each at its place."""
    frames = [np.full((84, 84, 3), shade, np.uint8) for shade in (40, 120)]
    result = vlm.inspect("<__media__> what is it?", Video(frames, count=2), decoder_layers=[1], chat=False)
    assert result.pictures == [0, 1] and None not in result.places
    assert np.asarray(result.picture(frames[1], 1, 1)).shape[1] > 2 * 336


# ---- crops while others are encoded ----


@pytest.mark.parametrize("config", [PruneConfig(0.5, 0.25, 1), PruneConfig(0.3, vision_tolerance=0.2), None])
def test_where_a_gpu_encodes_choosing_begins_meanwhile(vlm, config, monkeypatch):
    """The prompt is the same to the bit. Each crop is begun once, in order, and not projected anew."""
    vlm.encoder.cache.clear()
    one, report = vlm.read_prompt(PROMPT.text, PROMPT.pictures, config, chat=False)
    expected, begun, projected = one.logits.copy(), [], []
    begin, project = Ahead.begin, choosing.project

    def recorded(self, number, encoded):
        begin(self, number, encoded)
        begun.append((number, number in self._begun))

    def counted(parts, n_threads):
        projected.extend(part for part in parts if "unit_vectors" not in vars(part))
        project(parts, n_threads)

    monkeypatch.setattr(Ahead, "begin", recorded)
    monkeypatch.setattr(choosing, "project", counted)
    monkeypatch.setattr(vlm.encoder, "on_gpu", True)
    vlm.encoder.cache.clear()
    other, found = vlm.read_prompt(PROMPT.text, PROMPT.pictures, config, chat=False)
    assert np.array_equal(other.logits, expected)
    assert [i.vision_kept.tolist() for i in found.images] == [i.vision_kept.tolist() for i in report.images]
    assert begun == [(number, config is not None) for number in range(6)]
    in_decoder = 6 if config is not None and config.decoder_keep < 1 else 0
    assert len(projected) == (6 + in_decoder if config is not None else 0)
    begun.clear()
    again, _ = vlm.read_prompt(PROMPT.text, PROMPT.pictures, config, chat=False)
    assert np.array_equal(again.logits, expected) and not any(there for _, there in begun)  # cached


def test_what_fails_meanwhile_fails_the_request(vlm, monkeypatch):
    """And leaves no thread: whether the vectors of a crop are no numbers, or a later crop cannot be encoded."""
    monkeypatch.setattr(vlm.encoder, "on_gpu", True)
    encode_once, threads = type(vlm.encoder).encode_once, threading.active_count()

    def damaged(seen, fails):
        def encode(self, chunk, *args, **options):
            encoded = encode_once(self, chunk, *args, **options)
            seen.append(chunk)
            if len(seen) == 5 and fails:
                raise EngineError("it failed")
            broken = np.full_like(encoded.embeddings, np.nan) if len(seen) == 3 else encoded.embeddings
            return replace(encoded, embeddings=broken)

        return encode

    for fails, message in ((False, "NaN or infinity"), (True, "it failed")):
        vlm.encoder.cache.clear()
        with monkeypatch.context() as patch, pytest.raises(EngineError, match=message):
            patch.setattr(type(vlm.encoder), "encode_once", damaged([], fails))
            vlm.read_prompt(PROMPT.text, PROMPT.pictures, PruneConfig(0.5), chat=False)
        assert threading.active_count() == threads
    vlm.encoder.cache.clear()
    _, report = vlm.read_prompt(PROMPT.text, PROMPT.pictures, PruneConfig(0.5), chat=False)
    assert [image.picture for image in report.images] == PICTURES
