"""Pictures as people send them, pictures that cost too much, and shapes that an encoder cannot have."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from helpers.chatting import data_url, load, text_of, user
from helpers.families import FOLDER, load_fixtures
from helpers.models import random_image

from star_edge import StarChatHandler, StarVLM, errors, refvlm
from star_edge.io.images import ImageLimits, load_image
from star_edge.server.remote import is_public

PNG = refvlm.DEMO_IMAGE.read_bytes()
PIXELS = load_image(refvlm.DEMO_IMAGE)
TEXT = base64.b64encode(PNG).decode()


def same(source):
    return np.array_equal(load_image(source), PIXELS)


# ---- base64 ----


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{TEXT}",
        f" data:image/png;base64,{TEXT}",
        f"\n\tDATA:image/png;BASE64,{TEXT}\n",
        f"data:image/png;base64;charset=utf-8,{TEXT}",
        f"data:image/png;charset=utf-8;base64,{TEXT}",
        f"data:image/png; base64 ,{TEXT}",
        f"data:;base64,{TEXT}",
        f"data:image/png,{TEXT}",
        f"data:image/png;base64,{TEXT.rstrip('=')}",
        f"data:image/png;base64,{TEXT.replace('+', '-').replace('/', '_')}",
        f"data:image/png;base64,{TEXT.replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}",
        f"data:image/png;base64,{base64.encodebytes(PNG).decode()}",
        TEXT,
        f" {TEXT}\n",
        TEXT.rstrip("="),
        base64.encodebytes(PNG).decode(),
        base64.urlsafe_b64encode(PNG).decode(),
    ],
    ids=range(17),
)
def test_base64_as_people_send_it(url):
    assert same(url)


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_bare_base64_of_other_formats(kind):
    file = io.BytesIO()
    PIL.Image.fromarray(PIXELS).save(file, kind)
    assert load_image(base64.b64encode(file.getvalue()).decode()).shape == PIXELS.shape


def test_a_file_of_such_a_name_is_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "iVBORw0KGgo" + "A" * 80
    Path(name).write_bytes(PNG)
    assert same(name)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("Q" * 100_000, "put data:image/png;base64, before it"),
        ("/tmp/" + "a" * 5000 + ".png", "not the path of an image"),
        ("iVBORw0KGgo" + "A" * 100_000, "base64 text"),
        (f"data:image/png;base64,{TEXT[:-30]}\ud800", "surrogates"),
        ("data:image/png,\udcff", "surrogates"),
        ("\ud800.png", "cannot be read"),
        ("http://a/\ud800", "not a valid URL"),
        (f"data:image/png;base64,{TEXT[:40]}!!{TEXT[40:]}", "invalid base64"),
    ],
)
def test_what_is_no_image_is_not_echoed(source, words):
    with pytest.raises(errors.ImageError) as caught:
        load_image(source)
    message = str(caught.value)
    assert words in message and len(message) < 400 and "\n" not in message
    message.encode()


def test_bare_base64_keeps_the_limits():
    with pytest.raises(errors.ImageTooLargeError):
        load_image(TEXT, ImageLimits(max_bytes=len(PNG) - 1))
    assert load_image(TEXT, ImageLimits(max_bytes=len(PNG))).shape == PIXELS.shape


# ---- files and arrays ----


def test_open_files(tmp_path):
    with open(refvlm.DEMO_IMAGE, "rb") as file:
        assert same(file) and same(file)
    written = io.BytesIO()
    written.write(PNG)  # it stands at its end
    assert same(written)

    class Pipe:
        def __init__(self):
            self.inner = io.BytesIO(PNG)

        def read(self, n):
            return self.inner.read(min(n, 100))

    assert same(Pipe())
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_threads=1) as vlm:
        expected = vlm.generate("what number is shown?", [refvlm.DEMO_IMAGE], max_tokens=4).text
        for images in (io.BytesIO(PNG), [io.BytesIO(PNG)], TEXT):
            assert vlm.generate("what number is shown?", images, max_tokens=4).text == expected


def test_open_files_that_give_no_image(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("no image")
    closed = io.BytesIO(PNG)
    closed.close()
    with open(text) as as_text, open(text, "rb") as as_bytes:
        for source, words in (
            (as_text, 'mode "rb"'),
            (as_bytes, "known format"),
            (closed, "cannot be read"),
            (io.BytesIO(), "is empty"),
        ):
            with pytest.raises(errors.ImageError, match=words):
                load_image(source)
    with pytest.raises(errors.ImageTooLargeError):
        load_image(io.BytesIO(PNG), ImageLimits(max_bytes=100))
    with open("/dev/zero", "rb") as endless, pytest.raises(errors.ImageTooLargeError):
        load_image(endless, ImageLimits(max_bytes=1 << 20))


def test_paths_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, source in (
        ("a.png", refvlm.DEMO_IMAGE),
        ("text.gguf", refvlm.TEXT_MODEL),
        ("mmproj.gguf", refvlm.MMPROJ),
    ):
        (tmp_path / name).write_bytes(source.read_bytes())
    assert same("~/a.png") and same(Path("~/a.png"))
    with StarVLM("~/text.gguf", "~/mmproj.gguf", n_ctx=256, n_threads=1) as vlm:
        assert vlm.encoder is not None
    llm = load(StarChatHandler("~/mmproj.gguf"))
    image = {"type": "image_url", "image_url": "~/a.png"}
    answer = llm.create_chat_completion([{"role": "user", "content": [image]}], max_tokens=1)
    assert answer["star_edge"]["n_image_tokens"] == 144
    llm.close()


def test_paths_as_bytes_and_what_is_no_path():
    with StarVLM(os.fsencode(refvlm.TEXT_MODEL), os.fsencode(refvlm.MMPROJ), n_ctx=256, n_threads=1) as vlm:
        assert vlm.encoder is not None
    for wrong in (5, None, [], "a\0b"):
        with pytest.raises(errors.ModelFileError):
            StarVLM(wrong)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_arrays_of_subclasses():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(load_image(np.matrix(grey)), load_image(grey))
    assert np.array_equal(load_image(np.matrix(grey / 255.0)), load_image(grey / 255.0))
    assert np.array_equal(load_image(np.ma.masked_array(grey)), load_image(grey))
    assert np.array_equal(load_image(grey.view(np.recarray)), load_image(grey))


# ---- what costs too much ----


def progressive(side, n_more):
    """A JPEG, its last scan repeated n_more times: each decodes to the same pixels."""
    file = io.BytesIO()
    PIL.Image.fromarray(random_image(1, side, side)).save(file, "JPEG", progressive=True, quality=50)
    data = file.getvalue()
    start = data.rindex(b"\xff\xda")
    return data[:-2] + data[start:-2] * n_more + data[-2:]


def test_jpeg_with_thousands_of_scans():
    for side, n_more in ((64, 5000), (500, 4000)):
        with pytest.raises(errors.ImageTooLargeError, match="scans"):
            load_image(progressive(side, n_more))
    assert load_image(progressive(64, 0)).shape == (64, 64, 3)
    assert load_image(progressive(64, 60)).shape == (64, 64, 3)


def test_scans_are_bounded_with_the_pixels(monkeypatch):
    monkeypatch.setattr("star_edge.io.pixels._MAX_SCANNED_PIXELS", 30 * 64 * 64)
    assert load_image(progressive(64, 10)).shape == (64, 64, 3)
    with pytest.raises(errors.ImageTooLargeError, match="30 scans"):
        load_image(progressive(64, 60))


def test_what_looks_like_scans_in_a_header():
    """The pair of bytes may stand in a profile, a comment or a preview."""
    file = io.BytesIO()
    PIL.Image.fromarray(PIXELS).save(file, "JPEG", icc_profile=b"\xff\xda" * 50_000, comment=b"\xff\xda" * 1000)
    assert load_image(file.getvalue()).shape == PIXELS.shape


def test_a_truncated_jpeg_is_counted_too():
    for cut in (1, 2, 3, 100, 1001, 20_000):
        with pytest.raises(errors.ImageError):
            load_image(progressive(64, 5000)[:-cut])


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2_000_000))),
        chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 2_000_000)),
        chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"x" * 2_000_000)),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b"x" * 3_000_000),
        b"".join(chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(b"x" * 1_000_000)) for i in range(80)),
    ],
    ids=["profile", "text", "international text", "long text", "many texts"],
)
@pytest.mark.parametrize("at_end", [False, True])
def test_png_with_a_large_text_or_profile(extra, at_end):
    """Decoded without it, as every viewer does."""
    at = len(PNG) - 12 if at_end else 33  # before IEND, or after IHDR
    assert same(PNG[:at] + extra + PNG[at:])


def test_png_that_is_damaged_besides():
    extra = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2_000_000)))
    with pytest.raises(errors.ImageError):
        load_image(PNG[:33] + extra + PNG[33:200])


# ---- shapes that an encoder cannot have ----

SHAPES = [(900, 60), (20, 900), (3000, 1), (1, 3000), (1, 1), (1, 50_000)]
CHILD = """
import json, sys
import numpy as np
from star_edge import StarVLM, errors
folder, shapes = sys.argv[1], json.loads(sys.argv[2])
vlm = StarVLM(folder + "/text.gguf", folder + "/mmproj.gguf", n_ctx=2048, n_threads=1, reuse=False)
said = []
for height, width in shapes:
    try:
        vlm.generate("x", [np.full((height, width, 3), 99, np.uint8)], "off", 1)
        said.append("ok")
    except (errors.ImageError, errors.ContextLengthError) as error:
        said.append(f"{type(error).__name__}: {error}")
