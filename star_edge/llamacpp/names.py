"""Names and numbers of llama.cpp that the rest of the package uses, with what they stand for."""

from __future__ import annotations

# enum ggml_type: the types that a KV cache may have
KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2}

# Inputs of the graphs of encoders (tools/mtmd/clip.cpp), and tensors of an mmproj file that they join or add
PATCHES, POSITIONS, WINDOW_INDEX = "patches", "positions", "window_idx"
PIXELS = "inp_raw"  # (width, height, 3) float32, normalized: rows of a channel one after the other
WINDOW_MASK, TO_WINDOWS = "window_mask", "inv_window_idx"  # Qwen2.5-VL: of rows, and which unit comes into which place
ROW_POSITIONS, COLUMN_POSITIONS = "pos_h", "pos_w"  # Pixtral
PLACED = ("inp_pos_emb", 1)  # Qwen3-VL: the node that adds position embeddings to patches, and which source they are
ADDED = ("pos_embed", 1)  # GLM-4.xV, PaddleOCR-VL: the same (clip_graph::build_vit)
CLASS_EMBEDDING, POSITION_EMBEDDINGS, POST_NORM = "v.class_embd", "v.position_embd.weight", "v.post_ln.weight"
MAX_LEARNED_ROWS = 64  # of CLASS_EMBEDDING, where it has several: RADIO, whose published files have 10
PATCH_NORM = "v.norm_embd.weight"

# What decoders call the output of a layer, by architecture, where it is not what the C core takes for granted
LAYER_OUTPUTS = {"nemotron_h": "nemotron_h_block_out", "nemotron_h_moe": "nemotron_h_block_out"}

# Decoders with recurrent layers beside attention whose layer windows are tested (tests/test_hybrid.py). Others that
# llama_model_is_hybrid names have no decoder stage: a graph with another order or other names can be wrong without a
# sign of it.
HYBRIDS = (
    "falcon-h1",
    "granitehybrid",
    "lfm2",
    "lfm2moe",
    "nemotron_h",
    "nemotron_h_moe",
    "qwen35",
    "qwen35moe",
    "qwen3next",
)


def is_about_context(error: ValueError) -> bool:
    """Whether Llama could not make its context. Otherwise it could not load the model."""
    return "context" in str(error)
