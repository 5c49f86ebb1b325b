"""Videos: which frames are taken, what stands around them, and that they share a budget. Files are made here."""

import base64
import io
import os
from fractions import Fraction

import numpy as np
import pytest
from helpers.serving import Server
from llama_cpp import Llama
from PIL import Image

from star_edge import PruneConfig, StarChatHandler, StarVLM, Video, refvlm
from star_edge.chat import ChatFormat
from star_edge.errors import ConfigError, ImageError, ImageTooLargeError, PromptError
from star_edge.frame_texts import frame_texts
from star_edge.io.images import ImageLimits, load_image
from star_edge.io.video import Frames, frame_times, read_video
from star_edge.messages import read_messages
from star_edge.vision.encoder import VisionEncoder

av = pytest.importorskip("av")


def grey(value, size=(64, 48)):
    return np.full((size[1], size[0], 3), value, np.uint8)


def clip(n=50, fps=10, container="mp4", codec="libx264", size=(64, 48), offset=0, key_frames=None):
    """A video whose frame i is grey of 5 i (i modulo 51)."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 8_000_000  # so that greys stay apart
        if key_frames:
            stream.codec_context.gop_size = key_frames
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(grey(5 * (i % 51), size), format="rgb24")
            frame.pts, frame.time_base = i + offset, Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def levels(frames):
    return [round(float(picture.mean()) / 5) for picture in frames.pictures]


def animation(colors, durations, form="GIF"):
    file = io.BytesIO()
    first, *rest = [Image.fromarray(grey(color)) for color in colors]
    options = {"lossless": True} if form == "WEBP" else {}
    first.save(file, form, save_all=True, append_images=rest, duration=durations, loop=0, **options)
    return file.getvalue()


# ---- which frames ----


def test_times_are_the_middles_of_equal_parts():
    assert frame_times(8.0, 4, None) == [1.0, 3.0, 5.0, 7.0]
    assert frame_times(8.0, None, None) == [0.5 + i for i in range(8)]
    assert frame_times(3.0, None, 2) == pytest.approx([0.25 + 0.5 * i for i in range(6)])
    assert frame_times(60.0, 4, 2) == [7.5, 22.5, 37.5, 52.5]  # no more than count
    assert len(frame_times(10_000.0, None, 30)) == 256


@pytest.mark.parametrize(
    "container, codec",
    [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4"), ("mpegts", "libx264")],
)
def test_frames_of_a_file_are_those_that_are_shown_at_the_times(container, codec):
    frames = read_video(Video(clip(container=container, codec=codec), count=5))
    assert levels(frames) == [5, 15, 25, 35, 45]
    assert frames.seconds == pytest.approx([0.5, 1.5, 2.5, 3.5, 4.5], abs=0.02)
    assert frames.duration == pytest.approx(5.0, abs=0.2)


def test_a_late_start_is_no_part_of_the_video():
    frames = read_video(Video(clip(container="mpegts", offset=100), count=5))
    assert levels(frames) == [5, 15, 25, 35, 45]
    assert frames.seconds == pytest.approx([0.5, 1.5, 2.5, 3.5, 4.5], abs=0.02)


def test_far_frames_are_found_by_key_frames():
    """One frame a second for 100 seconds; 3 frames are 33 seconds apart, so that the reader seeks."""
    frames = read_video(Video(clip(n=100, fps=1, key_frames=7), count=3))
    assert frames.seconds == pytest.approx([16, 50, 83])
    assert levels(frames) == [16, 50, 83 - 51]


def test_a_rate_takes_so_many_a_second_and_no_frame_twice():
    assert levels(read_video(Video(clip(n=20), rate=2))) == [2, 7, 12, 17]
    assert levels(read_video(Video(clip(n=4), count=100))) == [0, 1, 2, 3]


def test_a_turned_video_is_upright():
    """The display matrix of an MP4 file's track, as phones write it, says a quarter turn."""
    data = bytearray(clip(n=2, size=(64, 32)))
    at = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version and flags, times and ids, reserved, layer to volume
    assert int.from_bytes(data[at : at + 4], "big") == 0x10000
    quarter = [0, 0x10000, 0, -0x10000 & 0xFFFFFFFF, 0, 0, 0, 0, 0x40000000]  # clockwise by 90 degrees
    data[at : at + 36] = b"".join(value.to_bytes(4, "big") for value in quarter)
    assert read_video(Video(bytes(data), count=1)).pictures[0].shape == (64, 32, 3)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_turn_goes_the_way_that_the_matrix_says(turns):
    """ffmpeg's matrix turns the picture clockwise by 90, 180, 270 degrees: what was at the top left goes on its way."""
    file = io.BytesIO()
    pixels = grey(0, (64, 64))
    pixels[:32, :32] = 255  # top left
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    data = bytearray(file.getvalue())
    at = data.index(b"tkhd") + 44
    one, minus = 0x10000, -0x10000 & 0xFFFFFFFF
    a, b, c, d = {1: (0, one, minus, 0), 2: (minus, 0, 0, minus), 3: (0, minus, one, 0)}[turns]
    data[at : at + 36] = b"".join(v.to_bytes(4, "big") for v in (a, b, 0, c, d, 0, 0, 0, 0x40000000))
    picture = read_video(Video(bytes(data), count=1)).pictures[0]
    corners = [picture[:32, :32], picture[:32, 32:], picture[32:, 32:], picture[32:, :32]]  # clockwise
    assert int(np.argmax([corner.mean() for corner in corners])) == turns


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_frames_of_an_animation_follow_their_times(form):
    """Frames of 0.2, 0.6 and 0.2 s: in ten parts each is met; in two, the long one twice, and it is taken once."""
    data = animation([0, 100, 200], [200, 600, 200], form)
    frames = read_video(Video(data, count=10))
    assert [int(p.mean()) for p in frames.pictures] == [0, 100, 200]
    assert frames.seconds == pytest.approx([0.0, 0.2, 0.8]) and frames.duration == pytest.approx(1.0)
    assert [int(p.mean()) for p in read_video(Video(data, count=2)).pictures] == [100]


