"""The synthetic shapes at a tiny size: the same graphs, in a second."""

from dataclasses import replace

from star_edge.synthetic import SHAPES, DecoderShape, DeltaNetShape, ModelShape

_ENCODERS = {
    "llava-1.1b": {"image_size": 98},
    "llava-1.5-7b": {"image_size": 98},
    "llava-next-7b": {"image_size": 98, "pinpoints": ((98, 196), (196, 98), (196, 196))},
    "smolvlm-500m": {"image_size": 128, "longest_edge": 256},
    "qwen2-vl-2b": {},
    "qwen2.5-vl-3b": {"n_layers": 4, "full_attention_every": 2},
    "qwen3-vl-4b": {"image_size": 128, "n_layers": 4, "deepstack": (0, 2)},
    "qwen3.5-4b": {"image_size": 128},
    "qwen3.5-0.8b": {"image_size": 128},
    "gemma-3-4b": {"image_size": 112},
}
_HYBRID = {
    "rope_sections": (3, 3, 2, 0),
    "rope_size": 16,
    "tied": True,
    "attention_layers": (2, 4),
    "delta_net": DeltaNetShape(n_heads_k=2, n_heads_v=4, d_head=64),
}
_DECODERS = {
    "smolvlm-500m": {"tied": True},
    "qwen2-vl-2b": {"rope_sections": (4, 6, 6, 0), "tied": True},
    "qwen2.5-vl-3b": {"rope_sections": (4, 6, 6, 0), "tied": True},
    "qwen3-vl-4b": {"rope_sections": (6, 5, 5, 0), "n_deepstack": 2, "head_size": 32, "tied": True},
    "qwen3.5-4b": _HYBRID,
    "qwen3.5-0.8b": _HYBRID,
    "gemma-3-4b": {"sliding_window": 512, "head_size": 64, "tied": True},
}
# Picture, and the image tokens that the encoder makes of it by hand: (98 / 14)^2; an overview and 2 x 2 crops of that;
# an overview and 2 x 2 tiles of (128 / 16 / 4)^2; (168 / 28)^2; (192 / 32)^2; (112 / 14 / 4)^2
_REQUESTS = {
    "llava-1.1b": ((98, 98), 49),
    "llava-1.5-7b": ((98, 98), 49),
    "llava-next-7b": ((196, 196), 5 * 49),
    "smolvlm-500m": ((200, 200), 5 * 4),
    "qwen2-vl-2b": ((168, 168), 36),
    "qwen2.5-vl-3b": ((168, 168), 36),
    "qwen3-vl-4b": ((192, 192), 36),
    "qwen3.5-4b": ((192, 192), 36),
    "qwen3.5-0.8b": ((192, 192), 36),
    "gemma-3-4b": ((112, 112), 4),
}


def tiny(name: str) -> ModelShape:
    shape = SHAPES[name]
    encoder = replace(shape.encoder, **{"n_layers": 2, "n_embd": 64, "n_heads": 4, "n_ff": 96} | _ENCODERS[name])
    decoder = DecoderShape(n_layers=6, n_embd=256, n_heads=8, n_heads_kv=4, n_ff=256, **_DECODERS.get(name, {}))
    return ModelShape(decoder, encoder, shape.dtype, *_REQUESTS[name], shape.about)
