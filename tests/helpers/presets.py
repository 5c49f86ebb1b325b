"""What a preset keeps of an image of the shipped model: 144 tokens, 6 decoder layers."""

from dataclasses import dataclass

from star_edge import PRESETS
from star_edge.pruning.config import keep_count
from star_edge.pruning.selection import average_tokens


@dataclass
class Kept:
    vision: int
    decoder: int
    average: float


def kept(name: str) -> Kept:
    config = PRESETS[name]
    vision = keep_count("vision_keep", config.vision_keep, 144)
    windows = (
        [(layer, keep_count("decoder_keep", keep, 144)) for layer, keep in config.decoder_windows(6)]
        if config.prunes_in_decoder
        else []
    )
    return Kept(vision, windows[-1][1] if windows else vision, average_tokens(vision, windows, 6))
