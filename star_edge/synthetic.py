"""Random models of any shape, written as GGUF files on the spot.

Weights do not change speed, and a random network still has exact logits: these files stand in for real models in benchmarks
and in tests of exactness. They answer nothing sensible.

Knows the layout of GGUF files of Llama and Qwen2-VL decoders and of CLIP and Qwen2-VL vision encoders; knows nothing of
pruning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import gguf
import numpy as np

Q = gguf.GGMLQuantizationType

# Every image becomes the media marker; the text of one message follows its images, as in LLaVA-1.5's prompts.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER:"
    "{% if message['content'] is string %} {{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% elif message['role'] == 'assistant' %} ASSISTANT: {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a text decoder. `rope_sections` (t, y, x, unused; sums to head size / 2) makes it a Qwen2-VL decoder."""

    n_layers: int
    n_embd: int
    n_heads: int
    n_heads_kv: int
    n_ff: int
    n_vocab: int = 512
    n_ctx: int = 4096
    rope_sections: tuple[int, int, int, int] | None = None
    rope_base: float = 10000.0

    @property
    def arch(self) -> str:
        return "qwen2vl" if self.rope_sections else "llama"


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of a vision encoder. n_layers counts the layers in the file; stock llama.cpp runs one fewer for CLIP (LLaVA)."""

    image_size: int
    patch_size: int
    n_layers: int
    n_embd: int
    n_heads: int
    n_ff: int
    kind: str = "clip"  # or "qwen2vl"


TINYLLAMA_1B = DecoderShape(n_layers=22, n_embd=2048, n_heads=32, n_heads_kv=4, n_ff=5632, n_vocab=32000)
CLIP_L_336 = EncoderShape(image_size=336, patch_size=14, n_layers=24, n_embd=1024, n_heads=16, n_ff=4096)


def write_decoder(path: str | PathLike, shape: DecoderShape, dtype: str = "f32", seed: int = 0, sharpness: float = 1.0) -> None:
    """Writes a random text decoder.

    dtype is "f32", "f16", "q8_0" or "q4_k_m" (llama.cpp's mix of Q4_K and Q6_K, as random blocks). sharpness scales the query
    weights: above 1 the attention is less uniform.
    """
    s = shape
    w = gguf.GGUFWriter(str(path), s.arch)
    w.add_name(f"random {s.arch}")
    w.add_context_length(s.n_ctx)
    w.add_embedding_length(s.n_embd)
    w.add_block_count(s.n_layers)
    w.add_feed_forward_length(s.n_ff)
    w.add_head_count(s.n_heads)
    w.add_head_count_kv(s.n_heads_kv)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(s.rope_base)
    if s.rope_sections:
        w.add_rope_dimension_sections(list(s.rope_sections))
    else:
        w.add_rope_dimension_count(s.n_embd // s.n_heads)
    w.add_vocab_size(s.n_vocab)
    _add_tokenizer(w, s.n_vocab)

    rng = np.random.default_rng(seed)
    matrix = _matrix_writer(w, dtype, rng)
    norm = lambda name, n: w.add_tensor(name, (1 + 0.1 * rng.standard_normal(n)).astype(np.float32))
    kv = s.n_embd // s.n_heads * s.n_heads_kv
    # of deviation 1, like an image token in the tests: this llama.cpp reads no RMS norm epsilon for qwen2vl and uses 0
    matrix("token_embd.weight", s.n_vocab, s.n_embd, gain=s.n_embd**0.5)
    for i in range(s.n_layers):
        b = f"blk.{i}."
        # llama_tensor_get_type's q4_k_m: the first and last eighth of the layers and every third keep more bits in V and down
        more = i < s.n_layers // 8 or i >= 7 * s.n_layers // 8 or (i - s.n_layers // 8) % 3 == 2
        norm(b + "attn_norm.weight", s.n_embd)
        norm(b + "ffn_norm.weight", s.n_embd)
        matrix(b + "attn_q.weight", s.n_embd, s.n_embd, gain=sharpness)
        matrix(b + "attn_k.weight", kv, s.n_embd)
        matrix(b + "attn_v.weight", kv, s.n_embd, more_bits=more)
        if s.rope_sections:
            for name, n in (("attn_q", s.n_embd), ("attn_k", kv), ("attn_v", kv)):
                w.add_tensor(f"{b}{name}.bias", (0.1 * rng.standard_normal(n)).astype(np.float32))
        matrix(b + "attn_output.weight", s.n_embd, s.n_embd)
        matrix(b + "ffn_gate.weight", s.n_ff, s.n_embd)
        matrix(b + "ffn_up.weight", s.n_ff, s.n_embd)
        matrix(b + "ffn_down.weight", s.n_embd, s.n_ff, more_bits=more)
    norm("output_norm.weight", s.n_embd)
    matrix("output.weight", s.n_vocab, s.n_embd, more_bits=True)
    _finish(w)


def write_encoder(path: str | PathLike, shape: EncoderShape, projection_dim: int, dtype: str = "f32", seed: int = 0) -> None:
    """Writes a random vision encoder with its projector (mmproj); projection_dim is the text decoder's embedding width."""
    s, d = shape, shape.n_embd
    w = gguf.GGUFWriter(str(path), "clip")
    w.add_name(f"random {s.kind}")
    w.add_bool("clip.has_vision_encoder", True)
    w.add_string("clip.projector_type", "mlp" if s.kind == "clip" else "qwen2vl_merger")
    p = "clip.vision."
    for key, value in (
        ("image_size", s.image_size),
        ("patch_size", s.patch_size),
        ("embedding_length", d),
        ("feed_forward_length", s.n_ff),
        ("block_count", s.n_layers),
        ("attention.head_count", s.n_heads),
        ("projection_dim", projection_dim),
    ):
        w.add_uint32(p + key, value)
    w.add_float32(p + "attention.layer_norm_epsilon", 1e-5)
    w.add_array(p + "image_mean", [0.48145466, 0.4578275, 0.40821073])
    w.add_array(p + "image_std", [0.26862954, 0.26130258, 0.27577711])

    rng = np.random.default_rng(seed)
    matrix = _matrix_writer(w, dtype, rng)
    vector = lambda name, n, mean=0.0: w.add_tensor(name, (mean + 0.1 * rng.standard_normal(n)).astype(np.float32))
    n_pixels = 3 * s.patch_size**2
    patch = lambda: (rng.standard_normal((d, 3, s.patch_size, s.patch_size)) / np.sqrt(n_pixels)).astype(np.float32)
    if s.kind == "clip":
        w.add_tensor("v.patch_embd.weight", patch().astype(np.float16))
        w.add_tensor("v.class_embd", rng.standard_normal(d).astype(np.float32))
        n_patches = (s.image_size // s.patch_size) ** 2
        w.add_tensor("v.position_embd.weight", (0.5 * rng.standard_normal((n_patches + 1, d))).astype(np.float32))
        vector("v.pre_ln.weight", d, 1.0)
        vector("v.pre_ln.bias", d)
    else:
        w.add_tensor("v.patch_embd.weight", patch())
        w.add_tensor("v.patch_embd.weight.1", patch())
        vector("v.post_ln.weight", d, 1.0)
        vector("v.post_ln.bias", d)
    for i in range(s.n_layers):
        b = f"v.blk.{i}."
        for name, n_out, n_in in (
            ("attn_q", d, d),
            ("attn_k", d, d),
            ("attn_v", d, d),
            ("attn_out", d, d),
            ("ffn_up", s.n_ff, d),
            ("ffn_down", d, s.n_ff),
        ):
            matrix(f"{b}{name}.weight", n_out, n_in)
            vector(f"{b}{name}.bias", n_out)
        for name in ("ln1", "ln2"):
            vector(f"{b}{name}.weight", d, 1.0)
            vector(f"{b}{name}.bias", d)
    n_in = d if s.kind == "clip" else 4 * d
    n_hidden = projection_dim if s.kind == "clip" else n_in
    for name, n_out, n_inner in (("mm.0", n_hidden, n_in), ("mm.2", projection_dim, n_hidden)):
        matrix(f"{name}.weight", n_out, n_inner)
        vector(f"{name}.bias", n_out)
    _finish(w)


def _add_tokenizer(w: gguf.GGUFWriter, n_vocab: int) -> None:
    """A SentencePiece vocabulary of bytes: any text has tokens, and the rest of the vocabulary is unused."""
    if n_vocab < 260:
        raise ValueError(f"a byte vocabulary needs at least 260 tokens, not {n_vocab}")
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [gguf.TokenType.BYTE] * 256
    tokens += [f"<t{i}>" for i in range(len(tokens), n_vocab)]
    kinds += [gguf.TokenType.NORMAL] * (n_vocab - len(kinds))
    w.add_tokenizer_model("llama")
    w.add_token_list([t.encode() for t in tokens])
    w.add_token_scores([0.0] * n_vocab)
    w.add_token_types([int(k) for k in kinds])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(False)
    w.add_chat_template(CHAT_TEMPLATE)


def _matrix_writer(w: gguf.GGUFWriter, dtype: str, rng: np.random.Generator) -> Callable[..., None]:
    """A function that adds one (n_out, n_in) matrix with entries of variance gain^2 / n_in."""
    if dtype not in ("f32", "f16", "q8_0", "q4_k_m"):
        raise ValueError(f"unknown dtype {dtype!r}: use f32, f16, q8_0 or q4_k_m")

    def matrix(name: str, n_out: int, n_in: int, gain: float = 1.0, more_bits: bool = False) -> None:
        std = gain / np.sqrt(n_in)
        if dtype == "q4_k_m":
            if n_in % 256:
                raise ValueError(f"{name}: Q4_K needs rows of a multiple of 256 values, not {n_in}")
            kind = Q.Q6_K if more_bits else Q.Q4_K
            w.add_tensor(name, _random_blocks(rng, kind, n_out, n_in, std), raw_dtype=kind)
            return
        values = (std * rng.standard_normal((n_out, n_in), dtype=np.float32)).astype(np.float32)
        if dtype == "f16":
            w.add_tensor(name, values.astype(np.float16))
        elif dtype == "q8_0":
            w.add_tensor(name, gguf.quants.quantize(values, Q.Q8_0), raw_dtype=Q.Q8_0)
        else:
            w.add_tensor(name, values)

    return matrix


def _random_blocks(rng: np.random.Generator, kind: Any, n_out: int, n_in: int, std: float) -> np.ndarray:
    """Random Q4_K or Q6_K blocks, (n_out, bytes of a row) uint8: random bits, and block scales for the wanted deviation."""
    n_blocks = n_out * (n_in // 256)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, (n_blocks, size), dtype=np.uint8)
    if kind == Q.Q4_K:
        # value = d * scale * q - dmin * min, with 6-bit scale and min and 4-bit q: mean 0 at dmin = 7.5 d, deviation 257 d
        blocks[:, 0:2] = np.full(n_blocks, std / 257, np.float16).view(np.uint8).reshape(-1, 2)
        blocks[:, 2:4] = np.full(n_blocks, 7.5 * std / 257, np.float16).view(np.uint8).reshape(-1, 2)
    else:
        # value = d * scale * q, with an 8-bit signed scale and a 6-bit signed q: deviation 1366 d
        blocks[:, 208:210] = np.full(n_blocks, std / 1366, np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(n_out, -1)


def _finish(w: gguf.GGUFWriter) -> None:
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
