"""Resolution as an axis: how many tokens a picture takes, and pictures that are made smaller for a request.

Oracles: the tokens of a request that was encoded, Qwen2-VL's own formula, and the engine that gets the smaller picture.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.serving import Server, data_url
from llama_cpp import Llama
from PIL import Image

from star_edge import PruneConfig, StarChatHandler, StarVLM, errors, refvlm
from star_edge.batch import Settings, read_tasks
from star_edge.evaluation.configs import choose_configs
from star_edge.pruning.presets import override

FIXTURES = Path(__file__).parent / "fixtures"
ANY_SIZE = ("qwen2-vl", "qwen3-vl", "pixtral")
CROPS = ("internvl", "llava-next", "minicpmv")
FIXED = ("llava", "gemma3", "smolvlm")


def files(family):
    return FIXTURES / family / "text.gguf", FIXTURES / family / "mmproj.gguf"


def engine(family, **options):
    return StarVLM(*files(family), n_ctx=2048, n_threads=1, **options)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def qwen():
    with engine("qwen2-vl") as vlm:
        yield vlm


# ---- counting ----


@pytest.mark.parametrize("family", [*ANY_SIZE, *CROPS, *FIXED])
def test_counts_are_those_of_a_request(family):
    with engine(family) as vlm:
        for size in ((96, 160), (300, 200)):
            pixels = picture(*size)
            _, report = vlm.read_prompt("<__media__>a", pixels, None, chat=False)
            assert vlm.count_tokens(pixels) == report.n_image_tokens == report.n_full_tokens
            assert report.full_tokens == []


def smart_resize(height, width, unit=28, least=8):
    """Tokens of Qwen2-VL (transformers, image_processing_qwen2_vl.smart_resize), above its least number of pixels."""
    assert height * width > least * unit * unit
    return max(1, round(height / unit)) * max(1, round(width / unit))


@pytest.mark.parametrize("size", [(480, 640), (641, 479), (1000, 120), (300, 300)])
@pytest.mark.parametrize("most", [0.5, 0.25, 100, 40])
def test_the_largest_that_fits(qwen, size, most):
    """Against every side in steps of half a pixel. Sides are rounded to units, so some more than the best may fit."""
    height, width = size
    n = smart_resize(height, width)
    assert qwen.count_tokens(picture(*size)) == n
    goal = most if isinstance(most, int) else max(1, int(most * n + 0.5))
    if n <= goal:
        assert qwen.count_tokens(picture(*size), most) == n
        return
    scales = np.arange(40, 2 * max(size)) / (2 * max(size))
    counts = [smart_resize(round(height * s), round(width * s)) for s in scales if height * width * s * s > 6600]
    best = max(count for count in counts if count <= goal)
    got = qwen.count_tokens(picture(*size), most)
    assert 0.9 * best <= got <= goal


@pytest.mark.parametrize("family", CROPS)
def test_crops_come_in_steps(family):
    with engine(family) as vlm:
        full, least = vlm.count_tokens(picture(480, 640)), vlm.count_tokens(picture(24, 32))
        counts = [vlm.count_tokens(picture(480, 640), most) for most in (1.0, 0.75, 0.5, 0.25, 0.1, 1)]
        assert counts[0] == full and counts == sorted(counts, reverse=True) and counts[-1] >= min(full, least) * 0.99
        for most, count in zip((0.75, 0.5, 0.25), counts[1:]):
            assert count <= max(most * full + 0.5, least) or count == full


@pytest.mark.parametrize("family", FIXED)
def test_a_model_of_one_size_gets_the_picture_as_it_is(family):
    with engine(family) as vlm:
        pixels = picture(200, 300)
        assert vlm.count_tokens(pixels, 0.25) == vlm.count_tokens(pixels, 1) == vlm.count_tokens(pixels)
        plain, _ = vlm.read_prompt("<__media__>a", pixels, None, chat=False)
        logits = plain.logits.copy()
        small, report = vlm.read_prompt("<__media__>a", pixels, PruneConfig(image_max_tokens=0.25), chat=False)
        assert np.array_equal(small.logits, logits) and report.full_tokens == []
        n = report.n_image_tokens
        (note,) = report.notes
        assert note == f"image_max_tokens=0.25 cannot be kept to: this model makes {n} tokens or more of such a picture"


def test_a_stream_goes_on_while_a_picture_is_counted(qwen):
    pixels = picture(140, 140)
    whole = qwen.generate("<__media__>a", pixels, None, 6, chat=False).text
    stream = qwen.generate("<__media__>a", pixels, None, 6, chat=False, stream=True)
    pieces = [next(stream)]
    assert qwen.count_tokens(picture(280, 280)) == 100
    assert "".join([*pieces, *stream]) == whole


def test_what_cannot_be_counted(qwen):
    for most in (0, 0.0, 1.5, "half", None, True, float("nan")):
        with pytest.raises(errors.ConfigError, match="image_max_tokens"):
            qwen.count_tokens(picture(64, 64), most)
    with pytest.raises(errors.ImageError):
        qwen.count_tokens("nope.png")
    text_only = StarVLM(refvlm.TEXT_MODEL, n_ctx=256)
    with text_only, pytest.raises(errors.UnsupportedModelError, match="mmproj"):
        text_only.count_tokens(refvlm.DEMO_IMAGE)
    with pytest.raises(errors.EngineClosedError):
        text_only.count_tokens(refvlm.DEMO_IMAGE)


# ---- requests ----


@pytest.mark.parametrize("family", [*ANY_SIZE, "internvl"])
@pytest.mark.parametrize("prune", [PruneConfig(), PruneConfig(0.5, 0.25)], ids=["unpruned", "pruned"])
def test_a_request_is_one_about_the_smaller_picture(family, prune):
    """Bit for bit that of an engine which gets the picture as Pillow makes it smaller."""
    pixels, other = picture(310, 250), picture(230, 190, 1)
    config = override(prune, image_max_tokens=0.4)
    with engine(family) as vlm:
        full = vlm.count_tokens(pixels)
        n = vlm.count_tokens(pixels, 0.4)
        assert n < full
        height, width = vlm._reader.fit(pixels, config).pixels.shape[:2]
        small = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
        assert abs(height / width - 310 / 250) < 0.02 * 310 / 250 and vlm.count_tokens(small) == n
        question = "<__media__>one<__media__>two"
        asked, report = vlm.read_prompt(question, [pixels, other], config, chat=False)
        logits = asked.logits.copy()
        second = vlm._reader.fit(other, config).pixels  # a share is one of each picture
        expected, plain = vlm.read_prompt(question, [small, second], prune, chat=False)
        assert np.array_equal(logits, expected.logits)
    assert family == "internvl" or not [note for note in report.notes if "image_max_tokens" in note]
    assert report.full_tokens[0] == full and report.n_image_tokens == plain.n_image_tokens
    assert report.pictures[0]["n_tokens"] == n and report.n_full_tokens > report.n_image_tokens
    assert report.figures()["n_full_tokens"] == sum(report.to_dict()["full_tokens"])


def test_no_more_than_stock_with_the_option(qwen):
    """libmtmd's image_max_tokens, which holds for all pictures of a model, is kept to as well as here."""
    pixels = picture(480, 640)
    with engine("qwen2-vl", image_max_tokens=100) as vlm:
        stock = vlm.count_tokens(pixels)
    ours = qwen.count_tokens(pixels, 100)
    assert 0.9 * stock <= ours <= 100 and stock <= 100


