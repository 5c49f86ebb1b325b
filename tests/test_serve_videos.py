"""Videos over HTTP: which frames were taken, small pictures of them, pictures as frames, bounds, and no PyAV."""

import base64
import io
import json

import numpy as np
import openai
import pytest
from helpers.serving import DEMO, Server
from PIL import Image

from star_edge import refvlm
from star_edge.server.front import picture_name

MAX_BYTES = 200_000
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def url_of(data, kind):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def gif(*pictures, durations=500):
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return url_of(file.getvalue(), "image/gif")


def plain(color, size=(168, 168)):
    return Image.new("RGB", size, color)


def png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return url_of(file.getvalue(), "image/png")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """It has no PyAV: whatever is here works without it."""
    folder = tmp_path_factory.mktemp("no-pyav")
    (folder / "av.py").write_text("raise ImportError('as if it were not installed')\n")
    one = Server(
        "-c",
        "1024",
        "--max-image-bytes",
        str(MAX_BYTES),
        "--max-image-pixels",
        "60000",
        environment={"PYTHONPATH": str(folder)},
    )
    yield one
    one.stop()


def ask(server, *parts, question="what color is the triangle?", **body):
    content = [*parts, {"type": "text", "text": question}]
    extra = {"star_edge": {"kept": True, "frames": True}, **body}
    return server.client().chat.completions.create(
        model="any", messages=[{"role": "user", "content": content}], max_tokens=2, temperature=0, extra_body=extra
    )


def video(url, **more):
    return {"type": "video_url", "video_url": {"url": url}, **more}


def pixels(frame):
    data = base64.b64decode(frame["url"].removeprefix("data:image/jpeg;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_the_frames_that_were_taken_are_sent_back(server):
    """Pictures of 1, 1, 2 and 4 seconds: the middles of four parts of 8 seconds are 1, 3, 5 and 7."""
    clip = gif(plain(WHITE), plain((200, 0, 0)), plain((0, 0, 200)), plain(BLACK), durations=[1000, 1000, 2000, 4000])
    report = ask(
        server, {"type": "image_url", "image_url": {"url": DEMO}}, video(clip, nframes=4), prune="fast"
    ).star_edge
    frames = report["frames"]
    assert [frame["second"] for frame in frames] == [1.0, 2.0, 4.0]  # each once, at the time when it begins
    assert [frame["picture"] for frame in frames] == [1, 2, 3]  # the picture before them is 0
    for frame, color in zip(frames, [(200, 0, 0), (0, 0, 200), BLACK]):
        assert pixels(frame).shape == (168, 168, 3) and np.abs(pixels(frame).mean((0, 1)) - color).max() < 6
        assert frame["video"] == 0 and frame["same_as"] is None
    assert [(one["picture"], one["video"], one["second"]) for one in report["kept"]] == [
        (0, None, None),
        *[(frame["picture"], 0, frame["second"]) for frame in frames],
    ]
    assert [(one["video"], one["second"]) for one in report["images"]] == [
        (one["video"], one["second"]) for one in report["kept"]
    ]


def test_nothing_is_sent_back_unasked(server):
    report = ask(server, video(gif(plain(WHITE), plain(BLACK))), star_edge={}).star_edge
    assert "frames" not in report and "kept" not in report
    assert ask(server, {"type": "image_url", "image_url": {"url": DEMO}}).star_edge["frames"] == []


@pytest.mark.parametrize("afresh", [False, True])
def test_equal_frames_are_named(server, afresh):
    clip = gif(plain((9, 9, 200)), plain((200, 9, 9)), plain((9, 9, 200)), plain((9, 200, 9)))
    report = ask(server, video(clip), star_edge={"frames": True, "afresh": afresh}).star_edge
    assert [frame["same_as"] for frame in report["frames"]] == [None, None, 0, None]
    assert report["n_cached"] == 0  # the second of two equal frames is of this request


def test_large_frames_are_sent_back_small(server):
    report = ask(server, video(gif(plain(WHITE, (300, 100)), plain(BLACK, (300, 100))))).star_edge
    assert [pixels(frame).shape for frame in report["frames"]] == [(100, 300, 3)] * 2
    report = ask(server, video(gif(plain(WHITE, (500, 100)), plain(BLACK, (500, 100))))).star_edge
    assert [pixels(frame).shape for frame in report["frames"]] == [(72, 360, 3)] * 2


def test_pictures_are_frames(server):
    """Qwen's form: a list of pictures. Of five, two are taken: those in the middle of either half."""
    greys = [plain((50 * i,) * 3) for i in range(5)]
    part = {"type": "video", "video": [png(grey) for grey in greys], "nframes": 2}
    frames = ask(server, part).star_edge["frames"]
    assert [round(float(pixels(frame).mean()) / 50) for frame in frames] == [1, 3]
    assert [frame["second"] for frame in frames] == [None, None]
    wrapped = {"type": "video_url", "video_url": {"url": [png(grey) for grey in greys]}, "nframes": 2}
    assert ask(server, wrapped).star_edge["frames"] == frames


def test_tokens_of_frames_are_counted(server):
    clip = video(gif(plain(WHITE), plain(BLACK), plain((9, 9, 200))), nframes=2)
    content = [clip, {"type": "image_url", "image_url": {"url": DEMO}}, {"type": "text", "text": "what?"}]
    status, _, counts = server.request("POST", "/v1/image_tokens", {"messages": [{"role": "user", "content": content}]})
    assert status == 200 and counts == {"n_tokens": 3 * 144, "images": [{"n_tokens": 144, "n_full_tokens": 144}] * 3}


def test_a_further_turn_has_the_same_video(server):
    clip = video(gif(plain(WHITE), Image.open(refvlm.DEMO_IMAGE).convert("RGB")))
    first = ask(server, clip)
    messages = [
        {"role": "user", "content": [clip, {"type": "text", "text": "what color is the triangle?"}]},
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "what number is shown?"},
    ]
    second = server.client().chat.completions.create(model="any", messages=messages, max_tokens=2, temperature=0)
    assert second.star_edge["reused_tokens"] > 0 and len(second.star_edge["pictures"]) == 2


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (video(gif(plain(WHITE)), nframes=257), "nframes=257 is not 1 to 256 frames"),
        (video(gif(plain(WHITE)), fps=0), "fps=0 is not a number in"),
        ({"type": "video", "video": [DEMO, "/etc/hostname"]}, r"video\.1: not a data: URL"),
        ({"type": "video", "video": [DEMO, None]}, r"video\.1: not a data: URL"),
        ({"type": "video", "video": [DEMO], "fps": 2}, "pictures have no times: leave it out, and send nframes"),
        ({"type": "video", "video": []}, "the video is an empty list: give at least one picture"),
        (video("data:image/gif;base64,R0lGODlh"), "video files need PyAV"),
        (video(url_of(b"GIF89a" + bytes(MAX_BYTES), "image/gif")), "start the server with a higher --max-image-bytes"),
        (video(gif(plain(WHITE, (250, 250)))), "250 = 62500 pixels.*--max-image-pixels"),
        (video(gif(*[plain((i, 0, 0), (240, 240)) for i in range(9)])), "more than 240000 pixels together: take fewer"),
        (video(gif(*[plain((30 * i, 0, 0)) for i in range(8)])), "takes 1[0-9]+ tokens .* of a context of 1024"),
    ],
)
def test_what_cannot_be_read_is_said(server, part, words):
    with pytest.raises(openai.APIStatusError, match=words):
        ask(server, part, prune="off" if "context" in words else "fast")


