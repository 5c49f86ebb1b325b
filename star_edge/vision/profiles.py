"""What has to be known of a vision encoder to score its image tokens: one entry for each projector type.

An encoder that has no entry still works: its vision stage is off, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# What the scores are read from; a GGUF of projector type T stores them under these keys.
METADATA_KEYS = (
    "clip.projector_type",
    "clip.vision.projector_type",
    "clip.vision.block_count",
    "clip.vision.attention.head_count",
    "clip.vision.feature_layer",
)


@dataclass(frozen=True)
class EncoderProfile:
    """How the rows of an encoder become image tokens.

    n_layers_run(metadata): attention layers that the graph runs.
    index_input: graph input that says which rows become tokens, or None.
    to_cells(index) -> (n_tokens,): cell of the patch grid that a token shows, -1 for none; None: token i shows cell i.
    to_tokens(row_scores (n_rows,), index (n_index,) or None) -> (n_tokens,): the score of a token is the mean over its rows.
    n_rows(n_tokens): rows of the encoder's sequence.
    cls_row(n_tokens): the CLS row among them; None: there is none.
    """

    n_layers_run: Callable[[dict[str, object]], int]
    to_tokens: Callable[[np.ndarray, np.ndarray | None], np.ndarray]
    n_rows: Callable[[int], int]
    index_input: str | None = None
    to_cells: Callable[[np.ndarray], np.ndarray] | None = None
    cls_row: Callable[[int], int] | None = None


def _llava_layers(metadata: dict[str, object]) -> int:
    """clip_graph_llava: up to the deepest explicit feature layer, otherwise all but the last."""
    features = metadata.get("clip.vision.feature_layer")
    if isinstance(features, list) and features:
        return max(int(f) for f in features)
    return int(metadata["clip.vision.block_count"]) - 1


def _llava_cells(index: np.ndarray) -> np.ndarray:
    """This llama.cpp puts CLS last (clip_graph_llava), so row i is patch i and the last row shows no place."""
    return np.where(index < len(index), index, -1)


PROFILES: dict[str, EncoderProfile] = {
    # LLaVA-1.5: the graph's own `patches` input says which row each token is made of (CLS is among the rows)
    "mlp": EncoderProfile(
        _llava_layers,
        lambda rows, index: rows[index],
        lambda n: n + 1,
        index_input="patches",
        to_cells=_llava_cells,
        cls_row=lambda n: n,
    ),
    # Qwen2-VL: rows come in groups of 2 x 2 patches, merged in that order
    "qwen2vl_merger": EncoderProfile(
        lambda metadata: int(metadata["clip.vision.block_count"]),
        lambda rows, index: rows.reshape(-1, 4).mean(axis=1),
        lambda n: 4 * n,
    ),
}


def find_profile(metadata: dict[str, object]) -> tuple[str, EncoderProfile | None]:
    """Projector type of an mmproj file, and its profile if there is one."""
    kind = metadata.get("clip.vision.projector_type") or metadata.get("clip.projector_type") or "unknown"
    return str(kind), PROFILES.get(str(kind))
