"""Write a trained model as GGUF files for llama.cpp: decoder, and encoder with merger, each in f16 and q8_0, and the
decoder in q5_0 too.

python tools/pagevlm/export.py RUN --out DIR
"""

from __future__ import annotations

import argparse
import ctypes
import logging
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from config import PATCH, PIXEL_MEAN, PIXEL_STD, ModelConfig
from files import KINDS, NAME, mmproj_file, text_file
from vocabulary import END_OF_TEXT, IM_END, MERGES, SPECIAL, TOKENS
from weights import read

# ChatML as in Qwen2-VL, pictures before the text; libmtmd itself puts <|vision_start|> and <|vision_end|> around a
# picture
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}"
    "{% for part in message['content'] %}{% if part['text'] == '<__media__>' %}<__media__>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' and part['text'] != '<__media__>' %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONTEXT = 4096

Weights = dict[str, np.ndarray]


class Writer:
    """A GGUF file under construction: matrices in f16 or q8_0; norms and biases in f32; patch filters, which are
    convolved, in f16.
    """

    def __init__(self, path: Path, architecture: str, kind: str):
        self.kind = kind
        self.gguf = gguf.GGUFWriter(str(path), architecture)
        self.gguf.add_name(NAME)
        self.gguf.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
        self.gguf.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def matrix(self, name: str, array: np.ndarray) -> None:
        if self.kind == "q8_0":
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(np.ascontiguousarray(array, np.float32), kind)
            self.gguf.add_tensor(name, data, raw_dtype=kind)
        else:
            self.half(name, array)

    def half(self, name: str, array: np.ndarray) -> None:
        self.gguf.add_tensor(name, np.ascontiguousarray(array, np.float16))

    def single(self, name: str, array: np.ndarray) -> None:
        self.gguf.add_tensor(name, np.ascontiguousarray(array, np.float32))

    def linear(self, name: str, weight: np.ndarray, bias: np.ndarray) -> None:
        self.matrix(f"{name}.weight", weight)
        self.single(f"{name}.bias", bias)

    def close(self) -> None:
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


def write_text(path: Path, c: ModelConfig, weights: Weights, kind: str) -> None:
    w = Writer(path, "qwen2vl", kind)
    g = w.gguf
    g.add_context_length(_CONTEXT)
    g.add_embedding_length(c.width)
    g.add_block_count(c.layers)
    g.add_feed_forward_length(c.ff)
    g.add_head_count(c.heads)
    g.add_head_count_kv(c.kv_heads)
    g.add_layer_norm_rms_eps(c.norm_eps)
    g.add_rope_dimension_sections([*c.rope_sections, 0])
    g.add_rope_freq_base(c.rope_base)
    g.add_vocab_size(len(TOKENS))
    g.add_tokenizer_model("gpt2")
    g.add_tokenizer_pre("qwen2")
    g.add_token_list([token.encode() for token in TOKENS])
    g.add_token_merges([" ".join(pair) for pair in MERGES])
    unused = [token.startswith("<|unused_") for token in TOKENS]
    kinds = [
        gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.UNUSED if u else gguf.TokenType.NORMAL
        for t, u in zip(TOKENS, unused)
    ]
    g.add_token_types(kinds)
    g.add_bos_token_id(END_OF_TEXT)
    g.add_eos_token_id(IM_END)
    g.add_pad_token_id(END_OF_TEXT)
    g.add_add_bos_token(False)
    g.add_chat_template(CHAT_TEMPLATE)
    w.matrix("token_embd.weight", weights["embedding.weight"])
    for i in range(c.layers):
        block = _under(weights, f"blocks.{i}.")
        k, v = np.split(block["kv.weight"], 2)
        k_bias, v_bias = np.split(block["kv.bias"], 2)
        gate, up = np.split(block["gate_up.weight"], 2)
        w.single(f"blk.{i}.attn_norm.weight", block["norm1.weight"])
        w.single(f"blk.{i}.ffn_norm.weight", block["norm2.weight"])
        w.linear(f"blk.{i}.attn_q", block["q.weight"], block["q.bias"])
        w.linear(f"blk.{i}.attn_k", k, k_bias)
        w.linear(f"blk.{i}.attn_v", v, v_bias)
        matrices = {
            "attn_output": block["out.weight"],
            "ffn_gate": gate,
            "ffn_up": up,
            "ffn_down": block["down.weight"],
        }
        for name, matrix in matrices.items():
            w.matrix(f"blk.{i}.{name}.weight", matrix)
    w.single("output_norm.weight", weights["norm.weight"])
    w.matrix("output.weight", weights["head.weight"])
    w.close()


