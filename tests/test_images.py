"""Image loading: sources, arrays, formats, limits, broken files. All images are made here."""

from __future__ import annotations

import base64
import io
import os
import pathlib
import struct
import threading
import urllib.parse
import warnings
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from helpers.pictures import encode, error_of, photo, png

from star_edge.errors import ImageError, ImageTooLargeError
from star_edge.io.images import ImageLimits, load_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def assert_rgb(array: np.ndarray, height: int, width: int) -> None:
    assert isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.shape == (height, width, 3)
    assert array.flags.c_contiguous and array.flags.writeable


# --- sources ---


def test_the_same_pixels_from_every_source(tmp_path):
    pixels = photo()
    data = encode(PIL.Image.fromarray(pixels))
    path = tmp_path / "ein Bild ä.png"
    path.write_bytes(data)
    sources = [
        str(path),
        path,
        data,
        bytearray(data),
        memoryview(data),
        memoryview(bytes(b for byte in data for b in (byte, 0)))[::2],
        PIL.Image.open(io.BytesIO(data)),
        PIL.Image.fromarray(pixels),
        pixels,
        "data:image/png;base64," + base64.b64encode(data).decode(),
        "DATA:;base64," + base64.encodebytes(data).decode().rstrip("=\n"),
        "data:image/png;base64," + urllib.parse.quote(base64.b64encode(data).decode(), safe=""),
        "data:image/png," + urllib.parse.quote(data),
    ]
    for source in sources:
        result = load_image(source)
        assert_rgb(result, 40, 60)
        assert (result == pixels).all()


def test_relative_path(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encode(PIL.Image.new("RGB", (2, 3), RED)))
    monkeypatch.chdir(tmp_path)
    assert_rgb(load_image("a.png"), 3, 2)
    assert_rgb(load_image(pathlib.Path("a.png")), 3, 2)


def test_result_shares_no_memory():
    pixels = photo()
    result = load_image(pixels)
    assert not np.shares_memory(result, pixels)
    image = PIL.Image.fromarray(pixels)
    load_image(image)[:] = 0
    assert (np.asarray(image) == pixels).all()


def test_bad_paths_are_named(tmp_path):
    missing = tmp_path / "missing.png"
    assert str(missing) in error_of(missing) and "does not exist" in error_of(str(missing))
    assert str(tmp_path) in error_of(tmp_path) and "directory" in error_of(tmp_path)
    assert "empty" in error_of("")
    assert "bad\\x00.png" in error_of("bad\0.png")
    assert "line\\nbreak.png" in error_of("line\nbreak.png")
    assert len(error_of("x" * 100_000)) < 400
    under_a_file = tmp_path / "file"
    under_a_file.write_bytes(b"x")
    assert str(under_a_file) in error_of(under_a_file / "a.png")


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "secret.png"
    path.write_bytes(encode(PIL.Image.new("RGB", (2, 2))))

    def refuse(*args, **options):  # file modes do not stop root, which tests may run as
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    message = error_of(path)
    assert str(path) in message and "Permission denied" in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipe_does_not_block(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert "not a regular file" in error_of(path)


@pytest.mark.parametrize("source", [None, 3, ["a.png"], object(), io.BytesIO(b"x")])
def test_other_types(source):
    assert type(source).__name__ in error_of(source)


def test_urls_that_are_not_read():
    message = error_of("file:///tmp/a.png")
    assert "file:///tmp/a.png" in message and "path" in message
    assert "ftp" in error_of("ftp://user:secret@host/a.png")
    assert "secret" not in error_of("ftp://user:secret@host/a.png?sig=secret")


def test_bad_data_urls():
    for url in (
        "data:image/png;base64",
        "data:image/png;base64,@@@@",
        "data:image/png;base64,abcde",
        "data:,",
        "data:,hello",
    ):
        assert "data: URL" in error_of(url)


# --- arrays ---


def test_array_layouts():
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    assert (load_image(grey) == expected).all()
    assert (load_image(grey[:, :, None]) == expected).all()
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)]
    result = load_image(rgba)
    assert_rgb(result, 1, 3)
    assert result.tolist() == [[[255, 0, 0], [255, 255, 255], [127, 127, 127]]]
    transposed = photo().swapaxes(0, 1)
    assert_rgb(load_image(transposed), 60, 40)
    assert (load_image(transposed[::-1, ::2]) == transposed[::-1, ::2]).all()


