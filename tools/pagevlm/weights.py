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


def load(folder: Path) -> tuple[PageVLM, dict]:
    """The model in torch, and what was said about it."""
    import torch
    from model import PageVLM

    config, arrays, about = read(folder)
    model = PageVLM(config)
    model.load_state_dict({name: torch.from_numpy(a) for name, a in arrays.items()})
    return model, about


def load_encoder(model: PageVLM, folder: Path) -> None:
    """The encoder and its head of another run into `model`; the rest stays."""
    import torch

    _, arrays, _ = read(folder)
    own = {name: torch.from_numpy(a) for name, a in arrays.items() if name.startswith(("vision.", "patch_head."))}
    missing = [name for name in model.state_dict() if name.startswith(("vision.", "patch_head.")) and name not in own]
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}")
    model.load_state_dict(own, strict=False)