def test_a_picture_that_is_too_large_can_be_asked_about():
    """Gemma 4 has a table of positions, and refuses larger pictures: a count makes them small enough."""
    with engine("gemma4") as vlm:
        pixels = picture(480, 640)
        with pytest.raises(errors.ImageError, match="positions"):
            vlm.count_tokens(pixels)
        _, report = vlm.read_prompt("<__media__>a", pixels, PruneConfig(image_max_tokens=100), chat=False)
        assert 50 <= report.n_image_tokens <= 100
        assert report.full_tokens == [None] and report.n_full_tokens is None
        assert json.loads(json.dumps(report.to_dict()))["n_full_tokens"] is None


def test_the_chat_handler_does_the_same(qwen, tmp_path):
    Image.fromarray(picture(310, 250)).save(tmp_path / "a.png")
    config = PruneConfig(image_max_tokens=0.4)
    handler = StarChatHandler(str(files("qwen2-vl")[1]), prune=config, chat_template="vicuna", verbose=False)
    with pytest.raises(errors.ConfigError, match="attach"):
        handler.count_tokens(str(tmp_path / "a.png"))
    llama = Llama(str(files("qwen2-vl")[0]), n_ctx=1024, n_threads=1, verbose=False, chat_handler=handler)
    try:
        parts = [{"type": "image_url", "image_url": {"url": str(tmp_path / "a.png")}}, {"type": "text", "text": "a"}]
        answer = llama.create_chat_completion([{"role": "user", "content": parts}], max_tokens=1)
        n = qwen.count_tokens(tmp_path / "a.png", 0.4)
        assert answer["star_edge"]["n_image_tokens"] == n == handler.count_tokens(str(tmp_path / "a.png"), 0.4)
        assert answer["star_edge"]["full_tokens"] == [qwen.count_tokens(tmp_path / "a.png")]
        assert handler.count_tokens(str(tmp_path / "a.png")) == answer["star_edge"]["n_full_tokens"]
        answer = llama.create_chat_completion([{"role": "user", "content": parts}], max_tokens=1)
        assert answer["star_edge"]["n_cached"] == 1  # the smaller picture is found again
    finally:
        llama.close()