def test_array_scaling():
    for dtype in (np.float16, np.float32, np.float64, ">f4"):
        assert load_image(np.array([[0, 0.5, 1]], dtype))[0, :, 0].tolist() == [0, 128, 255]
    for dtype in ("<u2", ">u2"):
        values = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], dtype)
        assert load_image(values)[0, :, 1].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]
    every = np.arange(65536, dtype=np.uint16)[None]
    assert (load_image(every)[0, :, 0] == np.rint(np.arange(65536) / 257)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.01, 1.01, 255.0])
def test_float_arrays_out_of_range(value):
    array = np.full((2, 3, 3), 0.5)
    array[1, 2, 0] = value
    assert "(2, 3, 3)" in error_of(array)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((5, 0), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((4, 4, 0), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros(7, np.uint8),
        np.array(1.0),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((4, 4, 3), bool),
        np.zeros((4, 4, 3), complex),
        np.array([["a"]]),
    ],
)
def test_bad_arrays(array):
    assert str(array.shape) in error_of(array) and str(array.dtype) in error_of(array)


# --- formats, modes ---


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "TIFF", "PPM"])
def test_lossless_formats(format):
    image = PIL.Image.new("RGB", (5, 4), RED)
    image.paste(BLUE, (0, 0, 2, 4))
    result = load_image(encode(image, format))
    assert_rgb(result, 4, 5)
    assert (result[:, :2] == BLUE).all() and (result[:, 2:] == RED).all()


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_formats(format):
    result = load_image(encode(PIL.Image.new("RGB", (32, 16), (200, 100, 50)), format, quality=95)).astype(int)
    assert np.abs(result - (200, 100, 50)).max() <= 4


def test_modes_without_transparency():
    for mode, colour, expected in [
        ("1", 1, WHITE),
        ("L", 77, (77, 77, 77)),
        ("P", 0, None),
        ("CMYK", (0, 255, 255, 0), RED),
        ("YCbCr", (255, 128, 128), WHITE),
        ("HSV", (0, 255, 255), RED),
    ]:
        image = PIL.Image.new("RGB", (3, 2), GREEN).quantize(4) if mode == "P" else PIL.Image.new(mode, (3, 2), colour)
        assert image.mode == mode
        result = load_image(image)
        assert_rgb(result, 2, 3)
        assert (result == (expected or GREEN)).all()


def test_cmyk_jpeg():
    result = load_image(encode(PIL.Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)).astype(int)
    assert np.abs(result - RED).max() <= 4


def test_transparency_is_composed_over_white():
    half = PIL.Image.new("RGBA", (2, 1))
    half.putdata([(0, 0, 0, 0), (255, 0, 0, 51)])
    for source in (half, encode(half), half.convert("RGBa")):
        result = load_image(source)
        assert result[0, 0].tolist() == [255, 255, 255]
        assert result[0, 1].tolist() == [255, 204, 204]
    assert (load_image(PIL.Image.new("LA", (2, 2), (0, 102))) == 153).all()
    assert (load_image(encode(PIL.Image.new("LA", (2, 2), (0, 102)))) == 153).all()


