"""Random text decoders that are not plain ones: with a sliding window, with ALiBi, and recurrent."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from star_edge.synthetic import DecoderShape
from star_edge.synthetic.vocabulary import add_tokenizer


def write_sliding(path: Path, shape: DecoderShape, window: int) -> None:
    """Command R7B's graph (cohere2): three layers of four see `window` tokens back, attention and FFN are side by
    side.
    """
    s, rng = shape, np.random.default_rng(0)
    w = _start(path, "cohere2", s)
    w.add_feed_forward_length(s.n_ff)
    w.add_head_count(s.n_heads)
    w.add_head_count_kv(s.n_heads_kv)
    w.add_layer_norm_eps(1e-5)
    w.add_rope_dimension_count(s.n_embd // s.n_heads)
    w.add_sliding_window(window)
    w.add_logit_scale(1.0)
    kv = s.n_embd // s.n_heads * s.n_heads_kv
    matrices = {
        "attn_q": (s.n_embd,) * 2,
        "attn_k": (kv, s.n_embd),
        "attn_v": (kv, s.n_embd),
        "attn_output": (s.n_embd,) * 2,
    }
    matrices |= {"ffn_gate": (s.n_ff, s.n_embd), "ffn_up": (s.n_ff, s.n_embd), "ffn_down": (s.n_embd, s.n_ff)}
    for i in range(s.n_layers):
        w.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(s.n_embd, np.float32))
        for name, (n, m) in matrices.items():
            w.add_tensor(f"blk.{i}.{name}.weight", (rng.standard_normal((n, m)) / m**0.5).astype(np.float32))
    _end(w, s, rng)


def write_alibi(path: Path, shape: DecoderShape) -> None:
    """Refact's graph: no RoPE, and a mask of distances."""
    s, rng = shape, np.random.default_rng(0)
    w = _start(path, "refact", s)
    w.add_feed_forward_length(s.n_ff)
    w.add_head_count(s.n_heads)
    w.add_layer_norm_rms_eps(1e-5)
    matrices = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (s.n_embd,) * 2)
    matrices |= {"ffn_gate": (s.n_ff, s.n_embd), "ffn_up": (s.n_ff, s.n_embd), "ffn_down": (s.n_embd, s.n_ff)}
    for i in range(s.n_layers):
        for name in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{i}.{name}.weight", np.ones(s.n_embd, np.float32))
        for name, (n, m) in matrices.items():
            w.add_tensor(f"blk.{i}.{name}.weight", (rng.standard_normal((n, m)) / m**0.5).astype(np.float32))
    _end(w, s, rng)


def write_recurrent(path: Path, shape: DecoderShape) -> None:
    """Mamba: a state for each layer instead of a cache."""
    s, rng = shape, np.random.default_rng(0)
    inner, state, kernel, rank = 2 * s.n_embd, 8, 4, 16
    w = _start(path, "mamba", s)
    w.add_feed_forward_length(0)
    w.add_head_count(0)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_ssm_conv_kernel(kernel)
    w.add_ssm_inner_size(inner)
    w.add_ssm_state_size(state)
    w.add_ssm_time_step_rank(rank)
    matrices = {"ssm_in": (2 * inner, s.n_embd), "ssm_conv1d": (inner, kernel), "ssm_x": (rank + 2 * state, inner)}
    matrices |= {"ssm_dt": (inner, rank), "ssm_out": (s.n_embd, inner)}
    for i in range(s.n_layers):
        w.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(s.n_embd, np.float32))
        for name, (n, m) in matrices.items():
            w.add_tensor(f"blk.{i}.{name}.weight", (rng.standard_normal((n, m)) / m**0.5).astype(np.float32))
        w.add_tensor(f"blk.{i}.ssm_conv1d.bias", np.zeros(inner, np.float32))
        w.add_tensor(f"blk.{i}.ssm_dt.bias", np.zeros(inner, np.float32))
        w.add_tensor(f"blk.{i}.ssm_a", -np.tile(np.arange(1, state + 1, dtype=np.float32), (inner, 1)))
        w.add_tensor(f"blk.{i}.ssm_d", np.ones(inner, np.float32))
    _end(w, s, rng)


def _start(path: Path, arch: str, shape: DecoderShape) -> gguf.GGUFWriter:
    w = gguf.GGUFWriter(str(path), arch)
    w.add_context_length(shape.n_ctx)
    w.add_embedding_length(shape.n_embd)
    w.add_block_count(shape.n_layers)
    w.add_vocab_size(shape.n_vocab)
    add_tokenizer(w, shape.n_vocab)
    return w


def _end(w: gguf.GGUFWriter, shape: DecoderShape, rng: np.random.Generator) -> None:
    w.add_tensor("token_embd.weight", rng.standard_normal((shape.n_vocab, shape.n_embd)).astype(np.float32))
    w.add_tensor("output_norm.weight", np.ones(shape.n_embd, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
