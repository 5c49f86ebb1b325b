"""Checks grammars before llama.cpp sees them.

llama.cpp's parser and matcher (src/llama-grammar.cpp) recurse and copy without bounds, and an exception inside them
ends the process. A grammar is therefore read here first, in the same steps, into the same rules, and each step has a
bound. Knows GBNF. Knows no model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import ConfigError

# Bounds. Each is above what real schemas and grammars need, and far below where llama.cpp hangs or dies.
MAX_BYTES = 512 * 1024
MAX_DEPTH = 1000  # of parentheses: parse_alternates recurses, about 1 KiB of stack for each
MAX_ELEMENTS = 200_000  # terminals and references after repetitions are written out, 8 bytes each
MAX_REPETITIONS = 2000  # MAX_REPETITION_THRESHOLD: llama.cpp refuses a larger minimum, and ignores a larger maximum
MAX_LEFT_DEPTH = 2000  # llama_grammar_detect_left_recursion recurses along leftmost references
MAX_VISITS = 1_000_000  # it visits a rule once for each way to it
MAX_BRANCHES = 2000  # stacks that one position opens: llama_grammar_advance_stack compares each with all others
MAX_STEPS = 1_000_000  # stacks of all positions together

TERMINAL, CONTINUED = (
    -1,
    -2,
)  # elements that are not references: a character, and a further range of the same class

_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_OR_NEWLINE = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[a-zA-Z0-9-]+")
_CHARACTER = re.compile(r"""\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[trn\\"\[\]-])|[^\\]""", re.DOTALL)
_REPETITION = re.compile(r"\{[ \t]*([0-9]+)[ \t]*(?:(,)[ \t]*([0-9]+)?[ \t]*)?\}")
_REPETITION_NESTED = re.compile(_REPETITION.pattern.replace(r"[ \t]", r"[ \t\r\n]"))
_TOKEN_ID = re.compile(r"<\[([0-9]+)\]>")
_TOKEN = re.compile(r"<[^>]*>")

Rule = list[list[int]]  # alternatives of elements: TERMINAL, CONTINUED, or the number of a rule


def check_grammar(text: str, root: str, n_vocab: int, is_token: Callable[[str], bool]) -> None:
    """Refuses a grammar that llama.cpp could not take.

    Args:
        text: The grammar, in GBNF.
        root: Name of the rule to begin with.
        n_vocab: Token ids are below it.
        is_token: Whether a text is exactly one token.

    Raises:
        ConfigError: It is not GBNF, or exceeds one of the bounds above.
    """
    if not isinstance(text, str):
        raise ConfigError(f"the grammar is a {type(text).__name__}", "use LlamaGrammar.from_string(text)")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ConfigError("the grammar has characters that are not text (surrogates)", "write it in UTF-8") from error
    if size > MAX_BYTES:
        raise ConfigError(f"the grammar has {size} bytes", f"use {MAX_BYTES} at most")
    if "\0" in text:
        raise ConfigError("the grammar holds a NUL character", "write it as \\x00")
    rules, names = _Parser(text, n_vocab, is_token).parse()
    if root not in names:
        raise ConfigError(f"the grammar has no rule {root!r}", f"begin it with {root} ::= ...")
    _check_left_recursion(rules)
    _check_branches(rules)


@dataclass
class _Frame:
    """A rule, or a group in parentheses, that is being read.

    Attributes:
        rule: Its number.
        alternatives: Its alternatives so far.
        n_symbols: Number of names before the group.
        start: Where the last symbol begins in the last alternative. A repetition repeats that symbol.
        n_rules: Number of rules that this symbol made.
    """

    rule: int
    alternatives: Rule
    n_symbols: int
    start: int = 0
    n_rules: int = 1


