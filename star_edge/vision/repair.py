"""Repair, from outside, of what this llama.cpp gets wrong with the encoders of LLaVA files (projector types mlp, ldp
and ldpv2), InternVL, Gemma 4 and Pixtral.

The first two are known upstream (ggml-org/llama.cpp, issues 25814 and 25817) and are in its graph, clip_graph_llava:

1. Positions. The graph joins CLS to the end of the patches, and the numbers in its inputs `positions` and `patches` are
   for CLS first: each patch gets its neighbour's position, the row of patch 0 is lost, and CLS is fed to the decoder as
   an image token. The tap replaces both inputs, and only where the graph does join CLS last: a llama.cpp that joins it
   first is left alone.

2. Layers. Without a list of feature layers in the file the graph leaves out the file's last layer, and the legacy
   converter (tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py) has left it out already: features come from one
   layer too early. With `clip.vision.feature_layer = [block_count]` all layers run, whatever the graph would leave out
   by itself.

3. Activation. Where `clip.use_gelu` is false the graph computes QuickGELU, and the legacy converter writes false for
   all but "gelu". SigLIP's is "gelu_pytorch_tanh", which is what llama.cpp computes where the key is true; so it is
   set. (Files of Granite-Vision after docs/multimodal/granitevision.md.) For Gemma 4 convert_hf_to_gguf.py writes no
   such key at all, which is QuickGELU too, where
   the model has "gelu_pytorch_tanh": it is set where neither clip.use_gelu nor clip.use_silu is there.

What is done to a LLaVA file, first line that fits:

    star_edge.encoder_layout = "stock"                            nothing: the model was trained on what stock llama.cpp
    computes no v.class_embd (SigLIP)                                      no 1: there is no CLS; 3 if it has
                                                                  clip.has_llava_projector, which that converter writes,
                                                                  and clip.use_gelu = false
    clip.vision.feature_layer is there                            no 2: the file says how many layers run
    v.post_ln.weight is there                                     no 2: features are of the whole encoder; who wrote the
                                                                  file knew of the layer that does not run (Moondream2
                                                                  has its last one twice)
    width of a known encoder, and one layer fewer than it has     2
    width of a known encoder, and another number of layers        no 2
    clip.has_llava_projector, which that converter writes         2
    otherwise                                                     no 2: nothing is known of where its layers end

4. Positions of InternVL. Its graph (clip_graph_internvl) joins CLS to the end too, and adds the file's position
   embeddings as they are, which have that of CLS first. It drops CLS in the end, so that no row is lost. The tap puts
   the embeddings into the graph's order,
   where it does join CLS last (as with 1: what is learned of one graph, when the file is loaded, holds for all). A file
       with star_edge.encoder_layout = "stock" is left alone.

5. [IMG_BREAK] rows (Pixtral, Mistral-Small 3.1). clip_graph_pixtral makes them from memory that nobody has written,
  "cleared" by a multiplication with 0,
   where a NaN stays one: stock's logits are NaN after some loads, as its memory happens to be. The tap clears it
       (csrc/tap_inputs.c), with
   encoder="stock" too: there is nothing to be equal to.

Of 1 and 2: convert_hf_to_gguf.py writes no such file: of LLaVA models it takes those with Pixtral's encoder.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from ..llamacpp.gguf import GGUFInfo, copy_with_metadata, read_tensor

LAYOUT_KEY, STOCK_LAYOUT = "star_edge.encoder_layout", "stock"
_LAYERS, _GELU, _SILU = "clip.vision.feature_layer", "clip.use_gelu", "clip.use_silu"
METADATA_KEYS = (
    LAYOUT_KEY,
    _GELU,
    _SILU,
    "clip.has_llava_projector",
    "clip.vision.embedding_length",
    "clip.vision.image_size",
    "clip.vision.patch_size",
)
CLS, POSITIONS = "v.class_embd", "v.position_embd.weight"
_PROJECTORS = ("mlp", "ldp", "ldpv2")
# Layers of CLIP and SigLIP encoders by their width: B, L, so400m, H, bigG
_DEPTHS = {768: 12, 1024: 24, 1152: 27, 1280: 32, 1664: 48}


def _is_open(info: GGUFInfo, projector: str, projectors: tuple[str, ...] = _PROJECTORS) -> bool:
    """Whether there may be something to repair in a file."""
    return projector in projectors and info.values[LAYOUT_KEY] != STOCK_LAYOUT


def misses_layer(info: GGUFInfo, projector: str) -> bool:
    """Whether stock llama.cpp would leave out a layer that the file's features are made with."""
    v = info.values
    if not _is_open(info, projector) or v[_LAYERS] or "v.post_ln.weight" in info.tensors:
        return False
    depth = _DEPTHS.get(v["clip.vision.embedding_length"])
    return v["clip.vision.block_count"] == depth - 1 if depth else bool(v["clip.has_llava_projector"])


