"""Random models of each kind, and prompts and pictures for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from star_edge.rows import Rows, Segment
from star_edge.synthetic import DecoderShape, DeltaNetShape, EncoderShape

LLAMA = DecoderShape(n_layers=8, n_embd=256, n_heads=8, n_heads_kv=2, n_ff=256)
QWEN2VL = DecoderShape(n_layers=8, n_embd=256, n_heads=8, n_heads_kv=4, n_ff=256, rope_sections=(4, 6, 6, 0))
QWEN35 = DecoderShape(
    n_layers=9,
    n_embd=256,
    n_heads=4,
    n_heads_kv=2,
    n_ff=256,
    rope_sections=(3, 3, 2, 0),
    rope_size=16,
    head_size=64,
    attention_layers=(1, 3, 4, 7),
    delta_net=DeltaNetShape(n_heads_k=2, n_heads_v=4, d_head=32),
)
LFM2 = DecoderShape(n_layers=9, n_embd=256, n_heads=8, n_heads_kv=2, n_ff=256, attention_layers=(1, 3, 4, 7), kernel=3)
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

    def at(self, *layers: int) -> list[int]:
        """For each layer the one with attention that is nearest to it and later than the one before; those for which
        there is none are left out.
        """
        usable = [k for k in self.shape.attention_layers or range(self.shape.n_layers) if k]
        found: list[int] = []
        for layer in layers:
            later = [k for k in usable if not found or k > found[-1]]
            if later:
                found.append(min(later, key=lambda k: (abs(k - layer), k)))
        return found


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
            [
                reference.embed(s.rows.tokens) if s.rows.tokens is not None else s.rows.embeddings.astype(np.float64)
                for s in self.segments
            ]
        )


def random_prompt(models: Models, parts, seed=0) -> RandomPrompt:
    """parts: ints are runs of that many text tokens, (rows, columns) tuples are images of that token grid."""
    rng = np.random.default_rng(seed)
    segments, position, n_images = [], 0, 0
    for part in parts:
        if isinstance(part, int):
            p = np.arange(position, position + part, dtype=np.int32)
            rows = Rows(
                np.stack([p, p, p, 0 * p]) if models.mrope else p,
                tokens=rng.integers(259, models.shape.n_vocab, part).astype(np.int32),
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