class _Parser:
    """llama_grammar_parser with bounds, and with a stack of its own instead of recursion."""

    def __init__(self, text: str, n_vocab: int, is_token: Callable[[str], bool]) -> None:
        self._text, self._n_vocab, self._is_token = text, n_vocab, is_token
        self._names: dict[str, int] = {}
        self._n_symbols = 0  # names, and rules made for groups and repetitions
        self._rules: dict[int, Rule] = {}
        self._n_elements = 0

    def parse(self) -> tuple[dict[int, Rule], dict[str, int]]:
        """The rules by number, and the numbers of the named ones."""
        position = self._skip(0, True)
        while position < len(self._text):
            position = self._parse_rule(position)
        if not self._rules:
            raise ConfigError("the grammar is empty", "give at least root ::= ...")
        missing = [name for name, number in self._names.items() if number not in self._rules]
        if missing:
            raise ConfigError(f"the grammar has no rule {missing[0][:60]!r}, which another rule names", "define it")
        return self._rules, self._names

    def _fail(self, what: str, position: int) -> ConfigError:
        line = self._text.count("\n", 0, position) + 1
        found = self._text[position : position + 20] or "the end"
        return ConfigError(
            f"the grammar cannot be parsed: {what} in line {line}, at {found!r}", "see llama.cpp's grammars/README.md"
        )

    def _skip(self, position: int, newlines: bool) -> int:
        found = (_SPACE_OR_NEWLINE if newlines else _SPACE).match(self._text, position)
        assert found is not None  # both match the empty string
        return found.end()

    def _new_symbol(self) -> int:
        self._n_symbols += 1
        return self._n_symbols - 1

    def _symbol(self, name: str) -> int:
        if name not in self._names:
            self._names[name] = self._new_symbol()
        return self._names[name]

    def _grow(self, n: int) -> None:
        self._n_elements += n
        if self._n_elements > MAX_ELEMENTS:
            raise ConfigError(
                f"the grammar comes to more than {MAX_ELEMENTS} elements",
                "use fewer or shorter repetitions and alternatives",
            )

    def _parse_rule(self, position: int) -> int:
        text = self._text
        name = _NAME.match(text, position)
        if not name:
            raise self._fail("a rule's name is missing", position)
        position = self._skip(name.end(), False)
        if not text.startswith("::=", position):
            raise self._fail("::= is missing", position)
        position = self._skip(position + 3, True)
        frames = [_Frame(self._symbol(name.group()), [[]], 0)]
        while True:
            frame = frames[-1]
            nested = len(frames) > 1
            c = text[position : position + 1]
            if c == "|":
                frame.alternatives.append([])
                frame.start, frame.n_rules = 0, 1
                self._grow(1)
                position = self._skip(position + 1, True)
            elif c == "(":
                if len(frames) > MAX_DEPTH:
                    raise ConfigError(
                        f"the grammar's parentheses are more than {MAX_DEPTH} deep", "name the inner parts as rules"
                    )
                n_symbols = self._n_symbols
                frames.append(_Frame(self._new_symbol(), [[]], n_symbols))
                position = self._skip(position + 1, True)
            elif c == ")" and nested:
                frames.pop()
                self._add_rule(frame.rule, frame.alternatives)
                self._append(frames[-1], [frame.rule], max(1, self._n_symbols - frame.n_symbols))
                position = self._skip(position + 1, len(frames) > 1)
            elif c and c in "*+?{":
                position, least, most = self._read_repetition(position, nested)
                self._repeat(frame, least, most, position)
                position = self._skip(position, nested)
            else:
                read = self._read_symbol(position)
                if read is None:
                    break
                position, elements = read
                self._append(frame, elements)
                position = self._skip(position, nested)
        if len(frames) > 1:
            raise self._fail("a ) is missing", position)
        self._add_rule(frames[0].rule, frames[0].alternatives)
        if position < len(text) and text[position] not in "\r\n":
            raise self._fail("a line should end", position)
        return self._skip(position, True)

    def _append(self, frame: _Frame, elements: list[int], n_rules: int = 1) -> None:
        sequence = frame.alternatives[-1]
        frame.start, frame.n_rules = len(sequence), n_rules
        self._grow(len(elements))
        sequence += elements

    def _add_rule(self, number: int, alternatives: Rule) -> None:
        self._rules[number] = alternatives
        self._grow(1)

    def _read_symbol(self, position: int) -> tuple[int, list[int]] | None:
        """Where the symbol at the position ends, and its elements. None if there is no symbol."""
        text = self._text
        c = text[position : position + 1]
        if c == '"':
            return self._read_literal(position + 1)
        if c == "[":
            return self._read_class(position + 1)
        if c == ".":
            return position + 1, [TERMINAL]
        if c and c in "<!":
            return self._read_token(position + (c == "!")), [TERMINAL]
        name = _NAME.match(text, position)
        return (name.end(), [self._symbol(name.group())]) if name else None

    def _read_character(self, position: int) -> int:
        found = _CHARACTER.match(self._text, position)
        if not found:
            raise self._fail(
                "an escape is unknown" if position < len(self._text) else "a quote or bracket is not closed", position
            )
        return found.end()

    def _read_literal(self, position: int) -> tuple[int, list[int]]:
        n = 0
        while self._text[position : position + 1] != '"':
            position = self._read_character(position)
            n += 1
        return position + 1, [TERMINAL] * n

    def _read_class(self, position: int) -> tuple[int, list[int]]:
        text, n = self._text, 0
        position += text.startswith("^", position)
        while text[position : position + 1] != "]":
            position = self._read_character(position)
            n += 1
            if text[position : position + 1] == "-" and text[position + 1 : position + 2] != "]":
                position = self._read_character(position + 1)
                n += 1
        return position + 1, [TERMINAL] * (n > 0) + [CONTINUED] * (n - 1)

    def _read_token(self, position: int) -> int:
        number = _TOKEN_ID.match(self._text, position)
        if number:
            if len(number.group(1)) > 10 or int(number.group(1)) >= self._n_vocab:
                raise ConfigError(
                    f"the grammar names token {number.group(1)[:20]}", f"the model has tokens 0 to {self._n_vocab - 1}"
                )
            return number.end()
        token = _TOKEN.match(self._text, position)
        if not token:
            raise self._fail("a token is not closed", position)
        if len(token.group()) > 1000 or not self._is_token(token.group()):
            raise ConfigError(
                f"the grammar names {token.group()[:60]!r}, which is not a token of the model", "use <[ID]> or another"
            )
        return token.end()

    def _read_repetition(self, position: int, nested: bool) -> tuple[int, int, int | None]:
        """Where the repetition ends, its minimum, and its maximum (None: no limit)."""
        c = self._text[position]
        if c != "{":
            return position + 1, *{"*": (0, None), "+": (1, None), "?": (0, 1)}[c]
        found = (_REPETITION_NESTED if nested else _REPETITION).match(self._text, position)
        if not found:
            raise self._fail("a repetition is not {m}, {m,} or {m,n}", position)
        numbers = [None if n is None else int(n) if len(n) < 10 else 10**9 for n in found.group(1, 3)]
        least = numbers[0] or 0
        most = numbers[1] if found.group(2) else least
        if max(least, most or 0) > MAX_REPETITIONS:
            raise ConfigError(
                f"the grammar repeats {found.group()[:40]} times", f"use {MAX_REPETITIONS} at most, or no limit"
            )
        if most is not None and most < least:
            raise self._fail("a repetition has a maximum below its minimum", position)
        return found.end(), least, most

    def _repeat(self, frame: _Frame, least: int, most: int | None, position: int) -> None:
        """handle_repetitions: S{m,n} becomes m times S, and a chain of n - m rules S' ::= S S' | ."""
        sequence = frame.alternatives[-1]
        unit = sequence[frame.start :]
        if not unit:
            raise self._fail("there is nothing to repeat", position)
        total = most or least or 1
        if frame.n_rules * total > MAX_REPETITIONS:
            raise ConfigError(
                f"the grammar repeats {frame.n_rules} rules {total} times", "use fewer repetitions, or a smaller group"
            )
        n_optional = 1 if most is None else most - least
        self._grow(len(unit) * max(0, least - 1) + n_optional * (len(unit) + 3))
        del sequence[frame.start :]
        sequence += unit * least
        last: int | None = None
        for _ in range(n_optional):
            number = self._new_symbol()
            again = [number] if most is None else [last] if last is not None else []
            self._rules[number] = [unit + again, []]
            last = number
        if last is not None:
            sequence.append(last)
        frame.n_rules *= total


