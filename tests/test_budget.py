"""Images that share their tokens: crops of one picture, and the frames of a prompt."""

from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.choosing import distances
from helpers.gguf_files import rewrite
from helpers.models import random_image
from threadpoolctl import threadpool_info, threadpool_limits

from star_edge import PRESETS, PruneConfig, StarVLM, refvlm
from star_edge.cli import cli
from star_edge.errors import ConfigError, ContextLengthError
from star_edge.evaluation.configs import parse_values
from star_edge.io.images import load_image
from star_edge.llamacpp.context import DecoderContext
from star_edge.pruning import budget
from star_edge.pruning import choose as choose_module
from star_edge.pruning.blas import one_blas_thread
from star_edge.pruning.config import keep_count
from star_edge.pruning.selection import PLACE_WEIGHT, Tokens
from star_edge.server.schema import parse_prune

RNG = np.random.default_rng(3)
METHODS = [name for name, config in PRESETS.items() if config is not None]
# Without the stages before and in the encoder, which have their own tests
WHOLE = {"encoder_keep": 1.0, "encoder_tolerance": None, "redundancy": "off"}


# ---- how a number is divided ----


def test_parts_add_up_within_their_bounds():
    for _ in range(300):
        n = int(RNG.integers(1, 9))
        most = RNG.integers(1, 60, n)
        floors = np.minimum(most, RNG.integers(0, 4, n))
        total = int(RNG.integers(floors.sum(), most.sum() + 1))
        counts = np.array(budget._apportion(RNG.random(n) ** 3 * total, floors, most, total))
        assert counts.sum() == total and (counts >= floors).all() and (counts <= most).all()


def test_in_proportion():
    assert budget.in_proportion(10, [20, 20, 40]) == [3, 2, 5]
    assert budget.in_proportion(3, [100, 1, 0, 1]) == [1, 1, 0, 1]
    assert budget.in_proportion(7, [7]) == [7] and budget.in_proportion(0, [0]) == [0]


def parts_of(*vectors, grid=(6, 6), **fields):
    return [Tokens(np.asarray(v, np.float32), np.arange(len(v)), grid, **fields) for v in vectors]


