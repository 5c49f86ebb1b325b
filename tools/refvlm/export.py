"""Write a trained model as GGUF files for llama.cpp: the text model in f16 and q8_0, the encoder with its projector in
f16.

python tools/refvlm/export.py RUN/model.pt --out DIR

A checkpoint.pt of an unfinished run is taken too.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from model import PIXEL_MEAN, PIXEL_STD, ModelConfig, ReferenceVLM
from scenes import SceneConfig
from vocabulary import BOS, EOS, TOKEN_SCORES, TOKEN_TYPES, TOKENS, UNKNOWN

TEXT_F16, TEXT_Q8_0, MMPROJ_F16 = "refvlm-text-f16.gguf", "refvlm-text-q8_0.gguf", "refvlm-mmproj-f16.gguf"

# The encoder was trained on the rows that stock llama.cpp hands to the projector (model.py). Whoever corrects that
# order for models that were trained in CLIP's must leave this file alone.
LAYOUT_KEY, LAYOUT = "star_edge.encoder_layout", "stock"

# Pictures first, then the text without a space between: the space prefix of the tokenizer is the question's first space
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER:"
    "{% if message['content'] is string %} {{ message['content'] | trim }}"
    "{% else %}"
    "{% for part in message['content'] %}{% if part['text'] == '<__media__>' %}<__media__>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' and part['text'] != '<__media__>' %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{% elif message['role'] == 'assistant' %} ASSISTANT: {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
_CONTEXT = 1024

Weights = dict[str, np.ndarray]


def load_model(path: Path) -> ReferenceVLM:
    """The model of a model.pt or checkpoint.pt, in evaluation mode."""
    saved = torch.load(path, map_location="cpu")
    config = dict(saved["config"])
    model = ReferenceVLM(ModelConfig(**{**config, "scenes": SceneConfig(**config["scenes"])}))
    model.load_state_dict(saved["model"])
    return model.eval()


class Writer:
    """A GGUF file under construction: matrices in f16; norms, biases, positions and CLS in f32, as llama.cpp expects
    them.
    """

    def __init__(self, path: Path, architecture: str, name: str):
        self.gguf = gguf.GGUFWriter(str(path), architecture)
        self.gguf.add_name(name)
        self.gguf.add_file_type(gguf.LlamaFileType.MOSTLY_F16)

    def half(self, name: str, array: np.ndarray) -> None:
        self.gguf.add_tensor(name, np.ascontiguousarray(array, np.float16))

    def single(self, name: str, array: np.ndarray) -> None:
        self.gguf.add_tensor(name, np.ascontiguousarray(array, np.float32))

    def linear(self, name: str, weight: np.ndarray, bias: np.ndarray) -> None:
        self.half(f"{name}.weight", weight)
        self.single(f"{name}.bias", bias)

    def close(self) -> None:
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


def write_text(path: Path, c: ModelConfig, weights: Weights) -> None:
    """The decoder. RoPE turns neighbouring pairs here as in llama.cpp's Llama, so q and k need no permutation."""
    w = Writer(path, "llama", "refvlm")
    g = w.gguf
    g.add_context_length(_CONTEXT)
    g.add_embedding_length(c.width)
    g.add_block_count(c.layers)
    g.add_feed_forward_length(c.ff)
    g.add_head_count(c.heads)
    g.add_head_count_kv(c.kv_heads)
    g.add_layer_norm_rms_eps(c.norm_eps)
    g.add_rope_dimension_count(c.head_size)
    g.add_rope_freq_base(c.rope_base)
    g.add_vocab_size(len(TOKENS))
    g.add_tokenizer_model("llama")
    g.add_token_list([token.encode() for token in TOKENS])
    g.add_token_scores(TOKEN_SCORES)
    g.add_token_types(TOKEN_TYPES)
    g.add_bos_token_id(BOS)
    g.add_eos_token_id(EOS)
    g.add_unk_token_id(UNKNOWN)
    g.add_add_bos_token(True)
    g.add_add_eos_token(False)
    g.add_add_space_prefix(True)
    g.add_chat_template(CHAT_TEMPLATE)
    w.half("token_embd.weight", weights["embedding.weight"])
    for i in range(c.layers):
        block = _under(weights, f"blocks.{i}.")
        k, v = np.split(block["kv.weight"], 2)
        gate, up = np.split(block["gate_up.weight"], 2)
        w.single(f"blk.{i}.attn_norm.weight", block["norm1.weight"])
        w.single(f"blk.{i}.ffn_norm.weight", block["norm2.weight"])
        matrices = {"attn_q": block["q.weight"], "attn_k": k, "attn_v": v, "attn_output": block["out.weight"]}
        matrices |= {"ffn_gate": gate, "ffn_up": up, "ffn_down": block["down.weight"]}
        for name, matrix in matrices.items():
            w.half(f"blk.{i}.{name}.weight", matrix)
    w.single("output_norm.weight", weights["norm.weight"])
    w.half("output.weight", weights["out.weight"])
    w.close()