def _leftmost(rules: dict[int, Rule], number: int, may_be_empty: dict[int, bool]) -> Iterator[int]:
    """References that llama_grammar_detect_left_recursion follows.

    These are the first element of each alternative, and the next element after a rule that has an empty alternative.
    """
    for alternative in rules[number]:
        for element in alternative:
            if element < 0:
                break
            yield element
            if not may_be_empty[element]:
                break


def _check_left_recursion(rules: dict[int, Rule]) -> None:
    """Refuses left recursion, and grammars for which llama_grammar_detect_left_recursion would run too deep or long."""
    may_be_empty = {number: [] in rule for number, rule in rules.items()}
    visits: dict[int, int] = {}
    depths: dict[int, int] = {}
    total = 0
    for first in sorted(rules):
        if first in visits:
            continue
        path, open_rules = [(first, _leftmost(rules, first, may_be_empty))], {first}
        counts, levels = [1], [1]
        while path:
            number, references = path[-1]
            reference = next(references, None)
            if reference is None:
                path.pop()
                open_rules.discard(number)
                visits[number], depths[number] = counts.pop(), levels.pop()
                if counts:
                    counts[-1] += visits[number]
                    levels[-1] = max(levels[-1], 1 + depths[number])
            elif reference in open_rules:
                raise ConfigError(
                    "the grammar is left-recursive: a rule begins with itself", "put a character before the recursion"
                )
            elif reference in visits:
                counts[-1] += visits[reference]
                levels[-1] = max(levels[-1], 1 + depths[reference])
            else:
                path.append((reference, _leftmost(rules, reference, may_be_empty)))
                open_rules.add(reference)
                counts.append(1)
                levels.append(1)
        total += visits[first]
        if total > MAX_VISITS or depths[first] > MAX_LEFT_DEPTH:
            raise ConfigError(
                "the grammar's rules begin with each other in too many ways", "use fewer or flatter rules"
            )


