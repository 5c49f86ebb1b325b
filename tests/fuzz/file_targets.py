"""What is fuzzed of files: pictures, videos, GGUF files, LoRA adapters, tasks, results. Each maps a seed to a case."""

from __future__ import annotations

import base64
import io
import itertools
import random
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
from cases import PICTURE, Case, in_file, scrambled, typed
from gguf_mutations import mutate
from PIL import Image

import star_edge
from star_edge import PruneConfig, StarVLM, batch
from star_edge.evaluation.results import Records
from star_edge.io.images import ImageLimits, load_image
from star_edge.io.questions import read_questions
from star_edge.io.video import Video, read_video

FIXTURES = Path(__file__).parent.parent / "fixtures"
FAMILIES = sorted(p.name for p in FIXTURES.iterdir() if (p / "mmproj.gguf").exists())

# ---- images ----


def _pictures() -> dict[str, bytes]:
    rng = np.random.default_rng(1)
    rgb = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    found = {}
    for kind, mode, options in (
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "I;16", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "CMYK", {}),
        ("GIF", "P", {}),
        ("WEBP", "RGB", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("PPM", "RGB", {}),
        ("ICO", "RGBA", {}),
        ("TGA", "RGB", {}),
        ("DDS", "RGB", {}),
        ("PCX", "RGB", {}),
        ("SGI", "RGB", {}),
        ("IM", "RGB", {}),
        ("JPEG2000", "RGB", {}),
    ):
        out = io.BytesIO()
        try:
            (Image.new("I;16", (8, 8), 999) if mode == "I;16" else rgb.convert(mode)).save(out, kind, **options)
        except (OSError, KeyError, ValueError):  # a Pillow that was built without it
            continue
        found[f"{kind} {mode}"] = out.getvalue()
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    found["PNG text"] = (
        found["PNG RGB"][:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6))) + found["PNG RGB"][33:]
    )
    return found


PICTURES = _pictures()


def images(seed: int) -> Case:
    rng = random.Random(seed)
    name = rng.choice(sorted(PICTURES))
    data = scrambled(rng, PICTURES[name])
    form = rng.choice(("bytes", "file", "data URL", "str"))

    def check(payload: bytes) -> str:
        limits = ImageLimits(max_pixels=10**6)
        if form == "file":
            return in_file(payload, "", lambda path: _is_image(load_image(path, limits)))
        if form == "str":
            return typed(lambda: _is_image(load_image(payload.decode("latin-1"), limits)))
        url = "data:image/png;base64," + base64.b64encode(payload).decode()
        return typed(lambda: _is_image(load_image(payload if form == "bytes" else url, limits)))

    return Case(f"{name} as {form}", data, check, ".image")


def _is_image(array: np.ndarray) -> np.ndarray:
    assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and array.size
    return array


# ---- videos ----


def _videos() -> dict[str, bytes]:
    """Five frames: as animated images, and as files of PyAV if that is installed."""
    rng = np.random.default_rng(3)
    pixels = [rng.integers(0, 256, (32, 48, 3), dtype=np.uint8) for _ in range(5)]
    frames = [Image.fromarray(one) for one in pixels]
    found = {}
    for kind in ("GIF", "WEBP", "PNG"):
        out = io.BytesIO()
        frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=40)
        found[kind] = out.getvalue()
    try:
        import av
    except ImportError:
        return found
    for kind, codec in (("mp4", "mpeg4"), ("matroska", "ffv1"), ("avi", "mjpeg"), ("mpegts", "mpeg2video")):
        out = io.BytesIO()
        with av.open(out, "w", format=kind, options={"fflags": "bitexact"}) as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height = 48, 32
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for one in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(one, format="rgb24")))
            container.mux(stream.encode(None))
        found[kind] = out.getvalue()
    return found


VIDEOS = _videos()