def write_mmproj(path: Path, c: ModelConfig, weights: Weights, kind: str) -> None:
    """llama.cpp adds the results of two patch filters, one for each of two video frames; the second is zero here."""
    w = Writer(path, "clip", kind)
    g = w.gguf
    g.add_bool("clip.has_vision_encoder", True)
    g.add_string("clip.projector_type", "qwen2vl_merger")
    g.add_bool("clip.use_gelu", False)  # quick-GELU
    g.add_uint32("clip.vision.image_size", 560)
    g.add_uint32("clip.vision.patch_size", PATCH)
    g.add_uint32("clip.vision.embedding_length", c.v_width)
    g.add_uint32("clip.vision.feed_forward_length", c.v_ff)
    g.add_uint32("clip.vision.block_count", c.v_layers)
    g.add_uint32("clip.vision.attention.head_count", c.v_heads)
    g.add_uint32("clip.vision.projection_dim", c.width)
    g.add_float32("clip.vision.attention.layer_norm_epsilon", c.norm_eps)
    g.add_array("clip.vision.image_mean", list(PIXEL_MEAN))
    g.add_array("clip.vision.image_std", list(PIXEL_STD))
    vision = _under(weights, "vision.")
    filters = vision["patch.weight"].reshape(c.v_width, 3, PATCH, PATCH)
    w.half("v.patch_embd.weight", filters)
    w.half("v.patch_embd.weight.1", np.zeros_like(filters))
    for i in range(c.v_layers):
        block = _under(vision, f"blocks.{i}.")
        for name, weight, bias in zip("qkv", np.split(block["qkv.weight"], 3), np.split(block["qkv.bias"], 3)):
            w.linear(f"v.blk.{i}.attn_{name}", weight, bias)
        for name, own in (("attn_out", "out"), ("ffn_up", "up"), ("ffn_down", "down")):
            w.linear(f"v.blk.{i}.{name}", block[f"{own}.weight"], block[f"{own}.bias"])
        for name, own in (("ln1", "norm1"), ("ln2", "norm2")):
            w.single(f"v.blk.{i}.{name}.weight", block[f"{own}.weight"])
            w.single(f"v.blk.{i}.{name}.bias", block[f"{own}.bias"])
    w.single("v.post_ln.weight", vision["post_norm.weight"])
    w.single("v.post_ln.bias", vision["post_norm.bias"])
    w.linear("mm.0", weights["merge_in.weight"], weights["merge_in.bias"])
    w.linear("mm.2", weights["merge_out.weight"], weights["merge_out.bias"])
    w.close()


def quantize(source: Path, target: Path) -> None:
    """q5_0 by llama.cpp's own quantizer."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_0
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp could not quantize {source}")


def _under(weights: Weights, prefix: str) -> Weights:
    """The weights of a part, by their names in it."""
    return {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}


def export(config: ModelConfig, weights: Weights, out: Path) -> None:
    """weights: float32, by their names in model.py."""
    out.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        write_text(out / text_file(kind), config, weights, kind)
        write_mmproj(out / mmproj_file(kind), config, weights, kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder with part-*.npz")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    config, weights, about = read(args.run)
    export(config, weights, args.out)
    quantize(args.out / text_file("f16"), args.out / text_file("q5_0"))
    print(f"step {about.get('step')}")
    for file in sorted(args.out.glob(f"{NAME}-*.gguf")):
        print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