def takes_quick_gelu(info: GGUFInfo, projector: str) -> bool:
    """Whether stock llama.cpp would compute QuickGELU in an encoder that has another activation."""
    v = info.values
    if _is_open(info, projector, ("gemma4v",)):
        return v[_GELU] is None and v[_SILU] is None
    return (
        _is_open(info, projector)
        and CLS not in info.tensors
        and bool(v["clip.has_llava_projector"])
        and v[_GELU] is False
    )


@dataclass(frozen=True)
class Change:
    """A key of a file's metadata as it should be: (n,) int32 or bool. done, undone: what the encoder does with it and
    without it.
    """

    key: str
    value: np.ndarray | bool
    done: str
    undone: str


def metadata_changes(info: GGUFInfo, projector: str) -> list[Change]:
    changes = []
    if misses_layer(info, projector):
        n = int(info.values["clip.vision.block_count"])
        done = f"all {n} layers run instead of {n - 1} (llama.cpp issue 25817)"
        changes.append(Change(_LAYERS, np.array([n], np.int32), done, f"{n - 1} of its {n} layers run"))
    if takes_quick_gelu(info, projector):
        changes.append(
            Change(
                _GELU, True, "the activation is the model's GELU instead of QuickGELU", "its activation is QuickGELU"
            )
        )
    return changes


def graph_inputs(info: GGUFInfo, projector: str) -> dict[str, np.ndarray]:
    """Inputs of a graph that joins CLS last, as they must be, by name. Empty where there is nothing to repair.

    LLaVA: positions (n + 1) int32: patch i has row i + 1 of the position embeddings and CLS, the last, row 0; patches
        (n) int32: the
    rows that become tokens. InternVL: the position embeddings themselves in that order, (n + 1, bytes of a row) uint8.
    """
    if CLS not in info.tensors:
        return {}
    n = (int(info.values["clip.vision.image_size"] or 0) // int(info.values["clip.vision.patch_size"] or 1)) ** 2
    if _is_open(info, projector):
        return {
            "positions": np.append(np.arange(1, n + 1), 0).astype(np.int32),
            "patches": np.arange(n, dtype=np.int32),
        }
    if _is_open(info, projector, ("internvl",)) and POSITIONS in info.tensors:
        rows = read_tensor(info, POSITIONS)
        if len(rows) % (n + 1) == 0:  # otherwise stock has no embedding for every row either
            return {POSITIONS: np.roll(rows.reshape(n + 1, -1), -1, axis=0)}
    return {}


def describe(inputs: dict[str, np.ndarray]) -> str:
    """What the inputs of `graph_inputs` put right."""
    if POSITIONS in inputs:
        return "each patch has its own position"
    return "each patch has its own position, and no token is CLS (llama.cpp issue 25814)"


def check_encoder(encoder: str) -> None:
    """Raises ConfigError unless it is "repaired" or "stock"."""
    if not isinstance(encoder, str) or encoder not in ("repaired", "stock"):
        raise ConfigError(
            f"encoder={encoder!r} is unknown", 'use "repaired", or "stock" for what llama.cpp computes by itself'
        )


@contextmanager
def with_metadata(info: GGUFInfo, changes: Sequence[Change]) -> Iterator[str]:
    """The path of a temporary copy of the file with other metadata, for one load: libmtmd reads all of it into memory.

    Raises:
        OSError: there is no place for it.
    """
    with tempfile.TemporaryDirectory(prefix="star_edge-") as folder:
        path = os.path.join(folder, "mmproj.gguf")
        copy_with_metadata(info.path, path, {change.key: change.value for change in changes})
        yield path
