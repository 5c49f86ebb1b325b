"""The reference model: a small LLaVA-type vision-language model that ships with the package.

5.8 million parameters, trained from scratch for this project on rendered scenes of coloured shapes, digits and number
plates (168 x 168 pixels, 144 image tokens, 6 decoder layers). It answers six families of questions and nothing
else:

    is there a COLOR SHAPE?    what color is the DIGIT|SHAPE?    what digit is COLOR?
    what number is shown?      how many SHAPES?                  where is the DIGIT|SHAPE?

It was trained in the token layout that stock llama.cpp computes for CLIP encoders (CLS last, image token j is encoder
row j + 1), so it is right as it is on stock.
"""

from __future__ import annotations

import json
from pathlib import Path

_FOLDER = Path(__file__).parent
TEXT_MODEL = _FOLDER / "refvlm-text-q8_0.gguf"
MMPROJ = _FOLDER / "refvlm-mmproj-f16.gguf"
DEMO_IMAGE = _FOLDER / "demo.png"


def demo_questions() -> list[dict[str, str]]:
    """Questions about DEMO_IMAGE: dicts of question, answer (the truth) and family."""
    lines = (_FOLDER / "demo.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