def write_mmproj(path: Path, c: ModelConfig, weights: Weights) -> None:
    """The encoder and the projector. llama.cpp runs all layers of a LLaVA encoder but the last, so one of zeros is
    added.
    """
    w = Writer(path, "clip", "refvlm-clip")
    g = w.gguf
    g.add_bool("clip.has_vision_encoder", True)
    g.add_string("clip.projector_type", "mlp")
    g.add_bool("clip.use_gelu", False)  # quick-GELU
    g.add_uint32("clip.vision.image_size", c.scenes.image_size)
    g.add_uint32("clip.vision.patch_size", c.scenes.patch_size)
    g.add_uint32("clip.vision.embedding_length", c.v_width)
    g.add_uint32("clip.vision.feed_forward_length", c.v_ff)
    g.add_uint32("clip.vision.block_count", c.v_layers + 1)
    g.add_uint32("clip.vision.attention.head_count", c.v_heads)
    g.add_uint32("clip.vision.projection_dim", c.width)
    g.add_float32("clip.vision.attention.layer_norm_epsilon", c.norm_eps)
    g.add_array("clip.vision.image_mean", list(PIXEL_MEAN))
    g.add_array("clip.vision.image_std", list(PIXEL_STD))
    g.add_string(LAYOUT_KEY, LAYOUT)
    vision = _under(weights, "vision.")
    patch = c.scenes.patch_size
    w.half("v.patch_embd.weight", vision["patch.weight"].reshape(c.v_width, 3, patch, patch))
    w.single("v.class_embd", vision["cls"])
    w.single("v.position_embd.weight", vision["positions"])
    w.single("v.pre_ln.weight", vision["pre_norm.weight"])
    w.single("v.pre_ln.bias", vision["pre_norm.bias"])
    layers = [_under(vision, f"blocks.{i}.") for i in range(c.v_layers)]
    layers.append({name: np.zeros_like(array) for name, array in layers[0].items()})
    for i, block in enumerate(layers):
        for name, weight, bias in zip("qkv", np.split(block["qkv.weight"], 3), np.split(block["qkv.bias"], 3)):
            w.linear(f"v.blk.{i}.attn_{name}", weight, bias)
        for name, own in (("attn_out", "out"), ("ffn_up", "up"), ("ffn_down", "down")):
            w.linear(f"v.blk.{i}.{name}", block[f"{own}.weight"], block[f"{own}.bias"])
        for name, own in (("ln1", "norm1"), ("ln2", "norm2")):
            w.single(f"v.blk.{i}.{name}.weight", block[f"{own}.weight"])
            w.single(f"v.blk.{i}.{name}.bias", block[f"{own}.bias"])
    w.linear("mm.0", weights["project_in.weight"], weights["project_in.bias"])
    w.linear("mm.2", weights["project_out.weight"], weights["project_out.bias"])
    w.close()


def _under(weights: Weights, prefix: str) -> Weights:
    """The weights of a part, by their names in it."""
    return {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}


def quantize(source: Path, target: Path, threads: int) -> None:
    """q8_0 by llama.cpp's own quantizer."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    parameters.nthread = threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp could not quantize {source}")


def export(model: ReferenceVLM, out: Path, threads: int = 1) -> None:
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    write_text(out / TEXT_F16, model.c, weights)
    write_mmproj(out / MMPROJ_F16, model.c, weights)
    quantize(out / TEXT_F16, out / TEXT_Q8_0, threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    export(load_model(args.weights), args.out, args.threads)
    for name in (TEXT_F16, TEXT_Q8_0, MMPROJ_F16):
        print(f"{args.out / name}: {(args.out / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
