"""The reference model's vocabulary and its word tokenizer.

The GGUF file declares a SentencePiece (SPM) vocabulary, which llama.cpp tokenizes by merging neighbours bottom-up. A
word therefore only becomes one token if each of its prefixes is a token as well; the prefixes are in the vocabulary for
that reason alone and no
training example contains one. Python needs no merging: it looks whole words up.
"""

from __future__ import annotations

COLORS = {
    "red": (225, 35, 35),
    "green": (30, 190, 50),
    "blue": (45, 70, 235),
    "yellow": (240, 225, 40),
    "cyan": (40, 215, 225),
    "purple": (165, 50, 205),
    "orange": (250, 140, 20),
}
COLOR_NAMES = list(COLORS)
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "ring": "rings",
    "heart": "hearts",
}
SHAPES = list(PLURALS)
DIGITS = [str(i) for i in range(10)]
PLATE = "plate"

_PROMPT_WORDS = (
    "USER: ASSISTANT: is there a what color is the digit number shown how many where yes no top bottom left right"
).split()
WORDS = list(dict.fromkeys(_PROMPT_WORDS)) + COLOR_NAMES + SHAPES + list(PLURALS.values()) + DIGITS

UNKNOWN, BOS, EOS = 0, 1, 2
_SPACE = "\u2581"  # SentencePiece's mark for a space

# enum llama_token_type
_NORMAL, _UNKNOWN_TYPE, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6
_ROUND_TO = 64


def _build() -> tuple[list[str], list[int], list[float]]:
    """Tokens, their llama.cpp types and their merge scores."""
    tokens, types = ["<unk>", "<s>", "</s>"], [_UNKNOWN_TYPE, _CONTROL, _CONTROL]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [_BYTE] * 256
    words = [_SPACE + word for word in WORDS]
    prefixes = [word[:n] for word in words for n in range(2, len(word))]
    normal = [*words, "?", _SPACE, *(p for p in dict.fromkeys(prefixes) if p not in set(words))]
    tokens += normal
    types += [_NORMAL] * len(normal)
    while len(tokens) % _ROUND_TO:
        tokens.append(f"<pad{len(tokens)}>")
        types.append(_UNUSED)
    # Shorter merges come first, so that every word grows letter by letter from its space mark. The bare mark never
    # wins.
    scores = [-float(len(t)) if kind == _NORMAL else 0.0 for t, kind in zip(tokens, types)]
    scores[tokens.index("?")] = 0.0
    scores[tokens.index(_SPACE)] = -1000.0
    return tokens, types, scores


TOKENS, TOKEN_TYPES, TOKEN_SCORES = _build()
_INDEX = {token: i for i, token in enumerate(TOKENS)}


def encode(text: str) -> list[int]:
    """Token ids of space-separated words; a question mark may end a word. Unknown words raise KeyError."""
    ids = []
    for word in text.split(" "):
        ids.append(_INDEX[_SPACE + word.removesuffix("?")])
        if word.endswith("?"):
            ids.append(_INDEX["?"])
    return ids


def decode(ids: list[int]) -> str:
    """Text of token ids, without the special ones. Byte tokens count too: an untrained model gives them."""
    pieces = []
    for i in ids:
        if TOKEN_TYPES[i] == _NORMAL:
            pieces.append(TOKENS[i].replace(_SPACE, " ").encode())
        elif TOKEN_TYPES[i] == _BYTE:
            pieces.append(bytes([int(TOKENS[i][3:5], 16)]))
    return b"".join(pieces).decode("utf-8", "ignore").strip()


def encode_question(question: str) -> list[int]:
    """What follows the image in the prompt."""
    return encode(f"{question} ASSISTANT:")


PREFIX = [BOS, *encode("USER:")]  # what precedes the image
