"""Whether an answer is right, and how far it is from the unpruned model's.

Scores are in 0..1. Answers are the model's raw text; each metric normalises it in its own way.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..errors import EvaluationError
from ..io.questions import Question

OCRBENCH_FORMULAS = "Handwritten Mathematical Expression Recognition"  # a category of OCRBench
VQA_ANSWERS = 4  # an answer scores 1 if three others gave it, so fewer than four cannot score 1


# ---- exact match ----


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation or space at either end. Text of punctuation alone stays as it is."""
    text = " ".join(text.lower().split())
    return text.strip(string.punctuation + string.whitespace) or text


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 if the normalised answer is one of the normalised truths, otherwise 0."""
    return float(normalise(answer) in {normalise(t) for t in truths})


# ---- VQA accuracy ----

_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_VQA_ARTICLES = {"a", "an", "the"}
# Contractions get back the apostrophes that they lack
_VQA_CONTRACTIONS = {
    word.replace("'", ""): word
    for word in [
        "ain't",
        "aren't",
        "can't",
        "could've",
        "couldn't",
        "couldn't've",
        "didn't",
        "doesn't",
        "don't",
        "hadn't",
        "hadn't've",
        "hasn't",
        "haven't",
        "he'd",
        "he'd've",
        "he's",
        "how'd",
        "how'll",
        "how's",
        "isn't",
        "it'd",
        "it'd've",
        "it'll",
        "ma'am",
        "mightn't",
        "mightn't've",
        "might've",
        "mustn't",
        "must've",
        "needn't",
        "not've",
        "o'clock",
        "oughtn't",
        "'ow's'at",
        "shan't",
        "she'd've",
        "should've",
        "shouldn't",
        "shouldn't've",
        "somebody'd've",
        "somebody'll",
        "somebody's",
        "someone'd",
        "someone'd've",
        "someone'll",
        "someone's",
        "something'd",
        "something'd've",
        "something'll",
        "that's",
        "there'd",
        "there'd've",
        "there're",
        "there's",
        "they'd",
        "they'd've",
        "they'll",
        "they're",
        "they've",
        "'twas",
        "wasn't",
        "we'd've",
        "we've",
        "weren't",
        "what'll",
        "what're",
        "what's",
        "what've",
        "when's",
        "where'd",
        "where's",
        "where've",
        "who'd",
        "who'd've",
        "who'll",
        "who's",
        "who've",
        "why'll",
        "why're",
        "why's",
        "won't",
        "would've",
        "wouldn't",
        "wouldn't've",
        "y'all",
        "y'all'll",
        "y'all'd've",
        "you'd",
        "you'd've",
        "you'll",
        "you're",
        "you've",
    ]
}


def normalise_vqa(text: str) -> str:
    """The answer normalisation of the VQA challenge (github.com/GT-Vision-Lab/VQA, vqaEval.py).

    A punctuation mark becomes a space, or nothing if it stands beside a space somewhere or the text has a comma between
    digits. Full stops without a digit after them are removed. Then the text is lower-cased, articles are removed,
    number words become digits, and contractions get their apostrophes back.
    """
    text = " ".join(text.split())
    digits_with_comma = re.search(r"\d,\d", text) is not None
    result = text
    for mark in _VQA_PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or digits_with_comma else " ")
    words = re.sub(r"\.(?!\d)", "", result).lower().split()
    words = [_VQA_NUMBERS.get(word, word) for word in words]
    return " ".join(_VQA_CONTRACTIONS.get(word.replace("'", ""), word) for word in words if word not in _VQA_ARTICLES)


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Agreement with people's answers, as the VQA challenge counts it (arXiv 1505.00468; visualqa.org/evaluation.html).

    The mean over all persons of min(others who gave this answer / 3, 1). If k of ten persons gave it: 0, 0.3, 0.6, 0.9,
    1 for k = 0, 1, 2, 3, and 4 or more. Both sides are always normalised, as in TextVQA's evaluation. The code of the
    VQA challenge leaves people's answers as they are if all ten are the same.
    """
    given = [normalise_vqa(t) == normalise_vqa(answer) for t in truths]
    n_given = sum(given)
    return sum(min((n_given - own) / 3, 1.0) for own in given) / len(given)