def videos(seed: int) -> Case:
    rng = random.Random(seed)
    name = rng.choice(sorted(VIDEOS))
    options = rng.choice(({}, {"count": 1}, {"count": 256}, {"rate": 1000}, {"rate": 0.001, "count": 3}))
    is_file = rng.random() < 0.3

    def take(source: Path | bytes) -> object:
        frames = read_video(Video(source, **options), ImageLimits(max_pixels=10**6))
        assert 1 <= len(frames.pictures) <= options.get("count", 256)
        for picture in frames.pictures:
            _is_image(picture)
        seconds = frames.seconds
        assert seconds is not None and len(seconds) == len(frames.pictures)
        assert all(a < b for a, b in itertools.pairwise((-1.0, *seconds, float("inf"))))
        return frames

    def check(payload: bytes) -> str:
        return in_file(payload, "", take) if is_file else typed(lambda: take(payload))

    return Case(f"{name} {options} as {'file' if is_file else 'bytes'}", scrambled(rng, VIDEOS[name]), check, ".video")


# ---- GGUF files ----


def gguf(seed: int) -> Case:
    """A text or mmproj file of a family with one or two fields changed, loaded and asked about a picture."""
    rng = random.Random(seed)
    family, which = rng.choice(FAMILIES), rng.choice(("text", "mmproj", "mmproj"))
    data, said = mutate((FIXTURES / family / f"{which}.gguf").read_bytes(), seed)
    prune = rng.choice((None, "balanced", "fast"))

    def ask(path: Path) -> str:
        files = {"text": FIXTURES / family / "text.gguf", "mmproj": FIXTURES / family / "mmproj.gguf", which: path}
        with StarVLM(files["text"], files["mmproj"], n_ctx=512, n_threads=1, image_cache_bytes=0) as vlm:
            return vlm.generate(
                f"a {star_edge.MEDIA_MARKER} b", [PICTURE], prune, max_tokens=2, chat=False
            ).finish_reason

    return Case(
        f"{family} {which}: {said} (prune={prune})",
        data,
        lambda payload: in_file(payload, ".gguf", ask),
        ".gguf",
        divides=False,
    )


def _write_lora() -> bytes:
    """An adapter that fits the fixture `llava`."""
    import gguf as writer_of

    rng = np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.gguf"
        writer = writer_of.GGUFWriter(str(path), "llama")
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 8.0)
        for name, n_in, n_out in (("blk.0.attn_q.weight", 64, 128), ("blk.1.ffn_down.weight", 80, 64)):
            writer.add_tensor(f"{name}.lora_a", rng.standard_normal((4, n_in)).astype(np.float32))
            writer.add_tensor(f"{name}.lora_b", rng.standard_normal((n_out, 4)).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


LORA = _write_lora()


def lora(seed: int) -> Case:
    data, said = mutate(LORA, seed)

    def ask(path: Path) -> str:
        with StarVLM(FIXTURES / "llava" / "text.gguf", n_ctx=256, n_threads=1, lora_path=str(path)) as vlm:
            return vlm.generate("a", max_tokens=2, chat=False).finish_reason

    return Case(f"LoRA: {said}", data, lambda payload: in_file(payload, ".gguf", ask), ".gguf", divides=False)


# ---- files of tasks and results ----

_LINES = (
    b'{"id": 1, "image": "a.jpg", "prompt": "what?", "text": "x", "finish_reason": "stop", "model": "m", '
    b'"task": "t"}\n',
    b'{"image": "a.jpg", "question": "what?", "answer": "a cat", "id": "q1"}\n',
    b'{"star_edge_eval": 1, "model": "m"}\n'
    b'{"task": "q1", "config": "off", "task_fingerprint": "a", "config_fingerprint": "b", "text": "x"}\n',
)


def results(seed: int) -> Case:
    rng = random.Random(seed)
    data = scrambled(rng, b"".join(rng.choice(_LINES) for _ in range(rng.randint(1, 3))))
    if rng.random() < 0.1:
        data = rng.choice(
            (
                b"[" * 100000,
                b'{"id": ' + b"9" * 5000 + b"}",
                '{"id": "\u2028"}\n'.encode(),
                b"\xff\xfe",
                b"\0" * 100,
                b"",
            )
        )
    kind = rng.choice(("results", "tasks", "eval tasks", "eval results"))
    settings = batch.Settings(PruneConfig())

    def use(path: Path) -> object:
        if kind == "tasks":
            return batch.read_tasks(path, "what?", settings)
        if kind == "eval tasks":
            return read_questions(path)
        if kind == "eval results":
            return Records(str(path), {"model": "m"}, [], []).close()
        return batch.open_results(path, [], "m").close()

    return Case(kind, data, lambda payload: in_file(payload, ".jsonl", use), ".jsonl")