def _check_branches(rules: dict[int, Rule]) -> None:
    """Refuses grammars for which llama_grammar_advance_stack would open too many stacks."""
    steps = 0
    for number, rule in rules.items():
        for a, alternative in enumerate(rule):
            for e, element in enumerate(alternative):
                if element >= 0:  # where a terminal stands, there is one stack
                    steps += _count_stacks(rules, (number, a, e))
                if steps > MAX_STEPS:
                    raise ConfigError(
                        "the grammar can go on in too many ways", "use fewer alternatives, or begin them differently"
                    )
        if len(rule) > MAX_BRANCHES:
            raise ConfigError(f"a rule of the grammar has {len(rule)} alternatives", f"use {MAX_BRANCHES} at most")


_Position = tuple[int, int, int]


def _count_stacks(rules: dict[int, Rule], position: _Position) -> int:
    """Number of stacks that a stack with only this position becomes on its way to terminals.

    A position is (rule, alternative, element). It stands for an address in llama.cpp, so equal stacks count once.
    """
    seen: set[tuple[_Position, ...]] = set()
    todo: list[tuple[_Position, ...]] = [(position,)]
    while todo:
        stack = todo.pop()
        if stack in seen:
            continue
        seen.add(stack)
        if len(seen) > MAX_BRANCHES or len(stack) > MAX_BRANCHES:
            raise ConfigError(
                f"the grammar can go on in more than {MAX_BRANCHES} ways at one place", "use fewer alternatives"
            )
        if not stack:
            continue
        number, a, e = stack[-1]
        element = rules[number][a][e]
        if element < 0:
            continue
        below = stack[:-1]
        if e + 1 < len(rules[number][a]):
            below += ((number, a, e + 1),)
        todo += [(*below, (element, i, 0)) if alternative else below for i, alternative in enumerate(rules[element])]
    return len(seen)
