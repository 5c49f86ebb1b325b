"""Questions whose answer lies in some of the rows of a context: a seeded generator. Knows no model.

Item i of a split is drawn from (split, task, i) alone. Splits share words and forms, not draws.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NAMES = (
    "Alice Bob Carol David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nathan Olivia Peter Quinn Rachel Sam Tina"
).split()
THINGS = "apples pears books pencils coins stamps bottles shoes hats keys chairs lamps".split()
PLACES = "Paris London Berlin Madrid Rome Vienna Oslo Dublin Lisbon Prague Athens Warsaw".split()
COLORS = "red blue green yellow white black brown orange purple pink".split()
FILLER = (
    "The weather was mild and the river moved slowly under the old bridge.",
    "A small train leaves the station every morning before the market opens.",
    "Most of the windows on the north side had been painted last summer.",
    "The library keeps a large collection of maps from the last century.",
    "Nobody remembered who had planted the tall trees near the school.",
    "After lunch the street is quiet and the shops close for an hour.",
    "The museum was built from stone and has a wide wooden door.",
    "Fresh bread is sold next to the fountain in the main square.",
    "Several boats were tied to the pier because of the strong wind.",
    "The garden behind the hotel is known for its roses and herbs.",
)


@dataclass(frozen=True)
class Item:
    """A question about a context.

    Attributes:
        name: Split, task and index.
        context: What stands where an image's tokens would.
        question: The question.
        leads: Beginnings of the answer's sentences, which the model completes one after the other.
        answers: What a right answer contains, in this order.
        facts: (first, end) characters of the context that state the answer.
        values: (first, end) characters of the answer itself in the context, one for each of `answers`.
    """

    name: str
    context: str
    question: str
    leads: tuple[str, ...]
    answers: tuple[str, ...]
    facts: tuple[tuple[int, int], ...]
    values: tuple[tuple[int, int], ...]


def _item(context: str, question: str, leads: tuple[str, ...], found: Sequence[tuple[str, str]]) -> Item:
    """found: (sentence or line, value in it) of each fact that the answer takes."""
    facts, values = [], []
    for fact, value in found:
        if context.count(fact) != 1:
            raise ValueError(f"{fact!r} is {context.count(fact)} times in {context!r}")
        first = context.index(fact)
        facts.append((first, first + len(fact)))
        at = first + fact.rindex(value)
        values.append((at, at + len(value)))
    return Item("", context, question, leads, tuple(value for _, value in found), tuple(facts), tuple(values))


def facts(rng: random.Random) -> Item:
    """Six short facts among five other sentences; a question about one."""
    sentences: list[tuple[str, str, str, str]] = []
    for name in rng.sample(NAMES, 6):
        if rng.random() < 0.5:
            count, thing = str(rng.randint(10, 99)), rng.choice(THINGS)
            fact, question = f"{name} has {count} {thing}.", f"How many {thing} does {name} have?"
            sentences.append((fact, question, f"{name} has", count))
        else:
            place = rng.choice(PLACES)
            fact, question = f"{name} lives in {place}.", f"In which city does {name} live?"
            sentences.append((fact, question, f"{name} lives in", place))
    fact, question, lead, value = rng.choice(sentences)
    context = " ".join(_mixed(rng, [s[0] for s in sentences], 5))
    return _item(context, question, (lead,), [(fact, value)])


def two_facts(rng: random.Random) -> Item:
    """As `facts`; the question compares two people, so the answer takes two sentences of the context."""
    people, thing, counts = rng.sample(NAMES, 6), rng.choice(THINGS), rng.sample(range(10, 100), 6)
    sentences = [f"{name} has {count} {thing}." for name, count in zip(people, counts)]
    a, b = rng.sample(range(6), 2)
    question = f"Compare {people[a]} and {people[b]}: how many {thing} does each of them have?"
    leads = (f"{people[a]} has", f". {people[b]} has")
    return _item(" ".join(_mixed(rng, sentences, 5)), question, leads, [(sentences[i], str(counts[i])) for i in (a, b)])


def table(rng: random.Random) -> Item:
    """Six records of four fields; a question about one record."""
    people, cities = rng.sample(NAMES, 6), rng.sample(PLACES, 6)
    colors, counts = rng.sample(COLORS, 6), rng.sample(range(10, 100), 6)
    lines = [
        f"Name: {name}; City: {city}; Color: {color}; Number: {count}"
        for name, city, color, count in zip(people, cities, colors, counts)
    ]
    row = rng.randrange(6)
    question, lead = f"What is in the row of {people[row]}?", f"Name: {people[row]}; City:"
    found = [(lines[row], value) for value in (cities[row], colors[row], str(counts[row]))]
    return _item("\n".join(lines), question, (lead,), found)


def listed(rng: random.Random) -> Item:
    """A list of ten things with a code of four digits; a question about one code."""
    things = rng.sample(THINGS, 10)
    lines = [f"{i + 1}. {thing}: code {rng.randint(1000, 9999)}" for i, thing in enumerate(things)]
    row = rng.randrange(10)
    question, lead = f"What is the code of the {things[row]}?", f"{things[row]}: code"
    return _item("\n".join(lines), question, (lead,), [(lines[row], lines[row].split()[-1])])


TASKS: dict[str, Callable[[random.Random], Item]] = {
    "facts": facts,
    "two-facts": two_facts,
    "table": table,
    "list": listed,
}


def make(split: str, task: str, index: int) -> Item:
    """Item `index` of a task."""
    name = f"{split}/{task}/{index}"
    item = TASKS[task](random.Random(name))
    return Item(name, item.context, item.question, item.leads, item.answers, item.facts, item.values)


def _mixed(rng: random.Random, sentences: Sequence[str], n_filler: int) -> list[str]:
    mixed = [*sentences, *rng.sample(FILLER, n_filler)]
    rng.shuffle(mixed)
    return mixed
