"""Words that pictures show and questions use, and the byte-level BPE tokenizer of the exported file ("gpt2" with
Qwen2's pre-tokenizer).

Grammar is lower case, what a picture shows is upper case. A word after a space is one token (a chain of merges that
starts at the space), the same word without a space is spelled letter by letter: so questions are short, and answers are
read off letter by letter.
"""

from __future__ import annotations

import itertools
import re
from functools import lru_cache

LEXICON = """
    ACID ACORN AGENT ALBUM AMBER ANGLE ANKLE APPLE APRON ARENA ATLAS AWARD BACON BADGE BAKER BASIL BATCH BEACH BEAN
    BEEF BELL BENCH BERRY BIRD BLADE BLOCK BOAT BONE BOOK BOOT BOWL BRAIN BREAD BRICK BRUSH CABIN CABLE CAKE CAMEL
    CANAL CANDY CARD CARGO CEDAR CHAIN CHALK CHESS CHINA CIDER CITY CLAY CLOCK CLOTH CLOUD COACH COAL COAT COCOA
    COIN CORAL CORN COTTON CRANE CREAM CROWN DAIRY DANCE DEPOT DESK DINER DOLL DOOR DRAFT DRUM DUCK EAGLE EARTH
    ELBOW ENGINE FABRIC FARM FENCE FERRY FIBER FILM FLAG FLASH FLOUR FOREST FRAME FROST FRUIT FUEL GATE GHOST GIANT
    GLASS GLOVE GOAT GRAIN GRAPE GUARD GUEST HAMMER HARBOR HONEY HORSE HOTEL INDEX IRON ISLAND IVORY JACKET JELLY
    JEWEL JUDGE JUICE KETTLE KNIFE LABEL LADDER LAMP LASER LEMON LIGHT LINEN LIVER LOCK LOTUS MAPLE MARKET METAL
    MILK MIRROR MONEY MOTOR MOUSE MUSIC NIGHT NURSE OCEAN OLIVE ONION ORDER OTTER PAINT PANEL PAPER PARK PEACH PEARL
    PENCIL PEPPER PIANO PILOT PLATE POET POWER PRICE PRINT QUEEN QUILT RADIO RANCH RICE RIVER ROBOT ROPE ROSE SALAD
    SALT SAUCE SCALE SCHOOL SHEEP SHIRT SILK SILVER SMOKE SOAP SPOON STAMP STEAM STONE SUGAR SWORD TABLE TAX TEMPLE
    THREAD TIGER TOAST TOTAL TOWER TRAIN TULIP TUNA UNCLE VALLEY VALVE VIOLIN WAGON WATER WHEAT WINTER WOOD ZEBRA
""".split()
COLORS = ("RED", "GREEN", "BLUE", "GOLD", "PINK", "CYAN", "BROWN", "GRAY")
SHAPES = ("DISK", "BOX", "STAR", "CROSS", "RING", "ARROW", "HEART", "MOON")
_GRAMMAR = (
    "what",
    "which",
    "how",
    "is",
    "the",
    "of",
    "at",
    "in",
    "line",
    "follows",
    "starts",
    "much",
    "many",
    "high",
    "color",
    "shape",
    "number",
)
_GRAMMAR += ("bar", "button", "field", "highest", "item")
_SPELLED_WITHOUT_SPACE = ("user", "assistant", "what", "which", "how")

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


def _byte_characters() -> list[str]:
    """GPT-2's printable character for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


_BYTES = _byte_characters()
_SPACE = _BYTES[32]


def _chains() -> tuple[list[tuple[str, str]], list[str]]:
    """Merges, the chains that start at a space first (so that nothing inside a word merges before them), and the tokens
    they make.
    """
    merges: dict[tuple[str, str], None] = {}
    spaced = [_SPACE + word for word in (*_GRAMMAR, *LEXICON, *COLORS, *SHAPES)]
    for word in (*spaced, *_SPELLED_WITHOUT_SPACE):
        for end in range(1, len(word)):
            merges[(word[:end], word[end])] = None
    return list(merges), ["".join(pair) for pair in merges]


MERGES, _MERGED = _chains()
TOKENS = [*_BYTES, *_MERGED, *SPECIAL]
TOKENS += [f"<|unused_{i}|>" for i in range(-len(TOKENS) % 64)]
assert len(set(TOKENS)) == len(TOKENS)
_ID = {token: i for i, token in enumerate(TOKENS)}
_RANK = {pair: i for i, pair in enumerate(MERGES)}
IM_START, IM_END, VISION_START, VISION_END = (
    _ID[t] for t in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
)
END_OF_TEXT = _ID["<|endoftext|>"]
N_SPECIAL_FROM = _ID[SPECIAL[0]]

# Qwen2's pre-tokenizer, for ASCII
_PIECES = re.compile(r"'[sS]|'[tT]|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


@lru_cache(maxsize=20000)
def _bpe(piece: str) -> tuple[int, ...]:
    parts = [_BYTES[b] for b in piece.encode()]
    while len(parts) > 1:
        ranks = [_RANK.get(pair, len(_RANK)) for pair in itertools.pairwise(parts)]
        best = min(ranks)
        if best == len(_RANK):
            break
        i = ranks.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(_ID[part] for part in parts)


def encode(text: str) -> list[int]:
    """Token ids of ASCII text without special tokens."""
    return [i for piece in _PIECES.findall(text) for i in _bpe(piece)]


def decode(ids: list[int]) -> str:
    """Text of ids; special tokens give nothing."""
    joined = "".join(TOKENS[i] for i in ids if i < N_SPECIAL_FROM)
    return bytes(_BYTES.index(c) for c in joined).decode(errors="replace")


# <|im_start|>user\n<|vision_start|> IMAGE <|vision_end|>QUESTION<|im_end|>\n<|im_start|>assistant\nANSWER<|im_end|>
PREFIX = [IM_START, *encode("user\n"), VISION_START]
_SUFFIX = [IM_END, *encode("\n"), IM_START, *encode("assistant\n")]


@lru_cache(maxsize=20000)
def encode_prompt(question: str) -> tuple[int, ...]:
    """Everything between the image and the answer."""
    return (VISION_END, *encode(question), *_SUFFIX)


# Symbols of text cells: index 0 is an empty cell
SYMBOLS = " ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.:-$"
SYMBOL_ID = {s: i for i, s in enumerate(SYMBOLS)}
CODE_SYMBOLS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # none that look alike

# What a patch can be labelled with in training: a word, colour, shape or two-digit number; 0 is none
TERMS = ["", *LEXICON, *COLORS, *SHAPES, *(f"{n:02d}" for n in range(100))]
TERM_ID = {t: i for i, t in enumerate(TERMS)}
MAX_ANSWER = 6  # letters of the longest answer