# ---- POPE ----


def says_yes(answer: str) -> bool:
    """POPE's reading of an answer (github.com/AoiDragon/POPE, evaluate.py).

    The first sentence says no if it has the word "no" or "not", otherwise yes. Here case does not matter, and any white
    space separates words.
    """
    words = answer.strip().split(".")[0].replace(",", "").lower().split()
    return "no" not in words and "not" not in words


def pope_match(answer: str, truths: Sequence[str]) -> float:
    """1 if the answer says what the label says, otherwise 0."""
    return float(says_yes(answer) == says_yes(truths[0]))


@dataclass(frozen=True)
class PopeScores:
    """The figures of POPE, in 0..1, with "yes" as the positive class. None: the divisor is 0."""

    accuracy: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    yes_ratio: float | None

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)


def pope_scores(answers: Sequence[str], labels: Sequence[str]) -> PopeScores:
    """The five figures of POPE (arXiv 2305.10355).

    accuracy = (TP + TN) / n, precision = TP / (TP + FP), recall = TP / (TP + FN), F1 = 2 TP / (2 TP + FP + FN),
    yes ratio = (TP + FP) / n.
    """
    said, true = np.array([says_yes(a) for a in answers], bool), np.array([says_yes(t) for t in labels], bool)
    tp, fp, fn, n = int((said & true).sum()), int((said & ~true).sum()), int((~said & true).sum()), len(said)

    def ratio(a: int, b: int) -> float | None:
        return a / b if b else None

    return PopeScores(
        ratio(n - fp - fn, n),
        ratio(tp, tp + fp),
        ratio(tp, tp + fn),
        ratio(2 * tp, 2 * tp + fp + fn),
        ratio(tp + fp, n),
    )


# ---- DocVQA ----