def smooth(seed, n=6, d=24):
    """(n * n, d): neighbours are alike."""
    rng = np.random.default_rng(seed)
    waves = rng.standard_normal((2, 2, d)).repeat(n // 2, 0).repeat(n // 2, 1)
    return (waves + 0.3 * rng.standard_normal((n, n, d))).reshape(n * n, d)


def test_distances_between_images():
    small, large, other = Tokens(smooth(0), np.arange(36), (6, 6)), smooth(1), smooth(2)
    small.vectors, small.cells, small.grid = small.vectors[:9], np.array([0, 1, 2, 3, 4, 5, 6, 7, -1]), (3, 3)
    tokens = budget.join([small, *parts_of(large, other)], [0, 1, 1])
    unit = tokens.vectors / np.linalg.norm(tokens.vectors, axis=1, keepdims=True)
    place = np.full((81, 81), np.nan)
    where = [(2 * (i // 3), 2 * (i % 3)) if i < 8 else None for i in range(9)] + [divmod(i % 36, 6) for i in range(72)]
    of = [0] * 9 + [1] * 36 + [2] * 36
    for i in range(81):
        for j in range(81):
            if where[i] is not None and where[j] is not None and (of[i] == of[j] or 0 in (of[i], of[j])):
                place[i, j] = np.hypot(where[i][0] - where[j][0], where[i][1] - where[j][1])
    place = np.nan_to_num(place / np.nanmean(place), nan=1.0)
    content = np.maximum(1 - unit @ unit.T, 0)
    want = content / content.mean() + PLACE_WEIGHT * place
    np.fill_diagonal(want, 0)
    assert np.allclose(distances(tokens), want, atol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("k", [12, 27, 40])
def test_a_repeated_frame_has_nothing_of_its_own(k, noise):
    frame, other = smooth(0), smooth(1)
    repeat = frame + noise * RNG.standard_normal(frame.shape)
    counts = budget.by_distinctness(budget.join(parts_of(frame, repeat, other), [0, 1, 2]), k)
    assert counts.sum() == k and counts[1] == 0 and min(counts[0], counts[2]) > k / 4


def test_what_moves_is_new():
    """The same content at other places of the image is no repetition."""
    frame = smooth(0)
    moved = np.roll(frame.reshape(6, 6, -1), 3, axis=1).reshape(36, -1)
    tokens = lambda second: budget.join(parts_of(frame, second), [0, 1])
    still, moving = (budget.by_distinctness(tokens(second), 20)[1] for second in (frame, moved))
    assert still == 0 < moving


def test_many_tokens_are_sampled_alike():
    frame, other = smooth(0, 30), smooth(1, 30)
    parts = parts_of(frame, frame, other, grid=(30, 30))
    counts = budget.divide(parts, [0, 1, 2], [900] * 3, 900, budget.by_distinctness, True)
    assert sum(counts) == 900 and counts[1] == 75 and min(counts[0], counts[2]) > 300  # the floor: a quarter of 300
    joint = budget.join(parts, [0, 1, 2], budget.MAX_JOINT)
    assert abs(len(joint) - budget.MAX_JOINT) < 3 and len(budget.join(parts, [0, 1, 2])) == 2700


@pytest.mark.parametrize(("total", "least"), [(3, 1), (5, 1), (60, 5), (108, 36)])
def test_no_image_starves(total, least):
    parts = parts_of(smooth(0), smooth(1), smooth(2))
    all_to_first = lambda tokens, k: np.array([k, 0, 0])
    counts = budget.divide(parts, [0, 0, 0], [36] * 3, total, all_to_first, False)
    assert sum(counts) == total and counts[1] == counts[2] and counts[1] >= least and counts[0] <= 36
    with pytest.raises(ValueError, match="cannot keep 2 of 108"):
        budget.divide(parts, [0, 0, 0], [36] * 3, 2, all_to_first, False)


def test_an_image_without_tokens_gets_none():
    parts = [*parts_of(smooth(0), smooth(1)), Tokens(np.empty((0, 24), np.float32), np.empty(0, np.int64), (6, 6))]
    assert (
        budget.divide([parts[0], parts[2], parts[1]], [0, 0, 0], [36, 0, 36], 20, budget.by_distinctness, True)[1] == 0
    )


# ---- crops ----


@pytest.fixture(scope="module")
def sliced(families, tmp_path_factory):
    """A LLaVA that gets a picture of 196 x 196 as 2 x 2 tiles and an overview, 49 tokens each."""
    path = tmp_path_factory.mktemp("sliced") / "mmproj.gguf"
    return rewrite(families["llama"].mmproj, path, add=[("clip.vision.image_grid_pinpoints", [196, 196])])


def load(families, mmproj, **options):
    return StarVLM(families["llama"].text, mmproj, **{"n_ctx": 1024, "n_threads": 1, **options})


def busy_corner():
    """Grey, but for one quarter."""
    picture = np.full((196, 196, 3), 120, np.uint8)
    picture[:98, 98:] = random_image(5)
    return picture


def kept_counts(report):
    return [len(i.vision_kept) for i in report.images], [len(i.decoder_kept) for i in report.images]


@pytest.mark.parametrize("cached", [True, False])
def test_crops_of_a_picture_are_known(families, sliced, cached):
    with load(families, sliced, image_cache_bytes=2**20 if cached else 0) as vlm:
        for _ in range(2):
            pictures = [busy_corner(), random_image(1), busy_corner()]
            _, report = vlm.read_prompt("what?", pictures, None)
            of = [i.picture for i in report.images]
            assert of == sorted(of) and set(of) == {0, 1, 2} and of.count(0) == of.count(2) == 5
            assert [p["n_tokens"] for p in report.pictures] == [49 * of.count(n) for n in range(3)]
            assert sum(p["n_vision_kept"] for p in report.pictures) == report.n_vision_kept
            assert report.figures()["pictures"] == report.to_dict()["pictures"] == report.pictures
        assert min(report.picture(pictures[0], 0).size) > 100  # each crop's grid beside the picture: test_crops.py


@pytest.mark.parametrize("method", METHODS)
def test_crops_share_the_tokens_of_their_picture(families, sliced, method):
    config = replace(PRESETS[method], **WHOLE)
    with load(families, sliced) as vlm:
        for keep in (0.3, 50):
            stages = (
                {"windows": ((2, 0.2), (4, 20))}
                if config.windows
                else {"decoder_keep": 0.15 if keep == 0.3 else 25, "decoder_layer": 3}
            )
            _, report = vlm.read_prompt(
                "what?",
                [busy_corner(), random_image(2, 196, 196)],
                replace(config, vision_keep=keep, vision_tolerance=None, **stages),
            )
            total = keep_count("k", keep, 245)
            last = 20 if config.windows else keep_count("k", stages["decoder_keep"], 245)
            assert [p["n_vision_kept"] for p in report.pictures] == [total] * 2
            assert [p["n_decoder_kept"] for p in report.pictures] == [last] * 2
            vision, decoder = kept_counts(report)
            assert min(vision) >= total / 5 // 4 and min(decoder) >= max(1, last / 5 // 4)


@pytest.mark.parametrize("config", [PruneConfig(0.2), PruneConfig(0.2, vision_scorer="maxmin", representatives="none")])
def test_a_crop_that_repeats_another_gets_few_tokens(families, sliced, config):
    """Of the three grey tiles the first shows what they have (the encoder's positions), and the overview all four in
    small.
    """
    with load(families, sliced) as vlm:
        _, report = vlm.read_prompt("what?", busy_corner(), config)
    first, busy, *repeats = kept_counts(report)[0][:4]
    assert repeats == [2, 2] and min(first, busy) > 10  # a quarter of 49 / 5 is their floor


def test_every_crop_keeps_one(families, sliced):
    with load(families, sliced) as vlm:
        _, report = vlm.read_prompt("what?", busy_corner(), PruneConfig(2, 1, 2))
        assert kept_counts(report) == ([1] * 5, [1] * 5)
        with pytest.raises(ConfigError, match="246 is over the image's 245 tokens"):
            vlm.read_prompt("what?", busy_corner(), PruneConfig(246))


def test_sliced_pictures_are_exact_and_their_encodings_found_again(families, sliced):
    with load(families, sliced, flash_attn=False) as vlm:
        stock, _ = vlm.read_prompt("what?", busy_corner(), None)
        for shared in ("image", "prompt"):
            state, report = vlm.read_prompt("what?", busy_corner(), PruneConfig(decoder_layer=3, budget=shared))
            assert np.array_equal(state.logits, stock.logits) and report.n_decoder_kept == 245
        assert all(i.cached for i in report.images)


# ---- frames ----


def noisy(image, seed=0):
    return np.clip(image.astype(int) + np.random.default_rng(seed).integers(-2, 3, image.shape), 0, 255).astype(
        np.uint8
    )


@pytest.mark.parametrize("repeat", ["same", "noisy"])
@pytest.mark.parametrize("method", ["balanced", "star", "visionzip", "divprune"])
def test_a_frame_that_repeats_another_gets_few_tokens(families, method, repeat):
    models = families["qwen2vl"]
    frame, other = random_image(1, 168, 168), random_image(2, 168, 168)
    frames = [frame, frame if repeat == "same" else noisy(frame), other]
    own = replace(PRESETS[method], **WHOLE, vision_keep=0.4, vision_tolerance=None, decoder_keep=0.2, decoder_layer=3)
    with StarVLM(models.text, models.mmproj, n_ctx=512, n_threads=1) as vlm:
        _, alone = vlm.read_prompt("what?", frames, own)
        _, shared = vlm.read_prompt("what?", frames, replace(own, budget="prompt"))
    assert kept_counts(alone) == ([14] * 3, [7] * 3)
    vision, decoder = kept_counts(shared)
    assert sum(vision) == 42 and sum(decoder) == 21
    assert vision[1] == 3 and min(vision[0], vision[2]) > 3 * vision[1]  # a quarter of 14 is its floor
    assert min(decoder) >= 1
    for image in shared.images:
        if image.vision_mass is not None:
            assert np.isclose(image.vision_mass.sum(), 36)  # masses stay within their frame


def test_blind_baselines_give_every_frame_the_same(families):
    models = families["qwen2vl"]
    frame = random_image(1, 168, 168)
    with StarVLM(models.text, models.mmproj, n_ctx=512, n_threads=1) as vlm:
        config = PruneConfig(0.4, vision_scorer="uniform", representatives="none", budget="prompt")
        assert (
            kept_counts(vlm.read_prompt("what?", [frame, frame, random_image(2, 168, 168)], config)[1])[0] == [14] * 3
        )


def test_frames_of_the_bundled_model():
    first = load_image(refvlm.DEMO_IMAGE)
    second = np.ascontiguousarray(first[::-1, ::-1])
    config = PruneConfig(vision_keep=0.375, decoder_keep=0.1875, budget="prompt")
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=1024, n_threads=1) as vlm:
        _, report = vlm.read_prompt("is there a red star?", [first, first, noisy(first), second], config)
    vision, _ = kept_counts(report)
    assert sum(vision) == 4 * 54 and report.n_decoder_kept == 4 * 27
    assert vision[1] < vision[3] / 3 and vision[2] < vision[3] / 2


@pytest.mark.parametrize("representatives", ["none", "cluster"])
def test_the_questions_attention_divides_the_decoders_tokens(families, representatives):
    models = families["qwen2vl"]
    frames = [random_image(seed, 168, 168) for seed in range(3)]
    config = PruneConfig(0.5, 0.2, 3, representatives=representatives, budget="prompt")
    with StarVLM(models.text, models.mmproj, n_ctx=512, n_threads=1) as vlm:
        _, report = vlm.read_prompt("what?", frames, config)
    scores = np.concatenate(
        [i.decoder_scores / (1 if i.vision_mass is None else np.sqrt(i.vision_mass)) for i in report.images]
    )
    frame = np.repeat([0, 1, 2], [len(i.vision_kept) for i in report.images])
    wanted = np.bincount(frame[np.argsort(-scores)[:21]], minlength=3)
    counts = kept_counts(report)[1]
    assert sum(counts) == 21 and wanted.min() >= 1 and counts == wanted.tolist()


def test_one_image_is_as_ever(families):
    models = families["qwen2vl"]
    image = random_image(1, 168, 168)
    with StarVLM(models.text, models.mmproj, n_ctx=512, n_threads=1, reuse=False) as vlm:
        for method in METHODS:
            config = replace(PRESETS[method], **WHOLE, vision_tolerance=None)
            states = [vlm.read_prompt("what?", image, replace(config, budget=b)) for b in ("image", "prompt")]
            assert np.array_equal(states[0][0].logits, states[1][0].logits)
            assert kept_counts(states[0][1]) == kept_counts(states[1][1])


def test_frames_are_exact_and_can_be_asked_about_again(families):
    models = families["qwen2vl"]
    frames = [random_image(1, 168, 168), random_image(1, 168, 168), random_image(2, 112, 168)]
    shared = PruneConfig(0.4, 0.2, 3, budget="prompt")
    with StarVLM(models.text, models.mmproj, n_ctx=512, n_threads=1, flash_attn=False) as vlm:
        stock, _ = vlm.read_prompt("what?", frames, None)
        whole, _ = vlm.read_prompt("what?", frames, PruneConfig(decoder_layer=3, budget="prompt"))
        assert np.array_equal(stock.logits, whole.logits)
        vlm.read_prompt("what?", frames, shared)
        again, report = vlm.read_prompt("and where?", frames, shared)
        assert report.reused_tokens > 0 and all(image.cached for image in report.images)
    with StarVLM(
        models.text, models.mmproj, n_ctx=512, n_threads=1, flash_attn=False, reuse=False, image_cache_bytes=0
    ) as vlm:
        fresh, expected = vlm.read_prompt("and where?", frames, shared)
    assert np.array_equal(again.logits, fresh.logits) and kept_counts(report) == kept_counts(expected)


def test_limits_are_of_the_sum_and_checked_first(families, monkeypatch):
    models = families["qwen2vl"]
    frames = [random_image(seed, 168, 168) for seed in range(6)]
    with StarVLM(models.text, models.mmproj, n_ctx=512, n_threads=1) as vlm:
        _, report = vlm.read_prompt("<__media__>" * 6 + "what?", frames, PruneConfig(0.75, budget="prompt"), chat=False)
        assert report.n_vision_kept == 162
        monkeypatch.setattr(DecoderContext, "decode", lambda *a, **k: pytest.fail("decoded"))
        with pytest.raises(ContextLengthError, match="216 image"):
            vlm.read_prompt(
                "<__media__>" * 6 + "what?" + "!" * 120, frames, PruneConfig(1.0, 0.2, budget="prompt"), chat=False
            )


def test_where_it_can_be_asked_for():
    with pytest.raises(ConfigError, match="budget='video' is unknown.*image, crop, prompt"):
        PruneConfig(budget="video")
    assert parse_prune({"vision_keep": 0.5, "budget": "prompt"}) == PruneConfig(0.5, budget="prompt")
    result = CliRunner().invoke(
        cli,
        ["run", "--image", str(refvlm.DEMO_IMAGE), "is there a red star?", "--budget", "prompt", "--json", "-n", "1"],
    )
    assert result.exit_code == 0 and '"budget": "prompt"' in result.output
    assert parse_values("budget", "image,prompt") == ["image", "prompt"]


# ---- BLAS ----


def blas_threads():
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_one_blas_thread_while_something_is_chosen(families, monkeypatch):
    seen = []
    select = choose_module.select
    monkeypatch.setattr(choose_module, "select", lambda *a: seen.append(blas_threads()) or select(*a))
    models = families["qwen2vl"]
    with threadpool_limits(2, user_api="blas"), StarVLM(models.text, models.mmproj, n_ctx=512, n_threads=1) as vlm:
        vlm.read_prompt("what?", random_image(1, 168, 168), PruneConfig(0.5))
        assert seen == [{1}] and blas_threads() == {2}
        with one_blas_thread():
            with one_blas_thread():
                pass
            assert blas_threads() == {1}
        with pytest.raises(KeyError), one_blas_thread():
            raise KeyError
        assert blas_threads() == {2}
