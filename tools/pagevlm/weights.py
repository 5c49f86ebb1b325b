"""Weights as float16 .npz parts of at most 15 MiB: small enough to be copied off a lent machine, and free of
pickles.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from config import ModelConfig

if TYPE_CHECKING:  # files are read without torch
    from model import PageVLM

_PART_BYTES = 15 * 2**20
_OF_ENCODER = ("vision.", "patch_heads.")
_OF_TRAINING = ("patch_heads.", "term_maps.", "numbers.")


def save(model: PageVLM, folder: Path, about: dict) -> None:
    """Writes part-0.npz, part-1.npz, ... over those of an earlier call, each in one piece."""
    parts: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in model.state_dict().items():
        array = tensor.detach().float().cpu().numpy().astype(np.float16)
        if size + array.nbytes > _PART_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = array
        size += array.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    header = np.array(json.dumps({**about, "config": asdict(model.c), "parts": len(parts)}))
    for i, part in enumerate(parts):
        partial = folder / f"part-{i}.partial"
        with open(partial, "wb") as file:
            np.savez(file, about=header, **part)
        os.replace(partial, folder / f"part-{i}.npz")


def read(folder: Path) -> tuple[ModelConfig, dict[str, np.ndarray], dict]:
    """Sizes, weights in float32 and what was said about them. Raises ValueError where parts are missing or of different
    saves.
    """
    files = sorted(folder.glob("part-*.npz"))
    if not files:
        raise ValueError(f"{folder} holds no part-*.npz")
    arrays: dict[str, np.ndarray] = {}
    headers = set()
    for file in files:
        with np.load(file) as part:
            headers.add(str(part["about"]))
            arrays |= {name: part[name].astype(np.float32) for name in part.files if name != "about"}
    if len(headers) > 1:
        raise ValueError(f"the parts in {folder} were saved at different steps")
    about = json.loads(headers.pop())
    if about["parts"] != len(files):
        raise ValueError(f"{folder} holds {len(files)} of {about['parts']} parts")
    config = ModelConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in about["config"].items()})
    return config, arrays, about


def read_gguf(folder: Path) -> dict[str, np.ndarray]:
    """Weights in float32 of the files that export.py wrote (or of what was quantized from them): all but those that
    exist for training only.
    """
    import gguf

    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.gguf")):
        for t in gguf.GGUFReader(file).tensors:
            tensors[t.name] = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
    out: dict[str, np.ndarray] = {}

    def take(name: str, *sources: str) -> None:
        for part in ("weight", "bias"):
            own = [tensors[f"{source}.{part}"] for source in sources if f"{source}.{part}" in tensors]
            if own:
                out[f"{name}.{part}"] = np.concatenate(own)

    for i in range(sum(name.endswith("ffn_gate.weight") for name in tensors)):
        block = f"blk.{i}."
        for name, own in (
            ("q", ["attn_q"]),
            ("kv", ["attn_k", "attn_v"]),
            ("out", ["attn_output"]),
            ("gate_up", ["ffn_gate", "ffn_up"]),
            ("down", ["ffn_down"]),
            ("norm1", ["attn_norm"]),
            ("norm2", ["ffn_norm"]),
        ):
            take(f"blocks.{i}.{name}", *(block + source for source in own))
    for i in range(sum(name.startswith("v.blk") and name.endswith("ffn_up.weight") for name in tensors)):
        block = f"v.blk.{i}."
        for name, own in (
            ("qkv", ["attn_q", "attn_k", "attn_v"]),
            ("out", ["attn_out"]),
            ("up", ["ffn_up"]),
            ("down", ["ffn_down"]),
            ("norm1", ["ln1"]),
            ("norm2", ["ln2"]),
        ):
            take(f"vision.blocks.{i}.{name}", *(block + source for source in own))
    filters = tensors["v.patch_embd.weight"]
    out["vision.patch.weight"] = filters.reshape(len(filters), -1)
    for name, own in (
        ("vision.post_norm", "v.post_ln"),
        ("merge_in", "mm.0"),
        ("merge_out", "mm.2"),
        ("embedding", "token_embd"),
        ("norm", "output_norm"),
        ("head", "output"),
    ):
        take(name, own)
    return out


def load(folder: Path) -> tuple[PageVLM, dict]:
    """The model in torch, and what was said about it. A folder of GGUF files has no weights of what exists for training
    only: these are new, and `about` says so ("new_heads").
    """
    import torch
    from model import PageVLM

    if not any(folder.glob("part-*.npz")):
        model = PageVLM(ModelConfig())
        arrays = read_gguf(folder)
        lacking = model.load_state_dict({name: torch.from_numpy(a) for name, a in arrays.items()}, strict=False)
        strange = [*lacking.unexpected_keys, *(n for n in lacking.missing_keys if not n.startswith(_OF_TRAINING))]
        if strange:
            raise ValueError(f"{folder} does not hold the page model's weights: {strange[0]}")
        return model, {"new_heads": True}
    config, arrays, about = read(folder)
    model = PageVLM(config)
    model.load_state_dict({name: torch.from_numpy(a) for name, a in arrays.items()})
    return model, about


def load_encoder(model: PageVLM, folder: Path) -> None:
    """The encoder and its head of another run into `model`; the rest stays."""
    import torch

    _, arrays, _ = read(folder)
    own = {name: torch.from_numpy(a) for name, a in arrays.items() if name.startswith(_OF_ENCODER)}
    missing = [name for name in model.state_dict() if name.startswith(_OF_ENCODER) and name not in own]
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}")
    model.load_state_dict(own, strict=False)