def test_transparent_colour_of_palette_grey_and_rgb():
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    for data in (
        encode(image, transparency=0),
        encode(image, "GIF", transparency=0),
        encode(image, transparency=bytes([0, 255])),
        encode(image.convert("RGB"), transparency=RED),
    ):
        assert load_image(data).tolist() == [[list(WHITE), list(BLUE)]]
    assert (load_image(encode(PIL.Image.new("L", (2, 2), 9), transparency=9)) == 255).all()
    assert (load_image(encode(PIL.Image.new("L", (2, 2), 8), transparency=9)) == 8).all()


def test_sixteen_bit_grey():
    values = np.array([[0, 257, 25700], [32768, 65278, 65535]], np.uint16)
    expected = [[0, 1, 100], [128, 254, 255]]
    wide = PIL.Image.fromarray(values.astype(np.int32))
    short = PIL.Image.fromarray(values)
    assert wide.mode == "I" and short.mode == "I;16"
    big_endian = PIL.Image.frombytes("I;16B", (3, 2), values.astype(">u2").tobytes())
    for source in (wide, short, big_endian, encode(short), encode(short, "TIFF"), encode(wide, "TIFF")):
        result = load_image(source)
        assert_rgb(result, 2, 3)
        assert (result == np.array(expected)[:, :, None]).all()
    for value in (-1, 65536):
        assert "0..65535" in error_of(PIL.Image.new("I", (2, 2), value))


def test_float_pil_image_follows_the_rule_for_float_arrays():
    assert (load_image(PIL.Image.new("F", (2, 2), 0.5)) == 128).all()
    assert "0..1" in error_of(PIL.Image.new("F", (2, 2), 200.0))


def test_first_frame_of_animations():
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    for format in ("GIF", "PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert (load_image(data) == RED).all(), format
    image = PIL.Image.open(io.BytesIO(data))
    image.seek(1)
    assert (load_image(image) == GREEN).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    pixels = photo(4, 6)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    for format in ("PNG", "TIFF"):
        data = encode(PIL.Image.fromarray(pixels), format, exif=exif)
        expected = np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))))
        assert expected.shape[0] == (4 if orientation < 5 else 6)
        result = load_image(data)
        assert_rgb(result, *expected.shape[:2])
        assert (result == expected).all()
        assert (load_image(PIL.Image.open(io.BytesIO(data))) == expected).all()


def test_exif_orientation_of_a_jpeg():
    image = PIL.Image.new("RGB", (32, 16), BLUE)
    image.paste(RED, (0, 0, 16, 16))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise, so left becomes top
    result = load_image(encode(image, "JPEG", exif=exif, quality=95, subsampling=0)).astype(int)
    assert result.shape == (32, 16, 3)
    assert np.abs(result[:15] - RED).max() <= 4 and np.abs(result[17:] - BLUE).max() <= 4


