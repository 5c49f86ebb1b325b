"""Seeded pictures as grids of cells: what stands in each cell, what each patch shows, and what can be asked.

A cell is 7 x 14 pixels, a patch two cells, an image token 2 x 2 patches: 4 columns and 2 rows of cells. Text starts at
even columns, so that a patch belongs to one word at most. Pixels are made from cells in render.py.

Picture i of a split depends on (split, seed, i, family, grid) alone. Six families: page, table, receipt, chart, screen,
scene.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
from vocabulary import CODE_SYMBOLS, COLORS, LEXICON, SHAPES, SYMBOL_ID, SYMBOLS, TERM_ID

FAMILIES = ("page", "table", "receipt", "chart", "screen", "scene")
NUMBERS = range(100)
N_FACES = 20
N_JITTER = 6  # places of a letter in its cell
# Tiles after the symbols: bar tops of 1 to 13 pixels, a line, shapes of one patch, shapes of 2 x 2 patches
BAR_TOP = len(SYMBOLS)
LINE = BAR_TOP + 13
SMALL_SHAPE = LINE + 1
LARGE_SHAPE = SMALL_SHAPE + 2 * len(SHAPES)
N_TILES = LARGE_SHAPE + 8 * len(SHAPES)
# Palette of a picture: the eight colours, then
PAPER, INK, PAPER2, DARK, PALE = range(8, 13)
N_PALETTE = 13
# Labels of a patch
SYMBOL0, SYMBOL1, WORD, COLOR, KEY1, KEY2, PART = range(7)
N_LABELS = 7
N_PARTS = 5  # how far along its text a patch is: 1 and up, or 0 for none

_COLOR_VALUES = {
    "RED": (205, 40, 40),
    "GREEN": (40, 150, 60),
    "BLUE": (45, 75, 205),
    "GOLD": (225, 190, 40),
    "PINK": (240, 130, 190),
    "CYAN": (70, 205, 215),
    "BROWN": (125, 80, 40),
    "GRAY": (135, 135, 135),
}
_BRIGHT = {"GOLD", "PINK", "CYAN"}  # dark text on these


@dataclass(frozen=True)
class Fact:
    """place: row, column and number of the cells that answer, spelled: letter by letter. Training points the decoder at
    them.
    """

    kind: str
    question: str
    answer: str
    place: tuple[int, int, int]
    spelled: bool


class Picture:
    """Cells: uint8 (rows, columns) each. labels: int16 (rows, columns / 2, N_LABELS). palette: uint8 (N_PALETTE, 3)."""

    def __init__(self, rng: Random, tokens_high: int, tokens_wide: int):
        self.rows, self.columns = 2 * tokens_high, 4 * tokens_wide
        shape = (self.rows, self.columns)
        self.tile, self.face = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
        self.ink, self.paper = np.full(shape, INK, np.uint8), np.full(shape, PAPER, np.uint8)
        self.labels = np.zeros((self.rows, self.columns // 2, N_LABELS), np.int16)
        self.facts: list[Fact] = []
        self.rng = rng
        self.words = rng.sample(LEXICON, len(LEXICON))
        self.numbers = rng.sample(NUMBERS, len(NUMBERS))
        self.palette = self._palette()
        self.noise = rng.uniform(0, 4)
        self.shade = rng.uniform(0, 12)
        self.base_face = rng.randrange(N_FACES)

    def _palette(self) -> np.ndarray:
        rng = self.rng
        colors = [[c + rng.randint(-14, 14) for c in _COLOR_VALUES[name]] for name in COLORS]
        light = [rng.randint(222, 250) for _ in range(3)]
        dark = [rng.randint(8, 60) for _ in range(3)]
        dimmed = rng.randint(12, 26)
        if rng.random() < 0.2:
            paper, ink, second = dark, light, [c + dimmed for c in dark]
        else:
            paper, ink, second = light, dark, [c - dimmed for c in light]
        return np.clip([*colors, paper, ink, second, [25, 25, 30], [248, 248, 245]], 0, 255).astype(np.uint8)

    def word(self) -> str | None:
        """A word that stands nowhere else in the picture."""
        return self.words.pop() if self.words else None

    def number(self) -> str | None:
        return f"{self.numbers.pop():02d}" if self.numbers else None

    def style(self) -> int:
        """A face with a place in the cell, for one piece of text."""
        face = self.base_face if self.rng.random() < 0.7 else self.rng.randrange(N_FACES)
        return face * N_JITTER + self.rng.randrange(N_JITTER)

    def text(
        self, row: int, column: int, text: str, ink: int | None = None, term: str = "", key1: str = "", key2: str = ""
    ) -> None:
        """Text at an even column; its patches are labelled with the term that it is and the terms it belongs to."""
        end = column + len(text)
        self.tile[row, column:end] = [SYMBOL_ID[c] for c in text]
        self.face[row, column:end] = self.style()
        if ink is not None:
            self.ink[row, column:end] = ink
        patches = self.labels[row, column // 2 : (end + 1) // 2]
        patches[:, WORD] = TERM_ID[term]
        patches[:, PART] = np.arange(1, len(patches) + 1)
        if key1:
            patches[:, KEY1] = TERM_ID[key1]
        if key2:
            patches[:, KEY2] = TERM_ID[key2]

    def fill(self, row: int, column: int, height: int, width: int, paper: int) -> None:
        self.paper[row : row + height, column : column + width] = paper

    def color(self, row: int, column: int, height: int, width: int, color: int) -> None:
        """Labels patches with a colour (an index of COLORS)."""
        self.labels[row : row + height, column // 2 : (column + width) // 2, COLOR] = color + 1

    def fact(self, kind: str, question: str, answer: str, row: int, column: int, length: int = 0) -> None:
        """What can be asked; the answer stands at row, column (length: of what stands there, where it is not the answer
        itself).
        """
        self.facts.append(Fact(kind, question, answer, (row, column, length or len(answer)), not length))

    def finish(self) -> None:
        """Labels of letters."""
        symbols = np.where(self.tile < len(SYMBOLS), self.tile, 0)
        self.labels[..., SYMBOL0] = symbols[:, 0::2]
        self.labels[..., SYMBOL1] = symbols[:, 1::2]


def _code(rng: Random) -> str:
    return "".join(rng.choice(CODE_SYMBOLS) for _ in range(rng.randint(3, 4)))


def _even(n: int) -> int:
    return n + n % 2


def _page(p: Picture, row: int, column: int, height: int, width: int) -> None:
    """Lines of words and codes, some with line numbers."""
    rng = p.rng
    numbered = rng.random() < 0.6
    step = rng.choice((1, 1, 2))
    for r in range(row + rng.randrange(2), row + height, step):
        if rng.random() < 0.08:
            continue
        c, before, first = column, "", True
        number = p.number() if numbered else None
        if number:
            p.text(r, c, number, term=number)
            c += 4
        end = column + width if rng.random() < 0.75 else column + rng.randrange(width // 2, width)
        while c + 6 <= end:
            word = p.word() if rng.random() < 0.65 else None
            shown = word or _code(rng)
            p.text(r, c, shown, term=word or "", key1=before, key2=number if first and number else "")
            if before:
                p.fact("follows", f"what follows {before}?", shown, r, c)
            if first and number:
                p.fact("line", f"what starts line {number}?", shown, r, c)
            c += _even(len(shown) + 1) + 2 * (rng.random() < 0.15)
            before, first = word or "", False


def _table(p: Picture, row: int, column: int, height: int, width: int) -> None:
    """Labelled rows and columns of numbers or codes."""
    rng = p.rng
    pitch = rng.choice((6, 8))
    n_columns = min((width - 8) // pitch, rng.randint(2, 7))
    step = rng.choice((1, 1, 2))
    n_rows = min((height - 1) // step, rng.randint(4, 26), len(p.words) - n_columns)
    if n_columns < 1 or n_rows < 1:
        return
    heads = [p.word() for _ in range(n_columns)]
    table_width = 8 + pitch * n_columns
    heads = [h[: pitch - 1] if len(h) >= pitch else h for h in heads]
    if any(h not in TERM_ID for h in heads):  # a name that a narrow column has no place for
        heads = [
            h if h in TERM_ID else next((p.words.pop(i) for i, w in enumerate(p.words) if len(w) < pitch), None)
            for h in heads
        ]
        if None in heads:
            return
    if rng.random() < 0.5:
        p.fill(row, column, 1, table_width, PAPER2)
    for i, head in enumerate(heads):
        p.text(row, column + 8 + pitch * i, head, term=head)
    striped = rng.random() < 0.5
    codes = rng.random() < 0.25
    for j in range(n_rows):
        r = row + 1 + step * j
        name = p.word()
        if name is None:
            return
        if striped and j % 2:
            p.fill(r, column, 1, table_width, PAPER2)
        p.text(r, column, name, term=name)
        for i, head in enumerate(heads):
            if rng.random() < 0.06:
                continue
            value = _code(rng) if codes else str(rng.randint(1, 999))
            p.text(r, column + 8 + pitch * i, value, key1=name, key2=head)
            p.fact("cell", f"what is the {head} of {name}?", value, r, column + 8 + pitch * i)


def _receipt(p: Picture, row: int, column: int, height: int, width: int) -> None:
    """Labels with prices at the right and perhaps quantities at the left."""
    rng = p.rng
    own = min(width, rng.choice((18, 20, 22, 26)))
    quantities = own >= 18 and rng.random() < 0.65
    left, right = column + (4 if quantities else 0), column + own - 6
    title = p.word()
    if title:
        p.text(row, column + _even(rng.randrange(max(1, own - 8))), title, term=title)
    step = rng.choice((1, 1, 1, 2))
    dotted = rng.random() < 0.3
    for r in range(row + 1 + rng.randrange(2), row + height, step):
        if rng.random() < 0.06:
            p.tile[r, column : column + own] = LINE
            continue
        label = p.word()
        if label is None:
            return
        price = f"{rng.randint(0, 99)}.{rng.randint(0, 99):02d}"
        if quantities and rng.random() < 0.85:
            quantity = str(rng.randint(1, 9)) if rng.random() < 0.5 else str(rng.randint(10, 99))
            p.text(r, column, quantity, key2=label)
            p.fact("quantity", f"how many {label}?", quantity, r, column)
        p.text(r, left, label, term=label)
        if dotted:
            for c in range(left + _even(len(label) + 1), right - 1):
                p.tile[r, c] = SYMBOL_ID["."]
        p.text(r, right, price, key1=label)
        p.fact("price", f"how much is {label}?", price, r, right)


def _chart(p: Picture, row: int, column: int, height: int, width: int) -> None:
    """Bars with values above and names below, and a title."""
    rng = p.rng
    pitch = rng.choice((8, 8, 10))
    n = min(width // pitch, rng.randint(3, 10))
    tall = min(height, rng.randint(8, 16))
    names = [p.word() for _ in range(n)]
    title = p.word()
    if n < 2 or tall < 6 or title is None or None in names:
        return
    p.text(row, column + _even(rng.randrange(max(1, n * pitch - 8))), title, term=title)
    top_value = rng.choice((99, 999))
    best = rng.randint(int(top_value * 0.6), top_value)
    values = [rng.randint(top_value // 10, int(best * 0.88)) for _ in range(n)]
    winner = rng.randrange(n)
    values[winner] = best
    bottom = row + tall - 1  # the row of names
    space = (tall - 3) * 14
    for i, (name, value) in enumerate(zip(names, values)):
        c = column + pitch * i
        color = rng.randrange(len(COLORS))
        pixels = max(3, round(space * value / best))
        full, rest = divmod(pixels, 14)
        p.fill(bottom - full, c, full, 4, color)
        if rest:
            p.tile[bottom - full - 1, c : c + 4] = BAR_TOP + rest - 1
            p.ink[bottom - full - 1, c : c + 4] = color
        p.color(bottom - full, c, full, 4, color)
        p.text(bottom - full - 1 - (rest > 0), c, str(value), key1=name)
        highest = i == winner
        p.text(bottom, c, name, term=name, key1=title if highest else "")
        p.color(bottom, c, 1, 4, color)
        p.fact("height", f"how high is {name}?", str(value), bottom - full - 1 - (rest > 0), c)
        p.fact("bar color", f"what color is bar {name}?", COLORS[color], bottom, c, 4)
        if highest:
            for _ in range(2):
                p.fact("highest", f"what is highest in {title}?", name, bottom, c)


def _screen(p: Picture, row: int, column: int, height: int, width: int) -> None:
    """A window: title, fields with values, coloured buttons."""
    rng = p.rng
    own = min(width, rng.choice((20, 24, 28)))
    title = p.word()
    if title is None or height < 5 or own < 16:
        return
    tall = min(height, rng.randint(6, 12))
    p.fill(row, column, tall, own, PAPER2)
    p.fill(row, column, 1, own, DARK)
    p.text(row, column + 2 * rng.randrange(4), title, ink=PALE, term=title)
    per_row = own // 8
    button_rows = 1 if tall < 8 else rng.randint(1, 2)
    boxed = rng.random() < 0.5
    for r in range(row + 1 + rng.randrange(2), row + tall - button_rows, rng.choice((1, 1, 2))):
        label = p.word()
        if label is None:
            return
        value = _code(rng) if rng.random() < 0.6 else str(rng.randint(10, 9999))
        start = column + 2 * rng.randint(4, 5)
        p.text(r, column, f"{label}:" if rng.random() < 0.5 else label, term=label)
        if boxed:
            p.fill(r, start, 1, 6, PAPER)
        p.text(r, start, value, key1=label)
        p.fact("field", f"what is in field {label}?", value, r, start)
    colors = rng.sample(range(len(COLORS)), min(len(COLORS), per_row * button_rows))
    for i, color in enumerate(colors):
        r, c = row + tall - 1 - i // per_row, column + 8 * (i % per_row)
        if rng.random() < 0.15:
            continue
        text = p.word()
        if text is None:
            return
        p.fill(r, c, 1, 6, color)
        p.text(r, c, text, ink=DARK if COLORS[color] in _BRIGHT else PALE, term=text, key1=title)
        p.color(r, c, 1, 6, color)
        p.fact("button", f"which button is {COLORS[color]} in {title}?", text, r, c)
        p.fact("button color", f"what color is button {text}?", COLORS[color], r, c, 6)


def _scene(p: Picture, row: int, column: int, height: int, width: int) -> None:
    """Coloured shapes, small and large, most with a number beside them."""
    rng = p.rng
    places = [(r, c) for r in range(row, row + height - 1, 3) for c in range(column, column + width - 6, 8)]
    combinations = [(c, s) for c in range(len(COLORS)) for s in range(len(SHAPES))]
    if rng.random() < 0.4:  # shapes that are there once: their colour can be asked for
        few = rng.sample(range(len(SHAPES)), len(SHAPES))
        combinations = [(rng.randrange(len(COLORS)), s) for s in few]
    rng.shuffle(combinations)
    rng.shuffle(places)
    chosen = list(zip(places, combinations[: max(4, int(len(places) * rng.uniform(0.4, 0.9)))]))
    shapes = [s for _, (_, s) in chosen]
    for (r, c), (color, s) in chosen:
        number = p.number() if rng.random() < 0.9 else None
        large = rng.random() < 0.45
        r += 0 if large else rng.randrange(2)
        if large:
            p.tile[r : r + 2, c : c + 4] = LARGE_SHAPE + 8 * s + np.arange(8).reshape(2, 4)
            high, wide = 2, 4
        else:
            p.tile[r, c : c + 2] = SMALL_SHAPE + 2 * s + np.arange(2)
            high, wide = 1, 2
        p.ink[r : r + high, c : c + wide] = color
        p.color(r, c, high, wide, color)
        name, tint = SHAPES[s], COLORS[color]
        patches = p.labels[r : r + high, c // 2 : (c + wide) // 2]
        patches[..., WORD] = TERM_ID[name]
        if number:
            patches[..., KEY1] = TERM_ID[number]
            p.text(r, c + wide, number, term=number, key1=name, key2=tint)
            p.fact("number", f"what number is at the {tint} {name}?", number, r, c + wide)
            p.fact("number", f"what number is at the {tint} {name}?", number, r, c + wide)
            p.fact("shape at", f"what shape is at {number}?", name, r, c, wide)
            p.fact("color at", f"what color is at {number}?", tint, r, c, wide)
        if shapes.count(s) == 1:
            for _ in range(3):
                p.fact("color", f"what color is the {name}?", tint, r, c, wide)


_PAINT: dict[str, Callable[[Picture, int, int, int, int], None]] = {
    "page": _page,
    "table": _table,
    "receipt": _receipt,
    "chart": _chart,
    "screen": _screen,
    "scene": _scene,
}
# Largest panel of a family in cells (rows, columns); larger pictures hold several
_PANELS = {
    "page": (64, 64),
    "table": (28, 64),
    "receipt": (40, 28),
    "chart": (16, 64),
    "screen": (12, 28),
    "scene": (64, 128),
}


def _spans(total: int, largest: int, smallest: int, rng: Random) -> list[tuple[int, int]]:
    """Cuts a side into spans (start, length) of even start."""
    n = max(1, -(-total // largest))
    while n > 1 and total // n < smallest + 2:
        n -= 1
    if n == 1 and total >= 2 * smallest + 4 and rng.random() < 0.25:
        n = 2
    cuts = [_even(total * i // n) for i in range(n)] + [total]
    return [(a, b - a) for a, b in itertools.pairwise(cuts)]


_SMALLEST = {
    "page": (8, 20),
    "table": (6, 24),
    "receipt": (6, 22),
    "chart": (8, 24),
    "screen": (6, 20),
    "scene": (999, 999),
}


def draw(split: str, seed: int, index: int, family: str, grid: tuple[int, int]) -> Picture:
    """A picture of grid = (tokens high, tokens wide), with at least four facts."""
    rng = Random(f"{split}/{seed}/{index}/{family}/{grid[0]}x{grid[1]}")
    while True:
        p = _draw_once(rng, family, grid)
        if len(set(p.facts)) >= 4:
            return p


def _draw_once(rng: Random, family: str, grid: tuple[int, int]) -> Picture:
    p = Picture(rng, *grid)
    (high, wide), (low, narrow) = _PANELS[family], _SMALLEST[family]
    row_spans = _spans(p.rows, high, low, rng)
    column_spans = _spans(p.columns, wide, narrow, rng)
    panels = [(r, c, h, w) for r, h in row_spans for c, w in column_spans]
    rng.shuffle(panels)  # words can run out: not always at the same place
    margin = 2 * (rng.random() < 0.5)
    for r, c, h, w in panels:
        gap_below, gap_right = (1 if r + h < p.rows else 0), (2 if c + w < p.columns else 0)
        _PAINT[family](p, r, c + margin, h - gap_below, w - margin - gap_right)
    p.finish()
    return p


def choose_facts(p: Picture, n: int) -> list[Fact]:
    """n facts, all different while there are enough; kinds share about equally."""
    rng = p.rng
    facts = list(dict.fromkeys(p.facts)) if len(p.facts) >= n else list(p.facts)
    by_kind: dict[str, list[Fact]] = {}
    for f in facts:
        by_kind.setdefault(f.kind, []).append(f)
    for group in by_kind.values():
        rng.shuffle(group)
    chosen: list[Fact] = []
    while len(chosen) < n and any(by_kind.values()):
        for group in by_kind.values():
            if group and len(chosen) < n:
                chosen.append(group.pop())
    while len(chosen) < n:
        chosen.append(rng.choice(p.facts))
    return chosen