def anls(answer: str, truths: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest truth, as DocVQA scores it (arXiv 1905.13648, section 4).

    1 - distance / length of the longer text, and 0 where that is below the threshold. Case and the amount of white
    space do not matter. At the threshold itself the similarity counts, as in DocVQA's own evaluation; the paper's
    formula has 0 there.
    """
    said = " ".join(answer.lower().split())
    best = 0.0
    for truth in truths:
        true = " ".join(truth.lower().split())
        longer = max(len(said), len(true))
        best = max(best, 1 - levenshtein(said, true) / longer if longer else 1.0)
    return best if best >= threshold else 0.0


def levenshtein(a: str, b: str) -> int:
    """The least number of characters to insert, delete or replace that turns a into b (Levenshtein, 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


# ---- ChartQA ----


def relaxed_match(answer: str, truths: Sequence[str], tolerance: float = 0.05) -> float:
    """1 if the answer is within 5% of a true number, or is a true text (ChartQA, arXiv 2203.10244, section 5.1).

    Details are those of the evaluation that is in use (pix2struct, metrics.py): a percentage is a hundredth, a true 0
    is compared as text, and so is what is no number; case does not matter there. White space at the ends does not
    count.
    """
    said = answer.strip()
    return float(any(_relaxed(said, truth.strip(), tolerance) for truth in truths))


def _relaxed(said: str, true: str, tolerance: float) -> bool:
    a, b = _number(said), _number(true)
    if a is not None and b:
        return abs(a - b) / abs(b) <= tolerance
    return said.lower() == true.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


# ---- OCRBench ----


def ocr_contains(answer: str, truths: Sequence[str], is_formula: bool = False) -> float:
    """1 if the answer contains a truth (github.com/Yuliang-Liu/MultimodalOCR, OCRBench/example.py).

    Case does not matter, and newlines are spaces. For handwritten formulas case matters and spaces do not.
    """

    def read(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if is_formula else text.lower()

    return float(any(read(truth) in read(answer) for truth in truths))


# ---- multiple choice ----


def choice_match(answer: str, truths: Sequence[str]) -> float:
    """1 if the answer chooses the right option. truths: its letter, and its text if that is known.

    The letter is a capital that stands at the start, alone or before punctuation ("B", "(B)", "B. red"), or after
    "answer", "answer is" or "option". An answer without a letter is right if it is the option's text, by `exact_match`.
    """
    letter = _CHOICE.match(answer.strip())
    if letter is not None:
        return float(next(filter(None, letter.groups())) == truths[0])
    return exact_match(answer, truths[1:])


_CHOICE = re.compile(
    r"[(\[]?([A-Z])(?:[)\].,:;\n]|$)|(?i:(?:the )?(?:correct )?(?:answer(?: is|:)?|option)) *[(\[]?([A-Z])\b"
)


# ---- which one ----

METRICS: dict[str, Callable[[str, Question], float]] = {
    "exact": lambda answer, question: exact_match(answer, question.answers),
    "vqa": lambda answer, question: vqa_accuracy(answer, question.answers),
    "pope": lambda answer, question: pope_match(answer, question.answers),
    "anls": lambda answer, question: anls(answer, question.answers),
    "relaxed": lambda answer, question: relaxed_match(answer, question.answers),
    "ocrbench": lambda answer, question: ocr_contains(answer, question.answers, question.category == OCRBENCH_FORMULAS),
    "choice": lambda answer, question: choice_match(answer, question.answers),
}


def choose_metric(name: str, questions: Sequence[Question]) -> str | None:
    """The metric to use. None if no question has an answer and `name` is "auto".

    "auto" is vqa if every question has several people's answers, pope if each answer is yes or no, otherwise exact.

    Raises:
        EvaluationError: The metric does not fit the answers.
    """
    labelled = [question for question in questions if question.answers]

    def is_vqa(question: Question) -> bool:
        return len(question.answers) >= VQA_ANSWERS

    def is_pope(question: Question) -> bool:
        return {normalise(a) for a in question.answers} in ({"yes"}, {"no"})

    def is_choice(question: Question) -> bool:
        return re.fullmatch("[A-Z]", question.answers[0]) is not None

    if name == "auto":
        if not labelled:
            return None
        return "vqa" if all(map(is_vqa, labelled)) else "pope" if all(map(is_pope, labelled)) else "exact"
    if not labelled:
        raise EvaluationError(
            f"metric {name} needs answers, and no question has one", 'add "answer" to the questions, or use auto'
        )
    needs = {
        "vqa": (is_vqa, f"{VQA_ANSWERS} or more people's answers (usually 10)"),
        "pope": (is_pope, "yes or no as the answer"),
        "choice": (is_choice, "the letter of an option as the first answer"),
    }
    if name in needs:
        fits, wanted = needs[name]
        odd = next((question for question in labelled if not fits(question)), None)
        if odd is not None:
            raise EvaluationError(
                f"metric {name} needs {wanted}, and question {odd.id!r} has {list(odd.answers)}", "use --metric exact"
            )
    return name


# ---- beside the unpruned model ----


def same_answer(answer: str, unpruned: str) -> bool:
    """Whether two answers are the same after `normalise`."""
    return normalise(answer) == normalise(unpruned)


def kl_divergence(unpruned: np.ndarray, pruned: np.ndarray) -> float:
    """KL(p || q) = sum p (log p - log q), in nats, of the softmax of unpruned and pruned logits, (n_vocab,) each.

    Kullback and Leibler (1951). Logits must be finite. It is computed in float64, and bit-identical logits give exactly
    0.
    """
    log_p, log_q = _log_softmax(unpruned), _log_softmax(pruned)
    return float(np.maximum(0.0, np.sum(np.exp(log_p) * (log_p - log_q))))  # rounding may leave -1e-17; NaN stays NaN


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = logits.astype(np.float64) - logits.max()
    log_p: np.ndarray = shifted - np.log(np.exp(shifted).sum())
    return log_p
