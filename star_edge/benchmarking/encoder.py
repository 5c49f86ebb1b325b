"""Which settings of the encoder are fastest on this machine, for one model: what `star-edge doctor --measure` says."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ..engine import StarVLM
from ..errors import EngineError
from ..llamacpp.mtmd import MEDIA_MARKER
from ..llamacpp.tap import Plan
from ..synthetic.pictures import photo
from ..vision.chunks import ImageChunk
from ..vision.encoder import VisionEncoder
from ..vision.precision import fastest_type

SIDE = 448  # pixels of the picture: encoders of any picture size have a thousand patches then, others their own size
ROUNDS, ENCODES = 2, 2  # each setting is loaded in each round, and encodes so often in it


@dataclass(frozen=True)
class Setting:
    """How an encoder is loaded: with flash attention or without, and the type it computes in."""

    flash_attn: bool
    mmproj_type: str


def measure_encoder(vlm: StarVLM) -> list[dict[str, Any]]:
    """Time of one encode with flash attention and without, and in the type that is fastest on this processor.

    Each setting is the shortest of several encodes, in turn with the others: other work on the machine only adds.

    Args:
        vlm: A model with an encoder. It may not be used meanwhile.

    Returns:
        For each setting: flash_attn, type, milliseconds, n_tokens (of the image that was encoded), and is_used: whether
        the model has it now.

    Raises:
        EngineError: There is no encoder, or it failed.
        StarEdgeError: As `VisionEncoder`.
    """
    used = vlm.encoder
    if used is None:
        raise EngineError("there is no encoder to measure", "give an mmproj file")
    now = Setting(used.flash_attn, used.mmproj_type)
    settings = [now, Setting(not used.flash_attn, used.mmproj_type)]
    if not used.on_gpu and not used.precision.is_converted and fastest_type(used.precision.info) != used.precision.kind:
        settings.append(Setting(used.flash_attn, "auto"))
    rows: dict[Setting, dict[str, Any]] = {}
    for turn in range(ROUNDS):
        for setting in settings if turn % 2 == 0 else settings[::-1]:
            kind, n_tokens, seconds = _encode(used, vlm, setting)
            row = rows.setdefault(
                setting,
                {
                    "flash_attn": setting.flash_attn,
                    "type": kind,
                    "milliseconds": 1e3 * seconds,
                    "n_tokens": n_tokens,
                    "is_used": setting == now,
                },
            )
            row["milliseconds"] = min(row["milliseconds"], 1e3 * seconds)
    return [rows[setting] for setting in settings]


def _encode(used: VisionEncoder, vlm: StarVLM, setting: Setting) -> tuple[str, int, float]:
    """The type, the image's tokens, and the shortest time in seconds."""
    encoder = VisionEncoder(
        used.path,
        vlm.llama,
        flash_attn=setting.flash_attn,
        use_gpu=used.on_gpu,
        mmproj_type=setting.mmproj_type,
    )
    try:
        prompt = encoder.tokenize(MEDIA_MARKER, [photo(SIDE, SIDE)])
        try:
            chunk = next(chunk for chunk in prompt.chunks if isinstance(chunk, ImageChunk))
            times = []
            for _ in range(ENCODES):
                start = time.perf_counter()
                encoder.run(chunk, Plan())
                times.append(time.perf_counter() - start)
        finally:
            prompt.close()
        return encoder.precision.kind, chunk.n_tokens, min(times)
    finally:
        encoder.close()
