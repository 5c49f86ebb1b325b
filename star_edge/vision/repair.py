"""Repairs, from outside, what this llama.cpp gets wrong with some encoders: LLaVA files (projector types mlp, ldp and
ldpv2), InternVL, Gemma 4 and Pixtral.

Faults 1 and 2 are known upstream (ggml-org/llama.cpp, issues 25814 and 25817). They are in clip_graph_llava:

1. Positions. The graph joins CLS to the end of the patches, but its inputs `positions` and `patches` are numbered for
   CLS first. Each patch gets its neighbour's position, the row of patch 0 is lost, and CLS reaches the decoder as an
   image token. The tap replaces both inputs, only if the graph joins CLS last. A llama.cpp that joins it first is left
   alone.

2. Layers. If the file lists no feature layers, the graph leaves out the file's last layer. The legacy converter
   (tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py) has left it out already, so features come from one layer
   too early. With `clip.vision.feature_layer = [block_count]` all layers run.

3. Activation. If `clip.use_gelu` is false, the graph computes QuickGELU. The legacy converter writes false for every
   activation but "gelu". SigLIP has "gelu_pytorch_tanh", which llama.cpp computes if the key is true, so the key is
   set. (This concerns Granite-Vision files made after docs/multimodal/granitevision.md.) For Gemma 4
   convert_hf_to_gguf.py writes no such key, which also gives QuickGELU in place of "gelu_pytorch_tanh". The key is set
   if the file has neither clip.use_gelu nor clip.use_silu.

What is done to a LLaVA file; the first line that fits decides:

    star_edge.encoder_layout = "stock"              nothing: the model was trained on what stock llama.cpp computes
    no v.class_embd (SigLIP)                        not 1: there is no CLS; 3 if it has clip.has_llava_projector (which
                                                    the legacy converter writes) and clip.use_gelu = false
    clip.vision.feature_layer is there              not 2: the file says how many layers run
    v.post_ln.weight is there                       not 2: features are of the whole encoder, and the file's author knew
                                                    of the layer that does not run (Moondream2 has its last one twice)
    width of a known encoder, one layer too few     2
    width of a known encoder, another number        not 2
    clip.has_llava_projector                        2
    otherwise                                       not 2: it is unknown where the encoder's layers end

4. Positions of InternVL. The graph (clip_graph_internvl) joins CLS to the end too, and adds the file's position
   embeddings unchanged, which have that of CLS first. It drops CLS at its end, so no row is lost. The tap reorders the
   embeddings, only if the graph joins CLS last. As with 1, one graph shows this when the file is loaded. A file with
   star_edge.encoder_layout = "stock" is left alone.

5. [IMG_BREAK] rows (Pixtral, Mistral-Small 3.1). clip_graph_pixtral makes them from memory that was never written, and
   multiplies it by 0, which leaves a NaN as it is. After some loads stock's logits are therefore NaN. The tap clears
   that memory (csrc/tap_inputs.c), with encoder="stock" too: there is nothing to be equal to.

6. Patches of GLM-OCR. clip_graph_glm4v of llama-cpp-python 0.3.35 normalizes them though the file has no such norm
   (v.norm_embd.weight; GLM-4.xV has it). Nothing here puts that right, so the file is refused there.

convert_hf_to_gguf.py writes no file that 1 or 2 concerns: of LLaVA models it takes only those with Pixtral's encoder.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError, UnsupportedModelError, quoted
from ..llamacpp.gguf import GGUFInfo, copy_with_metadata, read_tensor
from ..llamacpp.names import CLASS_EMBEDDING, PATCH_NORM, PATCHES, POSITION_EMBEDDINGS, POSITIONS, POST_NORM
from ..suggestions import use_one_of

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
_PROJECTORS = ("mlp", "ldp", "ldpv2")
# Layers of CLIP and SigLIP encoders, by width: B, L, so400m, H, bigG
_DEPTHS = {768: 12, 1024: 24, 1152: 27, 1280: 32, 1664: 48}


def _is_open(info: GGUFInfo, projector: str, projectors: tuple[str, ...] = _PROJECTORS) -> bool:
    """Whether a file may need a repair of these projector types."""
    return projector in projectors and info.values[LAYOUT_KEY] != STOCK_LAYOUT


def misses_layer(info: GGUFInfo, projector: str) -> bool:
    """Whether stock llama.cpp would leave out a layer that the features need."""
    v = info.values
    if not _is_open(info, projector) or v[_LAYERS] or POST_NORM in info.tensors:
        return False
    depth = _DEPTHS.get(v["clip.vision.embedding_length"])
    return v["clip.vision.block_count"] == depth - 1 if depth else bool(v["clip.has_llava_projector"])


def takes_quick_gelu(info: GGUFInfo, projector: str) -> bool:
    """Whether stock llama.cpp would compute QuickGELU, and the encoder has another activation."""
    v = info.values
    if _is_open(info, projector, ("gemma4v",)):
        return v[_GELU] is None and v[_SILU] is None
    return (
        _is_open(info, projector)
        and CLASS_EMBEDDING not in info.tensors
        and bool(v["clip.has_llava_projector"])
        and v[_GELU] is False
    )


@dataclass(frozen=True)
class Change:
    """A key of a file's metadata, as it should be.

    Attributes:
        key: The key.
        value: Its value, (n,) int32 or bool.
        done: What the encoder does with this value.
        undone: What it does without.
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
    """The right inputs of a graph that joins CLS last, by name. Empty if there is nothing to repair.

    - LLaVA, "positions", (n + 1,) int32: patch i has row i + 1 of the position embeddings; CLS, the last, has row 0.
    - LLaVA, "patches", (n,) int32: the rows that become tokens.
    - InternVL, the position embeddings themselves in that order, (n + 1, bytes of a row) uint8.
    """
    if CLASS_EMBEDDING not in info.tensors:
        return {}
    n = (int(info.values["clip.vision.image_size"] or 0) // int(info.values["clip.vision.patch_size"] or 1)) ** 2
    if _is_open(info, projector):
        return {
            POSITIONS: np.append(np.arange(1, n + 1), 0).astype(np.int32),
            PATCHES: np.arange(n, dtype=np.int32),
        }
    if _is_open(info, projector, ("internvl",)) and POSITION_EMBEDDINGS in info.tensors:
        rows = read_tensor(info, POSITION_EMBEDDINGS)
        if len(rows) % (n + 1) == 0:  # otherwise stock has no embedding for every row either
            return {POSITION_EMBEDDINGS: np.roll(rows.reshape(n + 1, -1), -1, axis=0)}
    return {}


def describe(inputs: dict[str, np.ndarray]) -> str:
    """What the inputs of `graph_inputs` put right."""
    if POSITION_EMBEDDINGS in inputs:
        return "each patch has its own position"
    return "each patch has its own position, and no token is CLS (llama.cpp issue 25814)"


def check_encoder(encoder: str) -> None:
    """Raises ConfigError unless it is "repaired" or "stock"."""
    if not isinstance(encoder, str) or encoder not in ("repaired", "stock"):
        raise ConfigError(
            f"encoder={quoted(encoder)} is unknown",
            use_one_of(encoder, ("repaired", "stock"), " (what llama.cpp computes by itself)"),
        )


def check_graph(info: GGUFInfo, projector: str, version: str) -> None:
    """Refuses a file that llama.cpp in this version of llama-cpp-python computes wrongly, where no repair helps.

    Raises:
        UnsupportedModelError: The features would be another image's.
    """
    older = version.partition("+")[0] == "0.3.35"
    if older and _is_open(info, projector, ("glm4v",)) and PATCH_NORM not in info.tensors:
        raise UnsupportedModelError(
            f"llama-cpp-python {version} computes the encoder of {info.path} wrongly: it normalizes patches of a "
            "GLM-OCR file, which has no such norm",
            'install llama-cpp-python 0.3.36 and reinstall star-edge, or use encoder="stock" for what it computes',
        )


@contextmanager
def with_metadata(info: GGUFInfo, changes: Sequence[Change]) -> Iterator[str]:
    """Gives the path of a temporary copy of the file with other metadata. libmtmd reads all of it while loading.

    Raises:
        OSError: The disk has no room for it.
    """
    with tempfile.TemporaryDirectory(prefix="star_edge-") as folder:
        path = os.path.join(folder, "mmproj.gguf")
        copy_with_metadata(info.path, path, {change.key: change.value for change in changes})
        yield path