def test_a_still_picture_is_a_video_of_one_frame():
    with open(refvlm.DEMO_IMAGE, "rb") as file:
        frames = read_video(Video(file))
    assert len(frames.pictures) == 1 and np.array_equal(frames.pictures[0], load_image(refvlm.DEMO_IMAGE))


def test_a_folder_goes_by_the_numbers_in_its_names(tmp_path):
    for i in range(12):
        Image.fromarray(grey(5 * i)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert levels(read_video(Video(tmp_path, count=12))) == list(range(12))
    assert read_video(Video(str(tmp_path), count=4)).seconds is None
    frames = read_video(Video(tmp_path, rate=1, source_rate=3))
    assert levels(frames) == [1, 4, 7, 10] and frames.seconds == pytest.approx([1 / 3, 4 / 3, 7 / 3, 10 / 3])


def test_a_list_takes_what_pictures_may_be(tmp_path):
    Image.fromarray(grey(10)).save(tmp_path / "a.png")
    frames = read_video(Video([tmp_path / "a.png", grey(20), Image.fromarray(grey(30))]))
    assert levels(frames) == [2, 4, 6] and frames.seconds is None and frames.duration is None


def test_data_urls_and_paths_are_the_same_video(tmp_path):
    data = clip(n=10)
    (tmp_path / "clip.mp4").write_bytes(data)
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    expected = read_video(Video(data, count=2)).pictures
    for source in (url, tmp_path / "clip.mp4", str(tmp_path / "clip.mp4"), io.BytesIO(data)):
        assert all(np.array_equal(a, b) for a, b in zip(read_video(Video(source, count=2)).pictures, expected))


# ---- what is refused ----


@pytest.mark.parametrize("source", [b"", b"no video" * 99, clip(n=20)[:1500], "nowhere.mp4", [], [[]], 7, b"GIF89a"])
def test_what_is_no_video_is_an_image_error(source):
    with pytest.raises(ImageError):
        read_video(Video(source))


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{path}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {path}\n",
        '<?xml version="1.0"?><MPD><Period><AdaptationSet><BaseURL>file://{path}</BaseURL></AdaptationSet></Period></MPD>',
    ],
)
def test_a_file_may_not_name_others(tmp_path, text):
    """Playlists would read any file of the machine, or fetch any address."""
    (tmp_path / "secret.mp4").write_bytes(clip(n=3))
    playlist = text.format(path=tmp_path / "secret.mp4").encode()
    with pytest.raises(ImageError):
        read_video(Video(playlist))
    (tmp_path / "list.m3u8").write_bytes(playlist)
    with pytest.raises(ImageError):
        read_video(Video(tmp_path / "list.m3u8"))


def test_addresses_are_not_fetched():
    with pytest.raises(ImageError, match="not downloaded"):
        read_video(Video("https://127.0.0.1:9/clip.mp4"))