def test_broken_exif_does_not_matter():
    data = encode(PIL.Image.new("RGB", (16, 8), RED), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_image(data).shape == (8, 16, 3)


# --- limits, broken files ---


def test_bomb_by_header(tmp_path):
    path = tmp_path / "bomb.png"
    for width, height in ((50_000, 50_000), (12_000, 9_000), (9_000, 9_000)):  # Pillow: error, warning, silence
        path.write_bytes(png(width, height))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert "bomb.png" in error_of(path, kind=ImageTooLargeError)
            assert "bytes" in error_of(path.read_bytes(), kind=ImageTooLargeError)


def test_bomb_beyond_pillows_own_limit_with_ours_raised():
    message = error_of(png(50_000, 50_000), ImageLimits(max_pixels=10**12), ImageTooLargeError)
    assert "MAX_IMAGE_PIXELS" in message


def test_pillow_state_is_left_alone():
    before = PIL.Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    load_image(photo())
    load_image(encode(PIL.Image.fromarray(photo())))
    error_of(png(50_000, 50_000), kind=ImageTooLargeError)
    assert (PIL.Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


def test_pixel_limit_is_checked_before_decoding(monkeypatch):
    data = encode(PIL.Image.new("RGB", (1001, 1000)))
    assert len(data) < 10_000
    tight = ImageLimits(max_pixels=1_000_000)
    assert load_image(encode(PIL.Image.new("RGB", (1000, 1000))), tight).shape == (1000, 1000, 3)
    lazy = PIL.Image.open(io.BytesIO(data))

    def no_decoding(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(type(lazy), "load", no_decoding)
    for source in (data, lazy):
        message = error_of(source, tight, ImageTooLargeError)
        assert "1001 x 1000" in message and "1000000" in message


def test_pixel_limit_of_arrays_and_pil_images():
    tight = ImageLimits(max_pixels=99)
    for source in (np.zeros((10, 10, 3), np.uint8), np.zeros((10, 10)), PIL.Image.new("L", (10, 10))):
        assert "10 x 10" in error_of(source, tight, ImageTooLargeError)
        assert load_image(source, ImageLimits(max_pixels=100)).shape == (10, 10, 3)


def test_byte_limit(tmp_path):
    data = encode(PIL.Image.fromarray(photo()))
    path = tmp_path / "a.png"
    path.write_bytes(data)
    url = "data:;base64," + base64.b64encode(data).decode()
    for source, name in (
        (data, f"{len(data)} bytes"),
        (memoryview(data), "bytes"),
        (path, str(path)),
        (url, "data: URL"),
    ):
        assert load_image(source, ImageLimits(max_bytes=len(data))).shape == (40, 60, 3)
        assert name in error_of(source, ImageLimits(max_bytes=len(data) - 1), ImageTooLargeError)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_truncated_files(format, tmp_path):
    data = encode(PIL.Image.fromarray(photo()), format)
    path = tmp_path / "cut.img"
    for length in {1, 2, 3, 5, 8, 12, 20, 30, 50, 100, len(data) // 3, len(data) // 2, len(data) * 4 // 5}:
        assert f"image of {length} bytes" in error_of(data[:length])
        path.write_bytes(data[:length])
        assert str(path) in error_of(path)


def test_non_images(tmp_path):
    path = tmp_path / "text.png"
    path.write_text("hello")
    assert str(path) in error_of(path)
    assert "image of 5 bytes" in error_of(b"hello")
    assert "empty" in error_of(b"") and "0 bytes" in error_of(b"")
    path.write_bytes(b"")
    assert "text.png" in error_of(path) and "empty" in error_of(path)
    assert "image of" in error_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


def test_damaged_files_raise_nothing_else():
    random = np.random.default_rng(1)
    for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        data = encode(PIL.Image.fromarray(photo(16, 16)), format)
        for _ in range(60):
            damaged = bytearray(data)
            for position in random.integers(0, min(len(data), 200), 4):
                damaged[position] = random.integers(256)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    result = load_image(damaged, ImageLimits(max_pixels=1_000_000))
                assert result.ndim == 3 and result.dtype == np.uint8
            except ImageError as error:
                assert f"image of {len(damaged)} bytes" in str(error)


@pytest.mark.parametrize(
    "error",
    [OSError("a\nb"), SyntaxError("x"), ValueError("x"), struct.error("x"), zlib.error("x"), EOFError(), MemoryError()],
)
def test_whatever_pillow_raises_is_mapped(error, monkeypatch):
    def fail(self):
        raise error

    data = encode(PIL.Image.new("RGB", (4, 4)))
    monkeypatch.setattr(type(PIL.Image.open(io.BytesIO(data))), "load", fail)
    assert f"image of {len(data)} bytes" in error_of(data)


def test_closed_pil_image(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(PIL.Image.new("RGB", (4, 4))))
    image = PIL.Image.open(path)
    image.close()
    assert "PIL image" in error_of(image)


def test_threads_leave_the_warning_filters_alone():
    data = encode(PIL.Image.fromarray(photo()))
    before = list(warnings.filters)
    failures = []

    def work():
        for _ in range(40):
            if load_image(data).shape != (40, 60, 3):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and list(warnings.filters) == before