# ---- what is redundant does not count ----


def letter(height, width, share, seed=0):
    """White paper, but for noise in the first `share` of its height."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[: round(height * share)] = picture(round(height * share), width, seed)
    return pixels


def entered(vlm, pixels, redundancy, most=1.0):
    """The report of a request, and tokens that entered the encoder."""
    config = PruneConfig(redundancy=redundancy, image_max_tokens=most)
    _, report = vlm.read_prompt("<__media__>a", pixels, config, chat=False)
    return report, report.n_image_tokens - report.n_redundant


@pytest.mark.parametrize("family", ANY_SIZE)
def test_a_picture_stays_as_it_is_if_what_enters_is_little(family):
    """Bit for bit a request without a limit."""
    pixels = letter(448, 448, 0.2)
    with engine(family) as vlm:
        question, full = "<__media__>a", vlm.count_tokens(pixels)
        whole, _ = vlm.read_prompt(question, pixels, PruneConfig(redundancy="exact"), chat=False)
        logits = whole.logits.copy()
        config = PruneConfig(redundancy="exact", image_max_tokens=0.6)
        limited, report = vlm.read_prompt(question, pixels, config, chat=False)
        assert np.array_equal(limited.logits, logits)
        assert report.n_image_tokens == full and report.full_tokens == [] and report.notes == []
        assert report.n_image_tokens - report.n_redundant <= 0.6 * full
        assert vlm.count_tokens(pixels, 0.6, "exact") == full > vlm.count_tokens(pixels, 0.6)


@pytest.mark.parametrize(("share", "most"), [(0.5, 0.3), (0.3, 0.25), (0.8, 0.5), (0.4, 60)])
def test_the_largest_of_which_so_many_enter(qwen, share, most):
    """Against requests about the picture at every size: no more than the limit, and close to the best below it."""
    pixels = letter(560, 448, share)
    n = qwen.count_tokens(pixels)
    goal = most if isinstance(most, int) else int(most * n + 0.5)
    report, count = entered(qwen, pixels, "exact", most)
    assert count <= goal and report.full_tokens == [n] and report.notes == []
    found = []
    for scale in np.arange(0.3, 1, 0.01):
        size = (round(448 * scale), round(560 * scale))
        small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        found.append(entered(qwen, small, "exact")[1])
    assert count >= 0.85 * max(n for n in found if n <= goal)
    assert report.n_image_tokens > qwen.count_tokens(pixels, most)
    assert report.n_image_tokens == qwen.count_tokens(pixels, most, "exact")


def test_where_nothing_is_redundant_the_limit_is_one_of_all_tokens(qwen):
    pixels = picture(310, 250)
    report, count = entered(qwen, pixels, 0.05, 0.4)
    assert report.n_redundant == 0 and count == qwen.count_tokens(pixels, 0.4) == qwen.count_tokens(pixels, 0.4, 0.05)


def test_an_encoder_of_whole_pictures_counts_all():
    pixels = letter(448, 448, 0.2)
    with engine("internvl") as vlm:
        assert vlm.count_tokens(pixels, 0.5, "auto") == vlm.count_tokens(pixels, 0.5)
        with pytest.raises(errors.ConfigError, match="redundancy"):
            vlm.count_tokens(pixels, 0.5, "some")


# ---- configs and commands ----


def test_a_config_takes_a_share_or_a_count():
    assert PruneConfig(image_max_tokens=np.int64(64)).image_max_tokens == 64
    assert PruneConfig(**PruneConfig(image_max_tokens=0.5).to_dict()) == PruneConfig(image_max_tokens=0.5)
    assert override(None, image_max_tokens=0.5) == PruneConfig(image_max_tokens=0.5)
    for value in (0, 1.5, "1", None):
        with pytest.raises(errors.ConfigError, match="image_max_tokens"):
            PruneConfig(image_max_tokens=value)


def test_a_smaller_picture_is_a_config_to_compare():
    configs, _ = choose_configs(["fast"], {"image_max_tokens": [0.5, 64]})
    assert [(c.name, c.method) for c in configs[2:]] == [
        ("picture 0.5", "smaller picture"),
        ("picture 64", "smaller picture"),
    ]
    assert configs[2].prune == PruneConfig(image_max_tokens=0.5) and configs[3].prune == PruneConfig(
        image_max_tokens=64
    )
    configs, _ = choose_configs(budget={"image_max_tokens": [0.5], "vision_keep": [0.5, 0.25]})
    assert [(c.name, c.method) for c in configs[1:]] == [(f"picture 0.5 vision {keep}", "grid") for keep in (0.5, 0.25)]


MODEL = ("-m", str(files("qwen2-vl")[0]), "--mmproj", str(files("qwen2-vl")[1]), "--chat-template", "vicuna", "-t", "1")


def test_commands(star_edge, tmp_path, qwen):
    Image.fromarray(picture(310, 250)).save(tmp_path / "a.png")
    full, half = qwen.count_tokens(tmp_path / "a.png"), qwen.count_tokens(tmp_path / "a.png", 0.5)
    run = ("run", *MODEL, "--image", "a.png", "--preset", "off", "--image-max-tokens", "0.5", "-n", "1", "hi")
    report = json.loads(star_edge(*run, "--json").stdout)["report"]
    assert (report["n_full_tokens"], report["n_image_tokens"], report["average_tokens"]) == (full, half, half)
    assert f"image tokens {full} -> {half}" in star_edge(*run).stderr
    assert "--image-max-tokens 2.0" in star_edge(*run[:-3], "--image-max-tokens", "2.0", "hi", status=2).stderr
    plan = json.loads(star_edge("doctor", *MODEL, "--image", "a.png", "--no-check", "--json").stdout)["plan"]
    assert (plan["image"], plan["image_tokens"]) == ("250x310", full)
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "question": "hi"}\n')
    args = ("eval", "q.jsonl", *MODEL, "--preset", "fast", "--image-max-tokens", "0.5", "-n", "1", "--json")
    rows = json.loads(star_edge(*args).stdout)["configs"]
    assert [row["name"] for row in rows] == ["off", "fast", "picture 0.5"]
    assert [row["average_tokens"] for row in rows][::2] == [full, half]
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "prompt": "hi", "image_max_tokens": 0.5}\n')
    assert read_tasks(tmp_path / "t.jsonl", None, Settings(None))[0].settings.prune == PruneConfig(image_max_tokens=0.5)


def test_routes_of_the_server(qwen, tmp_path):
    Image.fromarray(picture(310, 250)).save(tmp_path / "a.png")
    Image.fromarray(letter(310, 250, 0.3)).save(tmp_path / "b.png")
    full, half = qwen.count_tokens(tmp_path / "a.png"), qwen.count_tokens(tmp_path / "a.png", 0.5)
    part = {"type": "image_url", "image_url": {"url": data_url(tmp_path / "a.png")}}
    body = {"messages": [{"role": "user", "content": [part, part, {"type": "text", "text": "hi"}]}], "max_tokens": 1}
    post = lambda path, body: server.request("POST", path, body)[::2]
    server = Server(*MODEL[:-2], "-c", "1024")
    try:
        status, answer = post("/v1/image_tokens", body)
        assert (status, answer) == (
            200,
            {"n_tokens": 2 * full, "images": [{"n_tokens": full, "n_full_tokens": full}] * 2},
        )
        status, answer = post("/v1/image_tokens", {**body, "prune": {"image_max_tokens": 0.5}})
        assert (status, answer["n_tokens"]) == (200, 2 * half) and answer["images"][0]["n_full_tokens"] == full
        status, answer = post("/v1/chat/completions", {**body, "prune": {"image_max_tokens": 0.5}})
        assert status == 200 and answer["star_edge"]["n_image_tokens"] == 2 * half
        assert answer["star_edge"]["full_tokens"] == [full, full]
        page = {"type": "image_url", "image_url": {"url": data_url(tmp_path / "b.png")}}
        body["messages"][0]["content"] = [page, {"type": "text", "text": "hi"}]
        sparing = {**body, "prune": {"image_max_tokens": 0.5, "redundancy": "exact"}}
        status, counted = post("/v1/image_tokens", sparing)
        status, answer = post("/v1/chat/completions", sparing)
        assert counted["n_tokens"] == answer["star_edge"]["n_image_tokens"] > half
        for wrong, words in (
            ({"messages": []}, "messages"),
            ({**body, "prune": {"image_max_tokens": 1}}, "image_max_tokens=1 may be one token or all"),
            ({**body, "prune": {"image_max_tokens": 7.5}}, "image_max_tokens=7.5"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image"),
        ):
            status, answer = post("/v1/image_tokens", wrong)
            assert status == 400 and words in answer["error"]["message"]
    finally:
        server.stop()