def test_limits_hold_for_frames_bytes_and_all_frames_together():
    data = clip(n=10)
    with pytest.raises(ImageTooLargeError):
        read_video(Video(data), ImageLimits(max_pixels=64 * 48 - 1))
    with pytest.raises(ImageTooLargeError):
        read_video(Video(data), ImageLimits(max_bytes=len(data) - 1))
    with pytest.raises(ImageTooLargeError):
        read_video(Video("data:video/mp4;base64," + base64.b64encode(data).decode()), ImageLimits(max_bytes=100))
    assert len(read_video(Video(data, count=4), ImageLimits(max_pixels=64 * 48)).pictures) == 4
    for source in (data, animation(range(0, 100, 10), 100), [grey(i) for i in range(10)]):
        with pytest.raises(ImageTooLargeError, match="together"):
            read_video(Video(source, count=5), ImageLimits(max_pixels=64 * 48))


@pytest.mark.parametrize(
    "options", [{"count": 0}, {"count": 257}, {"count": 1.5}, {"count": True}, {"rate": 0}, {"rate": float("nan")}]
)
def test_options_are_checked_before_anything_is_read(options):
    with pytest.raises(ConfigError):
        Video("nowhere.mp4", **options)


def test_a_rate_of_pictures_without_times_is_refused():
    with pytest.raises(ConfigError, match="source_rate"):
        Video([grey(1)], rate=1)


# ---- what stands around frames ----


def test_texts_are_those_of_the_families_processors():
    """As the processors of transformers 5.24 write them (processing_*.py of each family)."""
    assert frame_texts("qwen3vl_merger", 2, [0.25, 1.5], 3.0) == (["<0.2 seconds>", "<1.5 seconds>"], "")
    assert frame_texts("glm4v", 2, [0.9, 2.0], 3.0) == (["", "0"], "2")
    assert frame_texts("internvl", 2, None, None) == (["Frame1: ", "\nFrame2: "], "")
    for projector in ("gemma4v", "gemma4uv"):
        assert frame_texts(projector, 2, [1, 61.5], 70) == (["00:01 ", " 01:01 "], "")
    before, after = frame_texts("idefics3", 21, [float(i) for i in range(21)], 3723.9)
    assert before[0] == (
        "You are provided the following series of twenty-one frames from a 1:02:03 [H:MM:SS] video.\n"
        "\nFrame from 00:00:"
    )
    assert before[20] == "\nFrame from 00:20:" and after == "\n\n"
    assert (
        frame_texts("idefics3", 125, [0.0] * 125, 1)[0][0].split(" frames")[0].endswith("one hundred and twenty-five")
    )
    for projector in ("qwen3vl_merger", "glm4v", "gemma4v", "idefics3", "mlp", None):
        assert frame_texts(projector, 3, None, None) == (["", "", ""], "")  # no time is made up


def test_frames_stand_where_the_video_is(vlm):
    chat = ChatFormat(vlm.llama, "chatml", "qwen3vl_merger")
    frames = Frames((grey(0), grey(9)), (0.5, 1.5), 2.0)
    text = chat.format("<__media__> then <__media__>", 2, {1: frames})
    assert "<__media__> then <0.5 seconds><__media__><1.5 seconds><__media__>" in text
    assert (
        chat.mark("a<image>b<image>", 2, {0: frames}) == "a<0.5 seconds><__media__><1.5 seconds><__media__>b<__media__>"
    )
    messages = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "what?"}]}]
    prepared, sources = chat.prepare(messages)
    assert chat.render(prepared).count("<__media__>") == 2 and [s.video for s in sources] == [0, 0]


# ---- answers ----


@pytest.fixture(scope="module")
def vlm():
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=2048, n_threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def still():
    """A GIF of three pictures: the demo's, twice, and a blank one."""
    picture = Image.open(refvlm.DEMO_IMAGE).convert("RGB")
    return [picture, picture, Image.new("RGB", picture.size, (255, 255, 255))]


def test_a_video_is_answered_as_its_frames_are(vlm, still):
    """The reference model writes nothing around frames, so that they are ordinary images side by side."""
    asked = dict(prompt="what color is the triangle?", prune=None, max_tokens=4)
    state, report = vlm.read_prompt(asked["prompt"], Video(still), None)
    logits = state.logits.copy()
    assert len(report.pictures) == 3
    assert np.array_equal(vlm.read_prompt(asked["prompt"], still, None)[0].logits, logits)
    assert vlm.generate(images=Video(still), **asked).text == vlm.generate(images=still, **asked).text


