"""Random models of each kind, written once for a test run, and prompts for them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

# Before any library reads them: threads of the reference and of llama.cpp that spin against each other cost minutes when other
# work shares the cores, and threads that sleep at once cost as much on tiny models. Spin briefly.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))

import gpu  # noqa: E402

if gpu.ON:
    gpu.install()

import bounds  # noqa: E402
import stock  # noqa: E402
from families import MODES  # noqa: E402
from reference import Decoder  # noqa: E402

from star_edge.decoder.context import Rows  # noqa: E402
from star_edge.decoder.prefill import Segment  # noqa: E402
from star_edge.engine import KV_TYPES  # noqa: E402
from star_edge.synthetic import DecoderShape, EncoderShape, write_decoder, write_encoder  # noqa: E402

LLAMA = DecoderShape(n_layers=8, n_embd=256, n_heads=8, n_heads_kv=2, n_ff=256)
QWEN2VL = DecoderShape(n_layers=8, n_embd=256, n_heads=8, n_heads_kv=4, n_ff=256, rope_sections=(4, 6, 6, 0))
CLIP = EncoderShape(image_size=98, patch_size=14, n_layers=4, n_embd=64, n_heads=4, n_ff=128)
QWEN2VL_VISION = EncoderShape(image_size=112, patch_size=14, n_layers=3, n_embd=64, n_heads=4, n_ff=128, kind="qwen2vl")


@dataclass
class Models:
    """Files of one family: text model, mmproj, and the shape of the text model."""

    text: Path
    mmproj: Path
    shape: DecoderShape

    @property
    def mrope(self) -> bool:
        return self.shape.rope_sections is not None


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """Random f32 models: {"llama": Models, "qwen2vl": Models}; queries are scaled up so that attention is not uniform."""
    folder = tmp_path_factory.mktemp("models")
    result = {}
    for name, shape, encoder in (("llama", LLAMA, CLIP), ("qwen2vl", QWEN2VL, QWEN2VL_VISION)):
        models = Models(folder / f"{name}.gguf", folder / f"{name}-mmproj.gguf", shape)
        write_decoder(models.text, shape, "f32", seed=1, sharpness=2.0)
        write_encoder(models.mmproj, encoder, shape.n_embd, "f32", seed=2)
        result[name] = models
    return result


@pytest.fixture(scope="session")
def decoder_rounding(families):
    """(family, mode of tests/families.py) -> what stock llama.cpp rounds there, against the float64 reference (bounds.py)."""
    measured = {}

    def get(family, mode="f32"):
        if (family, mode) not in measured:
            flash_attn, cache = MODES[mode]
            llama = stock.load(families[family].text, flash_attn, n_threads=1, type_k=KV_TYPES[cache], type_v=KV_TYPES[cache])
            prompt = random_prompt(families[family], [12, (10, 20), 9], seed=1)
            measured[family, mode] = bounds.of_decoder(llama, prompt, Decoder(families[family].text))
            llama.close()
        return measured[family, mode]

    return get


@dataclass
class RandomPrompt:
    """Segments with random content, and everything that the float64 reference needs of them."""

    segments: list[Segment]
    next_position: int

    @property
    def positions(self):
        return np.concatenate([s.rows.positions for s in self.segments], axis=-1)

    @property
    def image_of_row(self):
        return np.concatenate([np.full(len(s.rows), -1 if s.image is None else s.image) for s in self.segments])

    def embed(self, reference):
        """(n, n_embd) float64 rows."""
        return np.concatenate(
            [reference.embed(s.rows.tokens) if s.rows.tokens is not None else s.rows.embeddings.astype(np.float64) for s in self.segments]
        )


def random_prompt(models: Models, parts, seed=0) -> RandomPrompt:
    """parts: ints are runs of that many text tokens, (rows, columns) tuples are images of that token grid."""
    rng = np.random.default_rng(seed)
    segments, position, n_images = [], 0, 0
    for part in parts:
        if isinstance(part, int):
            p = np.arange(position, position + part, dtype=np.int32)
            rows = Rows(
                np.stack([p, p, p, 0 * p]) if models.mrope else p, tokens=rng.integers(259, models.shape.n_vocab, part).astype(np.int32)
            )
            segments.append(Segment(rows))
            position += part
        else:
            h, w = part
            i = np.arange(h * w, dtype=np.int32)
            if models.mrope:
                p = np.stack([0 * i + position, position + i // w, position + i % w, 0 * i]).astype(np.int32)
            else:
                p = position + i
            embeddings = rng.standard_normal((h * w, models.shape.n_embd)).astype(np.float32)
            segments.append(Segment(Rows(p, embeddings=embeddings), image=n_images))
            n_images += 1
            position += max(h, w) if models.mrope else h * w
    return RandomPrompt(segments, position)


def random_image(seed, height=98, width=98):
    """(height, width, 3) uint8 with structure at several scales."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for n in (3, 7, 14):
        block = rng.integers(0, 256, (n, n, 3))
        image += block[np.arange(height)[:, None] * n // height, np.arange(width)[None] * n // width]
    return np.ascontiguousarray((image / 3).astype(np.uint8))


# ---- the README's support table (tests/support.py) ----

FAMILY_RESULTS = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--write-support-table", action="store_true", help="write the README's table from what the fixtures say of their families")


def pytest_configure(config):
    config.stash[FAMILY_RESULTS] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    params = getattr(getattr(item, "callspec", None), "params", {})
    if "fixture" in params and (report.when == "call" or not report.passed):
        outcome = "failed" if hasattr(report, "wasxfail") else report.outcome  # what is expected to fail does not work
        item.config.stash[FAMILY_RESULTS][params["fixture"], item.originalname, params.get("mode")] = outcome
    return report


@pytest.fixture
def family_results(request):
    """(family, test function, mode) -> outcome, of the family tests that this session has run so far."""
    return request.config.stash[FAMILY_RESULTS]
