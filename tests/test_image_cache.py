"""Encoder outputs that are kept from one request to the next, in memory and in a directory: a hit equals a miss bit for
bit.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers.models import CLIP, random_image
from helpers.reusing import engine, fresh, same

from star_edge import PruneConfig, errors
from star_edge.pruning.presets import PRESETS
from star_edge.synthetic import write_encoder
from star_edge.vision import cache as image_cache
from star_edge.vision.encoder import VisionEncoder

BY_SCORE = PruneConfig(0.5, 0.25, 2, representatives="none")
CLS = PruneConfig(0.5, vision_scorer="cls", representatives="none")


@pytest.mark.parametrize("family", ["llama", "qwen2vl"])
def test_a_hit_equals_a_miss(families, family, tmp_path, monkeypatch):
    """In memory, from the directory, and without any cache."""
    runs, encode = [], VisionEncoder.encode
    monkeypatch.setattr(VisionEncoder, "encode", lambda *args, **options: runs.append(1) or encode(*args, **options))
    models, images = families[family], [random_image(1), random_image(2, 84, 126)]
    configs = [None, BY_SCORE, "balanced", CLS]
    with engine(models, image_cache_bytes=0) as vlm:
        expected = [vlm.read_prompt("a", images, config) for config in configs]
        assert vlm.encoder.cache is None
        assert not any(image.cached for _, report in expected for image in report.images)
    with engine(models, image_cache_dir=tmp_path) as vlm:
        for turn in range(2):
            runs.clear()
            for config, want in zip(configs, expected):
                report = same(vlm.read_prompt("a", images, config), want)
                assert all(image.cached for image in report.images) or turn == 0
            assert bool(runs) == (turn == 0)  # the encoder itself does not run again
        runs.clear()
    with engine(models, image_cache_bytes=0, image_cache_dir=tmp_path) as vlm:
        for config, want in zip(configs, expected):
            report = same(vlm.read_prompt("a", images, config), want)
            assert all(image.cached for image in report.images)
        assert report.figures()["images"][0]["cached"] is True and not runs


def test_attention_that_was_not_read_is_a_miss(families):
    with engine(families["llama"]) as vlm:
        cached = lambda config: vlm.read_prompt("a", random_image(1), config)[1].images[0].cached
        assert [cached(None), cached(None)] == [False, True]
        assert [cached("balanced"), cached("balanced"), cached(None)] == [False, True, True]  # cells
        assert [cached(BY_SCORE), cached(BY_SCORE)] == [False, True]
        assert [cached(CLS), cached(CLS), cached(BY_SCORE), cached("balanced")] == [False, True, True, True]
        assert not vlm.read_prompt("a", random_image(2), None)[1].images[0].cached


def test_other_pixels_and_shapes_are_other_images(families):
    image = random_image(1)
    changed = image.copy()
    changed[50, 50, 0] ^= 1
    reshaped = np.ascontiguousarray(image.reshape(49, 196, 3))
    with engine(families["llama"]) as vlm:
        for picture in (image, changed, reshaped):
            assert [vlm.read_prompt("a", picture, None)[1].images[0].cached for _ in range(2)] == [False, True]
        _, report = vlm.read_prompt("a", [image, image, random_image(3), image], None)
        assert [i.cached for i in report.images] == [True, True, False, True]


def test_parts_of_one_picture_are_apart(families, monkeypatch):
    """libmtmd cuts large pictures into chunks of one name; here two pictures have one."""
    request = (
        "a <__media__> b <__media__> c",
        [random_image(1), random_image(2)],
        replace(PRESETS["balanced"], budget="crop"),
    )
    want = fresh(families["llama"], request)
    monkeypatch.setattr(VisionEncoder, "bitmap_name", lambda self, image, number: "0:picture")
    with engine(families["llama"]) as vlm:
        for cached in (False, True):
            report = same(vlm.read_prompt(*request, chat=False), want)
            assert [image.cached for image in report.images] == [cached] * 2


def test_memory_is_bounded_and_the_oldest_goes_first(families):
    one = 49 * 256 * 4
    with engine(families["llama"], image_cache_bytes=2 * one + 100) as vlm:
        cached = lambda seed: vlm.read_prompt("a", random_image(seed), None)[1].images[0].cached
        assert [cached(i) for i in (1, 2, 1, 3, 1, 2)] == [False, False, True, False, True, False]
        assert vlm.encoder.cache.used == 2 * one
    with engine(families["llama"], image_cache_bytes=one - 1) as vlm:
        assert [vlm.read_prompt("a", random_image(1), None)[1].images[0].cached for _ in range(2)] == [False, False]
        assert vlm.encoder.cache.used == 0


def test_files_that_are_not_whole_are_replaced(families, tmp_path):
    image = random_image(1)
    with engine(families["llama"], image_cache_bytes=0, image_cache_dir=tmp_path) as vlm:
        want = vlm.read_prompt("a", image, BY_SCORE)
        (path,) = tmp_path.iterdir()
        good = path.read_bytes()
        vlm.read_prompt("a", random_image(2), BY_SCORE)
        (other,) = set(tmp_path.iterdir()) - {path}
        flipped = lambda at: good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        bad = [
            b"",
            good[:20],
            good[:-1],
            good + b"x",
            good[: len(good) // 2],
            b"\0" * len(good),
            flipped(0),
            flipped(60),
            flipped(-33),
        ]
        for data in [*bad, other.read_bytes(), os.urandom(len(good))]:
            path.write_bytes(data)
            assert not same(vlm.read_prompt("a", image, BY_SCORE), want).images[0].cached
            assert path.read_bytes() == good
            assert same(vlm.read_prompt("a", image, BY_SCORE), want).images[0].cached
        # a checksum that is right, over: cells outside the image, a score too few, other counts than the image's,
        # unknown flags
        body = good[:-32]
        cells = len(body) - 4 * 49 - 8 * 49
        field = lambda i, value: body[: 40 + 4 * i] + value.to_bytes(4, "little") + body[44 + 4 * i :]
        outside = body[:cells] + (49).to_bytes(8, "little") + body[cells + 8 :]
        for data in (
            outside,
            body[:-4],
            field(0, 48),
            field(1, 255),
            field(2, 0),
            field(2, 2),
            field(3, 0),
            field(3, 7),
        ):
            path.write_bytes(data + image_cache.hashlib.sha256(data).digest())
            assert not same(vlm.read_prompt("a", image, BY_SCORE), want).images[0].cached
        path.unlink()
        path.mkdir()
        assert not same(vlm.read_prompt("a", image, BY_SCORE), want).images[0].cached
        path.rmdir()
        path.symlink_to(other)
        assert not same(vlm.read_prompt("a", image, BY_SCORE), want).images[0].cached
        assert not path.is_symlink() and {p.suffix for p in tmp_path.iterdir()} == {".starimg"}


def test_a_directory_that_was_removed_is_made_again(families, tmp_path):
    folder = tmp_path / "cache"
    with engine(families["llama"], image_cache_bytes=0, image_cache_dir=folder) as vlm:
        cached = lambda: vlm.read_prompt("a", random_image(1), None)[1].images[0].cached
        assert [cached(), cached()] == [False, True]
        shutil.rmtree(folder)
        assert [cached(), cached()] == [False, True]
        shutil.rmtree(folder)
        folder.write_text("a file now")
        assert [cached(), cached()] == [False, False] and folder.read_text() == "a file now"


def test_another_encoder_or_setting_shares_nothing(families, tmp_path):
    image = random_image(1)
    hits = lambda models, **options: _hits(models, image, tmp_path, options)
    assert hits(families["llama"]) == 0
    assert hits(families["llama"]) == 1
    assert hits(families["llama"], flash_attn=False) == 0
    assert hits(families["llama"], image_min_tokens=4) == 0
    other = replace(families["llama"], mmproj=tmp_path / "mmproj.gguf")  # of the same shape
    write_encoder(other.mmproj, CLIP, other.shape.n_embd, "f32", seed=3)
    assert [hits(other), hits(other), hits(families["llama"]), hits(families["qwen2vl"])] == [0, 1, 1, 0]


def _hits(models, image, folder, options):
    with engine(models, image_cache_bytes=0, image_cache_dir=folder, **options) as vlm:
        return int(vlm.read_prompt("a", image, None)[1].images[0].cached)


def test_the_directory_is_bounded(families, tmp_path, monkeypatch):
    with engine(families["llama"], image_cache_bytes=0, image_cache_dir=tmp_path) as vlm:
        (tmp_path / "note.txt").write_text("mine")
        (tmp_path / "old.starimg-part").write_bytes(b"x")
        os.utime(tmp_path / "old.starimg-part", (0, 0))
        vlm.read_prompt("a", random_image(0), None)
        (first,) = tmp_path.glob("*.starimg")
        monkeypatch.setattr(image_cache, "DIRECTORY_BYTES", 3 * first.stat().st_size)
        for seed in (1, 2):
            vlm.read_prompt("a", random_image(seed), None)
        for i, path in enumerate(sorted(tmp_path.glob("*.starimg"), key=lambda p: p.stat().st_mtime_ns)):
            os.utime(path, (1000 + i, 1000 + i))
        cached = lambda seed: vlm.read_prompt("a", random_image(seed), None)[1].images[0].cached
        assert cached(0)  # used again, so the next one to go is 1
        assert not cached(3) and len(list(tmp_path.glob("*.starimg"))) == 3
        assert [cached(0), cached(2), cached(1)] == [True, True, False]
    assert (tmp_path / "note.txt").read_text() == "mine" and not list(tmp_path.glob("*-part"))


def test_a_later_process_finds_the_directory(families, tmp_path):
    models = families["llama"]
    script = (
        "import sys, numpy as np; sys.path.insert(0, sys.argv[1]); import conftest; "
        "from helpers.models import random_image; from star_edge import StarVLM\n"
        "vlm = StarVLM(*sys.argv[2:4], n_ctx=512, n_threads=1, image_cache_dir=sys.argv[4])\n"
        "state, report = vlm.read_prompt('a', random_image(1), 'balanced')\n"
        "print(report.images[0].cached, state.logits.tobytes().hex())\n"
    )
    command = [sys.executable, "-c", script, os.path.dirname(__file__), models.text, models.mmproj, tmp_path]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.split()
        for _ in range(2)
    )
    assert (first[0], second[0]) == ("False", "True") and first[1] == second[1]


def test_bad_sizes_and_directories_are_refused(families, tmp_path):
    (tmp_path / "file").write_text("")
    for options in ({"image_cache_bytes": -1}, {"image_cache_bytes": 1.5}, {"image_cache_dir": tmp_path / "file"}):
        with pytest.raises(errors.ConfigError, match="image_cache"):
            engine(families["llama"], **options)
