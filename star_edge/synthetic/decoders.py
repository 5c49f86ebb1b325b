"""GGUF files of random text decoders: Llama, Qwen2-VL (and 2.5), Qwen3-VL, Qwen3.5, LFM2, Gemma 3. Tensor names are
llama.cpp's (src/llama-arch.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import numpy as np

from .shapes import DecoderShape
from .vocabulary import add_tokenizer
from .weights import TensorFile


def write_decoder(
    path: str | PathLike[str],
    shape: DecoderShape,
    dtype: str = "f32",
    seed: int = 0,
    sharpness: float = 1.0,
    special: Sequence[str] = (),
) -> None:
    """Writes a random text decoder.

    Args:
        path: The file.
        shape: Sizes of the decoder.
        dtype: "f32", "f16", "q8_0" or "q4_k_m" (llama.cpp's mix of Q4_K and Q6_K, as random blocks).
        seed: Seed of the weights.
        sharpness: Factor of the queries. Above 1 the attention is less uniform.
        special: Tokens of the vocabulary besides bytes, see vocabulary.special_tokens.

    Raises:
        ValueError: The dtype is unknown or cannot hold the rows, or the vocabulary is too small.
    """
    s = shape
    file = TensorFile(path, s.arch, dtype, np.random.default_rng(seed))
    w = file.gguf
    w.add_context_length(s.n_ctx)
    w.add_embedding_length(s.n_embd)
    w.add_block_count(s.n_layers)
    w.add_feed_forward_length(s.n_ff)
    w.add_head_count(s.n_heads)
    if s.kernel:  # LFM2 says so which layers have attention
        w.add_head_count_kv([s.n_heads_kv if i in s.attention_layers else 0 for i in range(s.n_layers)])
    else:
        w.add_head_count_kv(s.n_heads_kv)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(s.rope_base)
    if s.rope_sections:
        w.add_rope_dimension_sections(list(s.rope_sections))
    if s.arch == "llama":
        w.add_rope_dimension_count(s.d_head)
    if s.head_size:
        w.add_key_length(s.head_size)
        w.add_value_length(s.head_size)
    if s.sliding_window:
        w.add_sliding_window(s.sliding_window)
    if s.rope_size:
        w.add_rope_dimension_count(s.rope_size)
    if s.delta_net:
        w.add_ssm_conv_kernel(s.delta_net.kernel)
        w.add_ssm_state_size(s.delta_net.d_head)
        w.add_ssm_group_count(s.delta_net.n_heads_k)
        w.add_ssm_time_step_rank(s.delta_net.n_heads_v)
        w.add_ssm_inner_size(s.delta_net.n_heads_v * s.delta_net.d_head)
        w.add_array(f"{s.arch}.attention.recurrent_layers", [i not in s.attention_layers for i in range(s.n_layers)])
    if s.n_deepstack:
        w.add_uint32(f"{s.arch}.n_deepstack_layers", s.n_deepstack)
    if s.kernel:
        w.add_uint32(f"{s.arch}.shortconv.l_cache", s.kernel)
    w.add_vocab_size(s.n_vocab)
    add_tokenizer(w, s.n_vocab, special)

    is_gemma = s.arch == "gemma3"

    def norm(name: str, n: int, mean: float = 1.0) -> None:
        file.normal(name, n, mean=mean)

    q, kv = s.d_head * s.n_heads, s.d_head * s.n_heads_kv
    # Rows of deviation 1, like an image token in the tests: this llama.cpp reads no RMS norm epsilon for qwen2vl and
    # uses 0. Gemma's graph multiplies the rows of tokens by the root of n_embd itself.
    file.matrix("token_embd.weight", s.n_vocab, s.n_embd, gain=1.0 if is_gemma else s.n_embd**0.5, more_bits=s.tied)
    for i in range(s.n_layers):
        b = f"blk.{i}."
        # llama_tensor_get_type's q4_k_m: the first and last eighth of the layers and every third keep more bits in V
        # and down
        more = i < s.n_layers // 8 or i >= 7 * s.n_layers // 8 or (i - s.n_layers // 8) % 3 == 2
        norm(b + "attn_norm.weight", s.n_embd)
        norm(b + ("post_attention_norm.weight" if s.delta_net else "ffn_norm.weight"), s.n_embd)
        if is_gemma:
            norm(b + "post_attention_norm.weight", s.n_embd)
            norm(b + "post_ffw_norm.weight", s.n_embd)
            norm(b + "attn_q_norm.weight", s.d_head, sharpness)  # queries are normalised, whatever their matrix
            norm(b + "attn_k_norm.weight", s.d_head)
        if s.attention_layers and i not in s.attention_layers:
            _add_recurrent(file, s, b)
        else:
            if s.attention_layers or s.n_deepstack:
                norm(b + "attn_q_norm.weight", s.d_head, sharpness)
                norm(b + "attn_k_norm.weight", s.d_head)
            # Qwen3.5 has an output gate beside each query
            file.matrix(b + "attn_q.weight", 2 * q if s.delta_net else q, s.n_embd, gain=sharpness)
            file.matrix(b + "attn_k.weight", kv, s.n_embd)
            file.matrix(b + "attn_v.weight", kv, s.n_embd, more_bits=more)
            if s.arch == "qwen2vl":
                for name, n in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
                    file.normal(f"{b}{name}.bias", n)
            file.matrix(b + "attn_output.weight", s.n_embd, q)
        file.matrix(b + "ffn_gate.weight", s.n_ff, s.n_embd)
        file.matrix(b + "ffn_up.weight", s.n_ff, s.n_embd)
        file.matrix(b + "ffn_down.weight", s.n_embd, s.n_ff, more_bits=more)
    norm("token_embd_norm.weight" if s.kernel else "output_norm.weight", s.n_embd)
    if not s.tied:
        file.matrix("output.weight", s.n_vocab, s.n_embd, more_bits=True)
    file.finish()


def _add_recurrent(file: TensorFile, s: DecoderShape, block: str) -> None:
    """A gated delta net, or LFM2's convolution between two gates."""
    if s.delta_net is None:
        file.matrix(block + "shortconv.in_proj.weight", 3 * s.n_embd, s.n_embd)
        file.normal(block + "shortconv.conv.weight", s.n_embd, s.kernel, std=s.kernel**-0.5)
        file.matrix(block + "shortconv.out_proj.weight", s.n_embd, s.n_embd)
        return
    n = s.delta_net
    d_key, d_value = n.n_heads_k * n.d_head, n.n_heads_v * n.d_head
    file.matrix(block + "attn_qkv.weight", 2 * d_key + d_value, s.n_embd)
    file.matrix(block + "attn_gate.weight", d_value, s.n_embd)
    file.normal(block + "ssm_conv1d.weight", 2 * d_key + d_value, n.kernel, std=n.kernel**-0.5)
    file.normal(block + "ssm_dt.bias", n.n_heads_v, std=0.7)
    file.normal(block + "ssm_a", n.n_heads_v, mean=-1.0, std=0.2)  # -exp of what is learned
    file.matrix(block + "ssm_beta.weight", n.n_heads_v, s.n_embd)
    file.matrix(block + "ssm_alpha.weight", n.n_heads_v, s.n_embd)
    file.normal(block + "ssm_norm.weight", n.d_head, mean=1.0)
    file.matrix(block + "ssm_out.weight", s.n_embd, d_value)
