"""Random models of any shape, written as GGUF files on the spot.

Weights do not change speed, and a random network still has exact logits: these files stand in for real models in
benchmarks and in tests of exactness. They answer nothing sensible.
"""

from .decoders import write_decoder
from .encoders import write_encoder
from .pictures import DEFAULT_PICTURE, PICTURE_TITLES, PICTURES
from .shapes import CLIP_L_336, SHAPES, TINYLLAMA_1B, DecoderShape, DeltaNetShape, EncoderShape, ModelShape
from .store import model_files

__all__ = [
    "CLIP_L_336",
    "DEFAULT_PICTURE",
    "PICTURES",
    "PICTURE_TITLES",
    "SHAPES",
    "TINYLLAMA_1B",
    "DecoderShape",
    "DeltaNetShape",
    "EncoderShape",
    "ModelShape",
    "model_files",
    "write_decoder",
    "write_encoder",
]
