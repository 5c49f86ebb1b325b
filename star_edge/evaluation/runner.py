"""Asks every question with every config. Records answer, score, tokens, time and distance from the unpruned model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from llama_cpp import LogitsProcessorList

from ..answers import Answer
from ..engine import StarVLM
from ..errors import EngineError, StarEdgeError
from ..io.images import load_image
from ..io.questions import Question
from ..pruning.config import PruneConfig, choose_layer
from .configs import OFF, NamedConfig
from .metrics import METRICS, kl_divergence
from .results import Records


def ask_questions(
    vlm: StarVLM,
    questions: Sequence[Question],
    configs: Sequence[NamedConfig],
    results: Records,
    *,
    metric: str | None,
    max_tokens: int,
    prompt_suffix: str = "",
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Asks for what is missing in `results`, with greedy answers.

    The unpruned model and the configs are treated alike. Each reads the first question once before it is timed. `order`
    says who is asked when, anew for each question. Answers before the unpruned model's are recorded once its logits are
    known. If an earlier run has answered the question unpruned, its prompt is read again, because times are compared
    within one pass only. Images are loaded before the clock starts. A question that fails is recorded with its error,
    and the run goes on.

    Args:
        vlm: The engine.
        questions: The questions.
        configs: The configs.
        results: Records so far, and where new ones go.
        metric: A name in `metrics.METRICS`, or None without answers.
        max_tokens: Most tokens of an answer.
        prompt_suffix: Text after each question.
        progress: Called with the number of (question, config) pairs that are done.

    Raises:
        ConfigError: A config names a layer that the model does not have.
    """
    for config in configs:
        if config.prune is not None and config.prune.decoder_layer is not None:
            choose_layer(config.prune.decoder_layer, vlm.decoder.n_layers)
    pruned = [c for c in configs if c.prune is not None]
    warm = False
    for i, question in enumerate(questions):
        pending = [c for c in configs if not results.done(question, c)]
        progress(len(configs) - len(pending))
        if not pending:
            continue
        try:
            pictures = [load_image(image, vlm.image_limits) for image in question.sources]
        except StarEdgeError as error:
            for config in pending:
                results.add(question, config, error=str(error))
            progress(len(pending))
            continue
        prompt = question.prompt + prompt_suffix
        if not warm:  # the first requests allocate and page in
            for config in (OFF, *pruned):
                _try_to_read(vlm, prompt, pictures, config.prune)
            warm = True
        pass_ = _Pass(vlm, question, prompt, pictures, results, metric, max_tokens)
        everyone = [OFF, *pruned]
        for config in (everyone[place] for place in order(len(everyone), i)):
            if config in pending:
                pass_.ask(config)
                progress(1)
            elif config == OFF:
                pass_.read_unpruned()


def order(n_sides: int, repeat: int) -> list[int]:
    """The order of the sides in a repeat. Each begins in turn, and every other repeat runs backwards, so that no side
    always follows the same one.
    """
    step = -1 if repeat % 2 else 1
    return [(repeat + step * i) % n_sides for i in range(n_sides)]


class _Pass:
    """One question, and the unpruned model's first logits and time for it, once known."""

    def __init__(
        self,
        vlm: StarVLM,
        question: Question,
        prompt: str,
        pictures: list[np.ndarray],
        results: Records,
        metric: str | None,
        max_tokens: int,
    ) -> None:
        self.vlm, self.question, self.prompt, self.pictures, self.results = vlm, question, prompt, pictures, results
        self.metric, self.max_tokens = metric, max_tokens
        self.logits: np.ndarray | None = None
        self.milliseconds: float | None = None
        self._before: (
            list[tuple[NamedConfig, Answer, np.ndarray]] | None
        ) = []  # answers that wait for the unpruned model's logits

    def read_unpruned(self) -> None:
        read = _try_to_read(self.vlm, self.prompt, self.pictures, None)
        if read is not None:
            self.logits, self.milliseconds = read
        self._record_before()

    def ask(self, config: NamedConfig) -> None:
        try:
            answer, logits = _generate(self.vlm, self.prompt, self.pictures, config.prune, self.max_tokens)
        except StarEdgeError as error:
            self.results.add(self.question, config, error=str(error))
            if config == OFF:
                self._record_before()
            return
        if config == OFF:
            self.logits, self.milliseconds = logits, answer.report.milliseconds["first_token"]
            self._record_before()
        if self._before is None:
            self._record(config, answer, logits)
        else:
            self._before.append((config, answer, logits))

    def _record_before(self) -> None:
        before, self._before = self._before or [], None
        for answered in before:
            self._record(*answered)

    def _record(self, config: NamedConfig, answer: Answer, logits: np.ndarray) -> None:
        report = answer.report
        score = METRICS[self.metric](answer.text, self.question) if self.metric and self.question.answers else None
        self.results.add(
            self.question,
            config,
            answer=answer.text,
            finish_reason=answer.finish_reason,
            score=score,
            image_tokens=report.n_image_tokens,
            average_tokens=report.average_tokens,
            first_token_ms=report.milliseconds["first_token"],
            unpruned_first_token_ms=self.milliseconds,
            kl=None if self.logits is None else kl_divergence(self.logits, logits),
            notes=report.notes,
        )


def _generate(
    vlm: StarVLM, prompt: str, pictures: list[np.ndarray], prune: PruneConfig | None, max_tokens: int
) -> tuple[Answer, np.ndarray]:
    """The greedy answer, and the logits of its first token before any sampler, (n_vocab,) float32.

    Raises:
        EngineError: The logits are not all finite. Neither the answer nor the divergence would then mean anything.
    """
    first: list[np.ndarray] = []

    def keep_first(_: object, logits: np.ndarray) -> np.ndarray:
        if not first:
            first.append(np.array(logits, np.float32))
        return logits

    answer = vlm.generate(prompt, pictures, prune, max_tokens, logits_processor=LogitsProcessorList([keep_first]))
    if not np.isfinite(first[0]).all():
        raise EngineError("the logits of the first token are not all finite", "check the model and its KV cache type")
    return answer, first[0]


def _try_to_read(
    vlm: StarVLM, prompt: str, pictures: list[np.ndarray], prune: PruneConfig | None
) -> tuple[np.ndarray, float] | None:
    """First logits, and milliseconds to them. None: the prompt cannot be read (`_Pass.ask` records why)."""
    try:
        state, report = vlm.read_prompt(prompt, pictures, prune)
    except StarEdgeError:
        return None
    return np.array(state.logits, np.float32), report.milliseconds["first_token"]