def test_frames_share_a_budget_and_pictures_beside_them_do_not(vlm, still):
    config = PruneConfig(vision_keep=0.5)
    own = vlm.read_prompt("what?", [*still, still[0]], config)[1]
    assert [len(image.vision_kept) for image in own.images] == [72] * 4
    shared = vlm.read_prompt("what?", [Video(still), still[0]], config)[1]
    kept = [len(image.vision_kept) for image in shared.images]
    assert sum(kept[:3]) == 3 * 72 and kept[3] == 72
    assert kept[0] > kept[1] and kept[0] > kept[2]  # a repeated frame and a blank one say nothing new
    crop = vlm.read_prompt("what?", Video(still), PruneConfig(vision_keep=0.5, budget="crop"))[1]
    assert [len(image.vision_kept) for image in crop.images] == [72] * 3


def test_equal_frames_are_encoded_once(vlm, monkeypatch):
    """The encoder runs for each that differs; found again in the next request, they are of an earlier one."""
    runs, encode = [], VisionEncoder.encode

    def counted(self, chunk, *args, **options):
        runs.append(chunk.picture)
        return encode(self, chunk, *args, **options)

    monkeypatch.setattr(VisionEncoder, "encode", counted)
    one, other = (np.random.default_rng(seed).integers(0, 255, (168, 168, 3), np.uint8) for seed in (1, 2))
    for n_cached, encoded in ((0, [0, 2]), (5, [])):
        report = vlm.read_prompt("what?", Video([one, one, other, one, other]), "balanced")[1]
        assert runs == encoded and report.n_cached == n_cached
        assert [image.same_as for image in report.images] == [None, 0, None, 0, 2]
        runs.clear()


def test_the_report_says_which_frames_were_taken(vlm, still):
    """Five pictures, four a second: frames 1 and 3 of the first video, all of the second, of which no time is known."""
    videos = [Video([*still, *still[:2]], count=2, source_rate=4), still[2], Video(still[1:])]
    report = vlm.read_prompt("what?", videos, None)[1]
    frames = [(0, 0.25), (0, 0.75), (None, None), (1, None), (1, None)]
    assert [(image.video, image.second) for image in report.images] == frames
    for form in (report.to_dict(), report.figures()):
        assert [(image["video"], image["second"]) for image in form["images"]] == frames


def test_handler_and_engine_agree(still):
    handler = StarChatHandler(clip_model_path=refvlm.MMPROJ, prune=PruneConfig(vision_keep=0.375))
    llama = Llama(str(refvlm.TEXT_MODEL), chat_handler=handler, n_ctx=2048, n_threads=1, flash_attn=True, verbose=False)
    content = [{"type": "video", "video": Video(still)}, {"type": "text", "text": "what color is the triangle?"}]
    llama.create_chat_completion([{"role": "user", "content": content}], max_tokens=2, temperature=0)
    kept = [len(image.vision_kept) for image in handler.last_report.images]
    assert sum(kept) == 3 * 54 and len(set(kept)) > 1  # 37.5% of 144 each, shared
    assert [(image.video, image.second) for image in handler.last_report.images] == [(0, None)] * 3
    llama.close()


def test_a_part_without_a_video_is_refused():
    with pytest.raises(PromptError, match="names no video"):
        read_messages([{"role": "user", "content": [{"type": "video_url", "video_url": {}}]}])


def test_tokens_of_a_video_are_counted(vlm, still):
    assert vlm.count_tokens(Video(still)) == 3 * vlm.count_tokens(still[0])


def test_the_server_takes_videos(tmp_path):
    picture = Image.open(refvlm.DEMO_IMAGE).convert("RGB")
    file = io.BytesIO()
    picture.save(file, "GIF", save_all=True, append_images=[Image.new("RGB", picture.size)], duration=500)
    url = "data:image/gif;base64," + base64.b64encode(file.getvalue()).decode()
    server = Server("--verify", "1")
    try:
        client = server.client()

        def ask(part):
            content = [part, {"type": "text", "text": "what color is the triangle?"}]
            return client.chat.completions.create(
                model="any", messages=[{"role": "user", "content": content}], max_tokens=4, temperature=0
            )

        answer = ask({"type": "video_url", "video_url": {"url": url}, "nframes": 2})
        assert answer.star_edge["n_image_tokens"] == 288
        counts = lambda: server.request("GET", "/health")[2]["verified"]
        server.wait(lambda: counts()["same"] + counts()["different"] == 1)
        for part, field in (
            ({"type": "video_url", "video_url": {"url": url}, "nframes": 0}, "nframes=0"),
            ({"type": "video_url", "video_url": {"url": "https://127.0.0.1/a.mp4"}}, "not a data: URL"),
            ({"type": "video_url", "video_url": {"url": os.devnull}}, "not a data: URL"),
        ):
            with pytest.raises(Exception, match=field) as error:
                ask(part)
            assert error.value.status_code == 400
    finally:
        server.stop()
