"""Sizes of the page model, and what its files say about pixels. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, which Qwen2-VL files carry
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
PATCH = 14


@dataclass(frozen=True)
class ModelConfig:
    """Sizes. `v_` is the encoder's. rope_sections: pairs of a head that turn with time, row and column."""

    v_width: int = 256
    v_heads: int = 4
    v_layers: int = 6
    v_ff: int = 768
    width: int = 384
    heads: int = 6
    kv_heads: int = 3
    layers: int = 12
    ff: int = 768
    rope_sections: tuple[int, int, int] = (4, 12, 16)
    rope_base: float = (
        10000.0  # low frequencies stay: heads that find a place by what stands there need pairs that hardly turn
    )
    norm_eps: float = 1e-6

    @property
    def head_size(self) -> int:
        return self.width // self.heads


SIZES = {
    "full": ModelConfig(),
    "tiny": ModelConfig(
        v_width=96,
        v_heads=3,
        v_layers=2,
        v_ff=192,
        width=128,
        heads=4,
        kv_heads=2,
        layers=3,
        ff=256,
        rope_sections=(2, 6, 8),
    ),
}
