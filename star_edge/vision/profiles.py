"""How the rows of each vision encoder become image tokens: one profile for each projector type.

An encoder without a profile gets GENERIC: its tokens are chosen by their embeddings alone.

A profile says which rows of the encoder's sequence a token is made of. These helpers are the common cases of
`to_tokens`:

    by_index         row index[i] (a gather that the graph does itself)
    one_to_one       row i
    in_turn(n)       rows n i to n i + n - 1: the encoder has put them in this order
    on_raster        a square of rows on the raster: pixel shuffle, average pooling
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..llamacpp.names import MAX_LEARNED_ROWS, PATCHES, WINDOW_INDEX

# What the scores are read from; a GGUF of projector type T stores them under these keys.
METADATA_KEYS = (
    "clip.projector_type",
    "clip.vision.projector_type",
    "clip.has_vision_encoder",
    "clip.vision.block_count",
    "clip.vision.attention.head_count",
    "clip.vision.feature_layer",
    "clip.vision.patch_size",
    "clip.vision.projector.scale_factor",
    "clip.vision.spatial_merge_size",
    "clip.vision.n_wa_pattern",
    "clip.vision.window_size",
    "clip.vision.is_deepstack_layers",
    "clip.vision.image_min_pixels",
    "clip.vision.embedding_length",
    "clip.vision.image_std",
)


Grid = tuple[int, int] | None


@dataclass(frozen=True)
class Layout:
    """How the ordinary tokens of one image lie.

    Attributes:
        n_tokens: Their number.
        grid: (rows, columns) of them on the image, or None.
        index: The profile's graph input, (n,) int32, or None.
    """

    n_tokens: int
    grid: Grid = None
    index: np.ndarray | None = None


ToTokens = Callable[[np.ndarray, Layout], np.ndarray]


def by_index(rows: np.ndarray, layout: Layout) -> np.ndarray:
    return rows[layout.index]


def one_to_one(rows: np.ndarray, layout: Layout) -> np.ndarray:
    return rows


def in_turn(n: int) -> ToTokens:
    return lambda rows, layout: rows.reshape(-1, n).mean(axis=1)


def on_raster(rows: np.ndarray, layout: Layout) -> np.ndarray:
    """A token is the mean over a square of rows. The raster of rows is layout.grid, enlarged by the square's side."""
    assert layout.grid is not None  # VisionEncoder.encode has made sure of it
    height, width = layout.grid
    side = math.isqrt(len(rows) // layout.n_tokens)
    means: np.ndarray = rows.reshape(height, side, width, side).mean(axis=(1, 3))
    return means.ravel()


def all_layers(metadata: dict[str, Any]) -> int:
    return int(metadata["clip.vision.block_count"] or 1)


def square_grid(n_tokens: int, nx: int, ny: int) -> Grid:
    """Grid of a square image. libmtmd gives (n, 1) for models without M-RoPE, otherwise columns and rows."""
    if nx * ny == n_tokens and ny > 1:
        return ny, nx
    side = round(n_tokens**0.5)
    return (side, side) if side * side == n_tokens else None


def given_grid(n_tokens: int, nx: int, ny: int) -> Grid:
    """Grid that libmtmd gives, if it gives more than the number of tokens."""
    return (ny, nx) if nx * ny == n_tokens and ny > 1 else None


def plain_grid(n_tokens: int, size: tuple[int, int]) -> Grid:
    """Grid with columns / rows = width / height."""
    height, width = size
    rows = max(1, round(math.sqrt(n_tokens * height / width)))
    columns = n_tokens // rows
    return (rows, columns) if rows * columns == n_tokens and rows * width == columns * height else None


def grid_with_row_ends(n_tokens: int, size: tuple[int, int]) -> Grid:
    """Grid with a token after each row but the last: rows (columns + 1) - 1 tokens, columns / rows = width / height."""
    height, width = size
    shape = width / height
    rows = max(1, round((math.sqrt(1 + 4 * shape * (n_tokens + 1)) - 1) / (2 * shape)))
    columns = (n_tokens + 1) // rows - 1
    return (rows, columns) if rows * (columns + 1) - 1 == n_tokens and rows * width == columns * height else None


def framed_grid(n_tokens: int, nx: int, ny: int) -> Grid:
    """Grid that libmtmd gives, with a token after each row, one before all and one after all."""
    return (ny, nx) if (nx + 1) * ny + 2 == n_tokens else None


def frame(n_tokens: int, grid: Grid) -> np.ndarray:
    """The tokens around a `framed_grid`."""
    special = np.zeros(n_tokens, bool)
    if grid is not None:
        special[[0, -1]] = True
        special[1:-1].reshape(grid[0], grid[1] + 1)[:, -1] = True
    return special


def row_ends(n_tokens: int, grid: Grid) -> np.ndarray:
    special = np.zeros(n_tokens, bool)
    if grid is not None:
        special[grid[1] :: grid[1] + 1] = True
    return special


@dataclass(frozen=True)
class EncoderProfile:
    """How the rows of an encoder become image tokens.

    Attributes:
        to_tokens: to_tokens(row_scores (n_rows,), layout) gives the scores of the tokens, (layout.n_tokens,): means
            over their rows. None: there is no such map, and the encoder's attention is not read.
        n_rows: n_rows(n_tokens) is an upper bound of the rows of the encoder's sequence. n_tokens includes special
            tokens.
        n_last_rows: The same for the layer that is read, where the graph merges rows on its way. None: `n_rows`.
        n_layers: n_layers(metadata) is the expected number of attention layers. The graph itself decides: scores are of
            its last layer without a window mask.
        grid: grid(n_tokens, nx, ny) is (rows, columns) of the ordinary tokens, or None. nx, ny: what libmtmd says.
        sized_grid: sized_grid(n_tokens, (height, width)) is the same from the encoder's image size in pixels. For
            encoders of any image size, where libmtmd gives the number of tokens alone.
        special: special(n_tokens, grid) marks special tokens such as learned row ends, (n_tokens,) bool. None: there
            are none.
        index_input: Graph input that says which rows become tokens, or in which order; or None.
        to_cells: to_cells(index) is the cell of the patch grid that each token shows, (n_tokens,), -1 for none. None:
            ordinary token i shows cell i.
        cls_row: cls_row(n_tokens) is the index of the CLS row. None: there is none.
        cls_first: Profile of the same encoder in a graph that joins CLS first, if this depends on llama.cpp.
        why_embeddings: What is so of the projector type where its tokens are chosen by their embeddings.
    """

    to_tokens: ToTokens | None
    n_rows: Callable[[int], int] = lambda n: n
    n_layers: Callable[[dict[str, Any]], int] = all_layers
    grid: Callable[[int, int, int], Grid] = square_grid
    sized_grid: Callable[[int, tuple[int, int]], Grid] | None = None
    special: Callable[[int, Grid], np.ndarray] | None = None
    index_input: str | None = None
    to_cells: Callable[[np.ndarray], np.ndarray] | None = None
    cls_row: Callable[[int], int] | None = None
    cls_first: EncoderProfile | None = None
    n_last_rows: Callable[[int], int] | None = None
    why_embeddings: str = "has no profile"

    @property
    def reads_attention(self) -> bool:
        return self.to_tokens is not None


def _llava_layers(metadata: dict[str, Any]) -> int:
    """clip_graph_llava runs up to the deepest feature layer that the file names, otherwise all layers but the last."""
    features = metadata.get("clip.vision.feature_layer")
    if isinstance(features, list) and features:
        return max(int(f) for f in features)
    return all_layers(metadata) - 1


def _llava(cls_row: Callable[[int], int], first_patch: int, cls_first: EncoderProfile | None = None) -> EncoderProfile:
    """CLIP with a two-layer projector. The graph's input `patches` says which row each token is made of.

    Without the repair, the CLS row is among them; it shows no place.
    """
    to_cells = lambda index: np.where(
        (index >= first_patch) & (index < len(index) + first_patch), index - first_patch, -1
    )
    return EncoderProfile(
        by_index,
        lambda n: n + 1,
        _llava_layers,
        index_input=PATCHES,
        to_cells=to_cells,
        cls_row=cls_row,
        cls_first=cls_first,
    )


def _internvl(cls_first: EncoderProfile | None = None) -> EncoderProfile:
    """InternVL: 2 x 2 patches of a tile are shuffled into a token. CLS is a row, the last one here, but not a token."""
    patches = slice(None, -1) if cls_first else slice(1, None)
    return EncoderProfile(
        lambda rows, layout: on_raster(rows[patches], layout),
        lambda n: 4 * n + 1,
        cls_row=(lambda n: 4 * n) if cls_first else (lambda n: 0),
        cls_first=cls_first,
    )


def _in_windows(rows: np.ndarray, layout: Layout) -> np.ndarray:
    """Qwen2.5-VL: token i is made of the 2 x 2 patches in group index[i]."""
    return in_turn(4)(rows, layout)[layout.index]


def _ldp(cls_row: Callable[[int], int], cls_first: EncoderProfile | None = None) -> EncoderProfile:
    """CLIP with MobileVLM's projector: a token is made of 2 x 2 patches, which `patches` puts in raster order."""
    to_tokens = lambda rows, layout: on_raster(rows[layout.index], layout)
    return EncoderProfile(
        to_tokens, lambda n: 4 * n + 1, _llava_layers, index_input=PATCHES, cls_row=cls_row, cls_first=cls_first
    )


def _after_learned_rows(rows: np.ndarray, layout: Layout) -> np.ndarray:
    """RADIO: as many learned rows as the file has, then 2 x 2 patches for each token."""
    return on_raster(rows[len(rows) - 4 * layout.n_tokens :], layout)


PROFILES: dict[str, EncoderProfile] = {
    # LLaVA-1.5, LLaVA-NeXT (each crop is an image), BakLLaVA, Granite-Vision. This llama.cpp joins CLS last
    # (clip_graph_llava).
    "mlp": _llava(lambda n: n, 0, cls_first=_llava(lambda n: 0, 1)),
    # MobileVLM and MobileVLM V2
    "ldp": _ldp(lambda n: 4 * n, cls_first=_ldp(lambda n: 0)),
    "ldpv2": _ldp(lambda n: 4 * n, cls_first=_ldp(lambda n: 0)),
    # Qwen2-VL (and MinerU 2.5), Qwen3-VL, Qwen3.5: rows come in groups of 2 x 2 patches, merged in that order
    "qwen2vl_merger": EncoderProfile(in_turn(4), lambda n: 4 * n),
    "qwen3vl_merger": EncoderProfile(in_turn(4), lambda n: 4 * n),
    # GLM-4.1V, GLM-4.5V, GLM-OCR: the same groups, one kernel of a convolution each (clip_graph_glm4v)
    "glm4v": EncoderProfile(in_turn(4), lambda n: 4 * n),
    # Qwen2.5-VL: the groups are in the order of windows, and the graph puts the tokens in order at its end
    "qwen2.5vl_merger": EncoderProfile(_in_windows, lambda n: 4 * n, index_input=WINDOW_INDEX),
    "qwen2.5o": EncoderProfile(_in_windows, lambda n: 4 * n, index_input=WINDOW_INDEX),
    # Gemma 3: squares of 4 x 4 patches are averaged (clip_graph_siglip)
    "gemma3": EncoderProfile(on_raster, lambda n: 16 * n),
    # SmolVLM, Idefics3 and granite-docling: squares of 2 x 2 to 4 x 4 patches are shuffled into a token; each tile is a
    # chunk (clip_graph_siglip)
    "idefics3": EncoderProfile(on_raster, lambda n: 16 * n),
    # InternVL 2, 3 and 3.5. This llama.cpp joins CLS last (clip_graph_internvl)
    "internvl": _internvl(cls_first=_internvl()),
    # Pixtral and Mistral-Small 3.1: one patch or 2 x 2 for a token, [IMG_BREAK] after each row but the last
    # (clip_graph_pixtral)
    "pixtral": EncoderProfile(on_raster, lambda n: 4 * n, sized_grid=grid_with_row_ends, special=row_ends),
    # LightOnOCR: Pixtral's encoder with 2 x 2 patches for a token, and no [IMG_BREAK] (clip_graph_pixtral)
    "lightonocr": EncoderProfile(on_raster, lambda n: 4 * n, grid=given_grid, sized_grid=plain_grid),
    # HunyuanOCR: any image size, 2 x 2 patches of the raster, learned tokens at the ends of rows and around all
    "hunyuanvl": EncoderProfile(on_raster, lambda n: 4 * n, grid=framed_grid, special=frame),
    # Gemma 4: any image size, 3 x 3 patches averaged into a token
    "gemma4v": EncoderProfile(on_raster, lambda n: 9 * n, grid=given_grid, sized_grid=plain_grid),
    # Gemma 4 12B: any image size, a matrix makes a token of a square of pixels (clip_graph_gemma4uv)
    "gemma4uv": EncoderProfile(
        None, grid=given_grid, sized_grid=plain_grid, why_embeddings="has no encoder with attention"
    ),
    # PaddleOCR-VL: any image size, 2 x 2 patches of the raster for a token
    "paddleocr": EncoderProfile(on_raster, lambda n: 4 * n),
    # Kimi K2.5: any image size, 2 x 2 patches of the raster for a token
    "kimik25": EncoderProfile(on_raster, lambda n: 4 * n, grid=given_grid, sized_grid=plain_grid),
    # Nemotron Nano V2 VL: squares of 2 x 2 patches are shuffled into a token. RADIO's learned rows stand before them, a
    # class token first (clip_graph_nemotron_v2_vl)
    "nemotron_v2_vl": EncoderProfile(_after_learned_rows, lambda n: 4 * n + MAX_LEARNED_ROWS, cls_row=lambda n: 0),
    # MiniCPM-V 4.6: patches are merged 2 x 2 within the encoder, after attention in such windows, and once more at its
    # end (clip_graph_minicpmv4_6)
    "minicpmv4_6": EncoderProfile(
        on_raster,
        lambda n: 16 * n,
        lambda metadata: all_layers(metadata) + 1,
        grid=given_grid,
        sized_grid=plain_grid,
        n_last_rows=lambda n: 4 * n,
    ),
    # LFM2-VL and LFM2.5-VL: any image size, 2 x 2 patches of the raster for a token
    "lfm2": EncoderProfile(on_raster, lambda n: 4 * n, grid=given_grid, sized_grid=plain_grid),
}


# Encoders that look up a patch's row and column in tables. Past the end of a table ggml aborts (clip_graph_gemma4v,
# clip_graph_gemma4uv). Projector type -> side of a patch in pixels. The second merges patches before it looks them up.
POSITION_TABLES: dict[str, Callable[[dict[str, Any]], int]] = {
    "gemma4v": lambda metadata: int(metadata["clip.vision.patch_size"] or 1),
    "gemma4uv": lambda metadata: (
        int(metadata["clip.vision.patch_size"] or 1) * int(metadata["clip.vision.projector.scale_factor"] or 3)
    ),
}

# The encoder's attention is not read, and special tokens are found by `repeated_rows`
GENERIC = EncoderProfile(None, lambda n: 16 * n + 64, grid=given_grid)


def find_profile(metadata: dict[str, Any]) -> tuple[str, EncoderProfile]:
    """The projector type of an mmproj file's vision encoder, and its profile. metadata: values of METADATA_KEYS."""
    kind = metadata.get("clip.vision.projector_type") or metadata.get("clip.projector_type") or "unknown"
    return str(kind), PROFILES.get(str(kind), GENERIC)


def repeated_rows(embeddings: np.ndarray) -> np.ndarray:
    """Marks rows that are bit-identical to other rows but adjacent to none of them, (n_tokens,) bool.

    Image content repeats exactly only within an area of one colour, and its tokens are neighbours. A row that repeats
    elsewhere is a learned constant, such as a row end. If most rows repeat, it is the image that does (an overview and
    the one tile of a small picture), and none is marked.

    embeddings: (n_tokens, n_embd) float32.
    """
    rows = np.ascontiguousarray(embeddings, np.float32)
    head = np.ascontiguousarray(rows[:, :8])  # enough to tell most rows apart
    _, group, counts = np.unique(
        head.view(f"V{head.itemsize * head.shape[1]}").ravel(), return_inverse=True, return_counts=True
    )
    special = np.zeros(len(rows), bool)
    for g in np.flatnonzero(counts > 1):
        members = np.flatnonzero(group == g)
        special[members] = np.diff(members).min() > 1 and (rows[members] == rows[members[0]]).all()
    return special if 2 * special.sum() <= len(rows) else np.zeros(len(rows), bool)