def test_video_files_need_pyav_and_the_server_says_so(server):
    """How an MP4 begins: the file is not looked at any further."""
    with pytest.raises(openai.InternalServerError) as error:
        ask(server, video(url_of(b"\0\0\0\x18ftypmp42" + bytes(50), "video/mp4")))
    message = error.value.body["message"]
    assert message == (
        'what the data: URL holds is no animated image, and video files need PyAV: pip install "star-edge[video]"'
    )


def test_a_conversation_about_a_video_goes_to_the_replica_that_has_it():
    def name(*parts):
        content = [*parts, {"type": "text", "text": "what?"}]
        return picture_name(json.dumps({"messages": [{"role": "user", "content": content}]}).encode())

    image = {"type": "image_url", "image_url": {"url": DEMO}}
    one, other = (video(gif(plain(color), plain(BLACK))) for color in (WHITE, (9, 9, 9)))
    series = {"type": "video", "video": [DEMO, png(plain(BLACK))]}
    assert name() == "" and name(one) == name({**one, "nframes": 2}) == name(one, one) != ""
    assert len({name(one), name(other), name(series), ""}) == 4
    assert name(one, image) == name(image) == name(image, other)
    assert name({"type": "video", "video": []}) == ""


def test_the_page_may_show_videos(server):
    """The page's policy lets it play what it holds itself, and nothing else."""
    _, headers, _ = server.request("GET", "/")
    policy = {name: sources for name, *sources in map(str.split, headers["Content-Security-Policy"].split(";"))}
    assert policy["media-src"] == ["blob:"] and policy["default-src"] == ["'none'"]
    setup = server.request("GET", "/page/setup.json")[2]
    assert setup["max_image_bytes"] == MAX_BYTES and setup["max_body_bytes"] == 32 * 2**20