print(json.dumps(said))
"""


@pytest.mark.parametrize("family", sorted(load_fixtures()))
def test_narrow_pictures(family):
    """In a process of its own: llama.cpp aborts where a table has no row. An answer, or an error that names the
    image.
    """
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(FOLDER / family), json.dumps(SHAPES)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    said = json.loads(result.stdout.splitlines()[-1])
    assert said[4] == "ok" and len(said) == len(SHAPES)
    if family in ("gemma4", "gemma4-e2b", "gemma4-moe"):
        assert all("patches along a side" in said[i] for i in (0, 1, 2, 3))
    if family in ("smolvlm", "idefics3"):
        assert all(said[i].startswith("ImageError") and "shape" in said[i] for i in (2, 3))


@pytest.mark.parametrize(("family", "side"), [("gemma4", 8), ("gemma4-unified", 24)])
def test_the_position_table_decides(family, side):
    """Up to its last row pictures are answered: a column of 64 patches is, one of 65 is not. side: of a patch, in
    pixels.
    """
    folder = FOLDER / family
    with StarVLM(folder / "text.gguf", folder / "mmproj.gguf", n_ctx=2048, n_threads=1) as vlm:
        table = vlm.encoder._n_positions
        assert table == 64
        for height in range(100, 120 * side, 5 * side):
            picture = np.full((height, 100, 3), 99, np.uint8)
            try:
                vlm.generate("x", [picture], "off", 1)
                assert height < 100 * side
            except errors.ImageError as error:
                n = int(str(error).split("an image has ")[1].split()[0])
                assert n > table


@pytest.mark.parametrize("family", ["gemma4", "smolvlm", "idefics3"])
def test_the_handler_names_the_picture(family):
    folder = FOLDER / family
    llm = load(StarChatHandler(folder / "mmproj.gguf"), folder / "text.gguf", n_ctx=2048)
    narrow, ordinary = (data_url(np.full(shape, 99, np.uint8)) for shape in ((1, 3000, 3), (100, 100, 3)))
    with pytest.raises(errors.ImageError) as caught:
        llm.create_chat_completion([user(narrow, "what?")], max_tokens=1)
    assert "template" not in str(caught.value)
    assert isinstance(text_of(llm.create_chat_completion([user(ordinary, "what?")], max_tokens=1)), str)
    llm.close()


# ---- addresses ----


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "0.1.2.3",
        "10.1.2.3",
        "100.64.0.1",
        "100.127.255.255",
        "127.0.0.1",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.1",
        "192.0.0.8",
        "192.0.0.9",
        "192.0.0.10",
        "192.0.0.170",
        "192.0.0.192",
        "192.0.0.255",
        "192.0.2.1",
        "192.31.196.1",
        "192.52.193.1",
        "192.88.99.1",
        "192.168.0.1",
        "192.175.48.1",
        "198.18.0.1",
        "198.19.255.255",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::ffff:10.0.0.1",
        "::ffff:192.0.0.192",
        "::10.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b::192.0.0.192",
        "64:ff9b:1::1",
        "100::1",
        "100:0:0:1::1",
        "2001::1",
        "2001:1::1",
        "2001:1::2",
        "2001:2::1",
        "2001:3::1",
        "2001:4:112::1",
        "2001:20::1",
        "2001:30::1",
        "2001:db8::1",
        "2002::1",
        "2620:4f:8000::1",
        "3fff::1",
        "4000::1",
        "5f00::1",
        "fc00::1",
        "fd00::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
    ],
)
def test_addresses_that_are_not_global_unicast(address):
    """From IANA's special-purpose registries, whatever this version of Python knows of them."""
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "8.8.8.8", "192.0.1.1", "193.0.0.1", "198.20.0.1", "223.255.255.254", "2606:4700::1111", "2a00::1"],
)
def test_addresses_of_the_internet(address):
    assert is_public(address) and (
        ":" in address or (is_public(f"::ffff:{address}") and is_public(f"64:ff9b::{address}"))
    )
