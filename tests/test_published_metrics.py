"""Metrics of published benchmarks against values worked out by hand."""

import pytest

from star_edge.evaluation.metrics import anls, choice_match, levenshtein, ocr_contains, relaxed_match


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_levenshtein(a, b, distance):
    assert levenshtein(a, b) == levenshtein(b, a) == distance


@pytest.mark.parametrize(
    ("answer", "truths", "score"),
    [
        ("1/8/93", ["1/8/93"], 1),
        (" Edward  SHANNON\n", ["Edward R. Shannon", "Edward Shannon"], 1),
        ("1/8/94", ["1/8/93"], 5 / 6),  # one of six characters
        ("sitting", ["kitten"], 4 / 7),  # three of seven
        ("abcd", ["abxy"], 0.5),  # at the threshold it counts
        ("abcd", ["axyz"], 0),  # 1/4 is below
        ("the total is 7", ["7"], 0),  # 1/14
        ("", ["7"], 0),
        ("", [""], 1),
        ("karl", ["carl", "karla"], 4 / 5),  # the nearer one: 3/4 and 4/5
    ],
)
def test_anls(answer, truths, score):
    assert anls(answer, truths) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("14", "14", 1),
        (" 14.7\n", "14", 1),  # exactly 5%
        ("13.3", "14", 1),
        ("14.71", "14", 0),
        ("-14", "14", 0),
        ("62%", "62", 0),  # 0.62
        ("62%", "0.6", 1),  # 3.3% more
        ("5%", "5%", 1),
        ("0", "0", 1),
        ("0.001", "0", 0),
        ("0.0", "0", 0),  # a true 0 is compared as text
        ("no", "No", 1),
        ("No.", "No", 0),
        ("1,000", "1000", 0),
        ("two", "2", 0),
        ("nan", "1", 0),
        ("inf", "1", 0),
        ("%", "1", 0),
        ("2008", "2100", 1),  # years are numbers too: 4.4% off
    ],
)
def test_relaxed_accuracy(answer, truth, score):
    assert relaxed_match(answer, [truth]) == score
    assert relaxed_match(answer, ["something else", truth]) == score


@pytest.mark.parametrize(
    ("answer", "truths", "formula", "score"),
    [
        ("It says Centre.", ["CENTRE"], False, 1),
        ("CEN TRE", ["CENTRE"], False, 0),
        ("line\none", ["line one"], False, 1),
        ("friend", ["foe", "end"], False, 1),
        (r"x ^ { 2 }", ["x^{2}"], True, 1),
        ("X^{2}", ["x^{2}"], True, 0),  # case matters in formulas
        ("x^\n{2}", ["x ^ {2}"], True, 1),
    ],
)
def test_ocrbench_containment(answer, truths, formula, score):
    assert ocr_contains(answer, truths, formula) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("B", 1),
        (" b", 0),
        ("(B)", 1),
        ("B. a dog", 1),
        ("B) a dog", 1),
        ("B\nIt is brown.", 1),
        ("[B]", 1),
        ("The answer is B.", 1),
        ("Answer: (B)", 1),
        ("the correct answer is B", 1),
        ("Option B", 1),
        ("A dog", 1),  # the article is no letter; it is the option's text
        ("a dog.", 1),
        ("A", 0),
        ("A. a dog", 0),  # the letter counts
        ("Between A and B", 0),
        ("Both", 0),
        ("", 0),
    ],
)
def test_choices(answer, score):
    assert choice_match(answer, ["B", "a dog"]) == score
