"""A decoder from a GGUF file, prompts in which a context stands where an image's tokens would, and answers under
pruning. The layer windows and the choices are the engine's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from gguf.quants import dequantize
from llama_cpp import Llama
from prompts import MAX_ANSWER, PROMPTS, sentence
from tasks import Item

from star_edge.decoder.prefill import DecoderStage, Prefill, prefill
from star_edge.evaluation.metrics import kl_divergence
from star_edge.llamacpp.context import MAIN, DecoderContext, tapped_context
from star_edge.llamacpp.tap import AttentionRead, Plan
from star_edge.pruning.selection import Selection
from star_edge.rows import Rows, Segment

# (tokens, number of tokens of the answer before them, cell and position of its first) -> logits after each
Step = Callable[[list[int], int, tuple[int, int]], list[np.ndarray]]


@dataclass
class Prompt:
    """The rows of a question: text, context (segment 1, image 0), text."""

    segments: list[Segment]
    n_rows: int
    n_context: int
    leads: list[list[int]]  # tokens that begin the second sentence of the answer, and so on
    pieces: list[tuple[int, int]]  # (first, end) characters of each context row

    def rows_of(self, spans: Sequence[tuple[int, int]]) -> np.ndarray:
        """Mask of context rows that share a character other than white space at their ends with a span, (n,) bool."""
        return np.array([any(a < end and b > first for first, end in spans) for a, b in self.pieces])


@dataclass
class Reply:
    """A greedy answer.

    Attributes:
        parts: Tokens of each sentence, as the model said them.
        said: What the model said at each step, None where the lead of a sentence was given.
        fed: What was decoded at each step: another token where a lead took the place of the end of a sentence.
        part: Index of the sentence at each step.
        logits: Distribution of each step, one more than `fed`.
        text: The sentences.
        kl: KL divergence of the first token's distribution from the unpruned one, in nats.
        kl_answer: Mean of it over what the unpruned model said, each given those before.
        in_place: As in Prefill.
        selections: Context rows that stayed, for each decoder stage.
    """

    parts: list[list[int]]
    said: list[int | None]
    fed: list[int]
    part: list[int]
    logits: list[np.ndarray]
    text: str = ""
    kl: float = 0.0
    kl_answer: float = 0.0
    in_place: bool = True
    selections: list[Selection] = field(default_factory=list)

    def until(self, step: int, logits: list[np.ndarray]) -> Reply:
        """The same steps before `step`, with the logits of another run."""
        parts: list[list[int]] = [[] for _ in range(self.part[step] + 1)]
        for said, part in zip(self.said[:step], self.part):
            if said is not None:
                parts[part].append(said)
        return Reply(parts, self.said[:step], self.fed[:step], self.part[:step], logits[: step + 1])


class RealDecoder:
    """A decoder. Not for several threads."""

    def __init__(self, path: Path, n_threads: int = 1) -> None:
        self.path = path
        self.llama = Llama(
            str(path),
            n_ctx=1024,
            n_batch=512,
            n_ubatch=512,
            n_threads=n_threads,
            n_threads_batch=n_threads,
            verbose=False,
        )
        self.owner = tapped_context(self.llama)
        self.context = DecoderContext(self.llama, self.owner.tap)
        self.n_layers, self.n_heads = self.context.n_layers, self.context.n_heads
        self.architecture = self.llama.metadata["general.architecture"]
        self.prompt = PROMPTS[self.architecture]
        tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
        self._embedding = (tensor.data, tensor.tensor_type)
        # llama.cpp multiplies embeddings by this that it looks up, not those it is given (src/models/gemma3.cpp)
        self.embedding_scale = float(np.sqrt(self.context.n_embd)) if self.architecture.startswith("gemma") else 1.0

    def tokenize(self, text: str, is_first: bool = False) -> np.ndarray:
        return np.array(self.llama.tokenize(text.encode(), add_bos=is_first, special=True), np.int32)

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        data, kind = self._embedding
        rows: np.ndarray = dequantize(data[tokens], kind).astype(np.float32)
        return rows * np.float32(self.embedding_scale)

    def text_of(self, tokens: Sequence[int]) -> str:
        vocab = self.llama._model.vocab
        buffer = bytearray()
        for token in tokens:
            piece = llama_cpp.ctypes.create_string_buffer(64)
            n = llama_cpp.llama_token_to_piece(vocab, int(token), piece, 64, 0, True)
            buffer += piece.raw[:n]
        return buffer.decode(errors="replace")

    def read(self, item: Item) -> Prompt:
        """The rows of an item's prompt."""
        before, after = self.prompt
        texts = (before, item.context, after.format(question=item.question, lead=item.leads[0]))
        parts = [self.tokenize(text, is_first=i == 0) for i, text in enumerate(texts)]
        if not len(parts[0]):
            raise ValueError("the prompt begins with the context: the model has no token to put before it")
        edges = np.cumsum([0] + [len(p) for p in parts])
        positions = [np.arange(a, b, dtype=np.int32) for a, b in pairwise(edges)]
        segments = [
            Segment(Rows(positions[0], tokens=parts[0])),
            Segment(Rows(positions[1], embeddings=self.embed(parts[1])), image=0),
            Segment(Rows(positions[2], tokens=parts[2])),
        ]
        pieces, at = [], 0
        for token in parts[1]:
            piece = self.text_of([token])
            pieces.append((at + len(piece) - len(piece.lstrip()), at + len(piece)))
            at += len(piece)
        if self.text_of(parts[1]) != item.context:
            raise ValueError(f"tokens of {item.name} spell another context")
        return Prompt(
            segments, int(edges[-1]), len(parts[1]), [self.tokenize(x).tolist() for x in item.leads[1:]], pieces
        )

    # ---- prompts ----

    def attention(self, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
        """Attention of the rows after the context, unpruned: (n_layers, n_heads, n_text, n_context) float32; and the
        logits of the last row.
        """
        self.context.clear()
        self.owner.forget_prompt()
        at = 0
        for i, segment in enumerate(prompt.segments):
            n, is_last = len(segment.rows), i == len(prompt.segments) - 1
            plan = Plan(want_cells=True)
            if is_last:
                plan.attention = AttentionRead(
                    list(range(self.n_layers)), 1024, (0, n, 1), 0, max_rows=n, max_heads=self.n_heads
                )
            outcome = self.context.decode(segment.rows, at, plan, "attention", logits=is_last)
            if outcome.cells is None or not np.array_equal(outcome.cells, np.arange(at, at + n)):
                raise RuntimeError("rows are not in the cells that they are looked for in")
            at += n
        first = len(prompt.segments[0].rows)
        read = np.stack([a[..., first : first + prompt.n_context] for a in outcome.attention])
        return read, self.context.logits()

    def prefill(self, prompt: Prompt, stage: DecoderStage | None) -> Prefill:
        """The engine's prefill. Prompts of one item share what can be shared (decoder/reuse.py)."""
        self.owner.end_prompt()
        return prefill(self.context, prompt.segments, prompt.n_rows, stage, keep=True)

    def answer(self, prompt: Prompt, stage: DecoderStage | None, unpruned: Reply | None = None) -> Reply:
        """The greedy answer, up to the end of its sentence or line, and its distance from the unpruned one."""
        state = self.prefill(prompt, stage)
        reply = self._answer(prompt, state.logits, (state.n_cells, prompt.n_rows), unpruned, self._next)
        return replace(reply, in_place=state.in_place, selections=[s[0] for s in state.selections])

    def _answer(
        self, prompt: Prompt, first: np.ndarray, at: tuple[int, int], unpruned: Reply | None, step: Step
    ) -> Reply:
        """The answer after a prompt whose last row has the logits `first`. at: its first cell and position."""
        reply = Reply([[]], [], [], [], [first])
        if unpruned is None:
            self._generate(reply, prompt, at, step)
            return reply
        logits = [first, *step(unpruned.fed, 0, at)]
        steps = [i for i, said in enumerate(unpruned.said) if said is not None]
        kl = [kl_divergence(unpruned.logits[i], logits[i]) for i in steps]
        other = next((i for i in steps if int(logits[i].argmax()) != unpruned.said[i]), None)
        if other is None:
            reply = replace(unpruned, logits=logits)
        else:  # another answer: it goes on from the first token that differs
            reply = unpruned.until(other, logits)
            self.context.remove(MAIN, at[0] + other)
            self._generate(reply, prompt, at, step)
        return replace(reply, kl=kl[0], kl_answer=float(np.mean(kl)))

    def answer_seen_below(
        self, prompt: Prompt, stages: Sequence[tuple[int, Selection]], unpruned: Reply | None = None
    ) -> Reply:
        """As `answer`, but the answer's tokens see each dropped row in the layers below the stage that dropped it.

        stages: (layer K, what stayed, as indices into the context's rows) of each decoder stage.

        The rows that go on from a stage are decoded into further cells, so each window of layers has cells of its own
        for the prompt's rows. A token of the answer has one cell and a decode for each window, in which the cells of
        other windows are hidden by a bias of -inf. It is the definition, step by step; an engine would do it in one
        decode, with a mask that changes at layer K.
        """
        context, n_layers = self.context, self.n_layers
        self.owner.kv_cache_clear()
        n_prefix, n_text = len(prompt.segments[0].rows), len(prompt.segments[2].rows)
        context.decode(prompt.segments[0].rows, 0, Plan(), "prefix")
        edges = [0, *(layer for layer, _ in stages), n_layers]
        live = [np.arange(prompt.n_context), *(selection.kept for _, selection in stages)]
        starts = n_prefix + np.cumsum([0] + [len(rows) + n_text for rows in live])
        biases = []
        for w, (_, selection) in enumerate([(0, Selection(live[0])), *stages]):
            bias = np.full(starts[-1], -np.inf, np.float32)
            bias[:n_prefix] = bias[starts[w] : starts[w + 1]] = 0
            if selection.mass is not None:
                bias[starts[w] : starts[w] + len(live[w])] = np.log(selection.mass)
            biases.append(bias)
        hidden = np.empty((0, 0), np.float32)
        for w, (first, last) in enumerate(pairwise(edges)):
            context.tap.set_cell_bias(biases[w])
            end = np.empty((len(live[w]) + n_text, context.n_embd), np.float32) if last < n_layers else None
            parts = [prompt.segments[1].rows.take(live[w]), prompt.segments[2].rows]
            at = int(starts[w])
            # below the first stage as stock llama.cpp decodes them, then joined, as the engine does
            for rows in parts if w == 0 else [context.join(parts)]:
                own = slice(at - int(starts[w]), at - int(starts[w]) + len(rows))
                plan = Plan(window=(first, last, n_layers), want_cells=True)
                plan.hidden = None if end is None else end[own]
                if w:
                    plan.inject = hidden[np.append(np.searchsorted(live[w - 1], live[w]), n_text_rows(hidden, n_text))]
                outcome = context.decode(rows, at, plan, "prompt", logits=end is None)
                if not np.array_equal(outcome.cells, np.arange(at, at + len(rows))):
                    raise RuntimeError(f"rows are in cells {outcome.cells}, not from {at} on")
                at += len(rows)
            hidden = end if end is not None else hidden

        def step(tokens: list[int], n_before: int, at: tuple[int, int]) -> list[np.ndarray]:
            if not tokens:
                return []
            rows, cell = _answer_rows(tokens, n_before, at)
            states: np.ndarray | None = None
            for w, (first, last) in enumerate(pairwise(edges)):
                context.remove(MAIN, cell)
                context.tap.set_cell_bias(biases[w])
                plan = Plan(window=(first, last, n_layers), inject=states, want_cells=True)
                if last == n_layers:
                    break
                states = plan.hidden = np.empty((len(tokens), context.n_embd), np.float32)
                context.decode(rows, cell, plan, "answer")
            return self._decode(rows, cell, plan)

        at = (int(starts[-1]), prompt.n_rows)
        reply = self._answer(prompt, context.logits(), at, unpruned, step)
        return replace(reply, selections=[selection for _, selection in stages])

    def _generate(self, reply: Reply, prompt: Prompt, at: tuple[int, int], step: Step) -> None:
        """Goes on with an answer until all its sentences have ended."""
        while True:
            said = int(reply.logits[-1].argmax())
            reply.parts[-1].append(said)
            reply.said.append(said)
            reply.part.append(len(reply.parts) - 1)
            feed = [said]
            if self._ends(reply.parts[-1]):
                if len(reply.parts) > len(prompt.leads):
                    break
                feed = prompt.leads[len(reply.parts) - 1]
                reply.said += [None] * (len(feed) - 1)
                reply.part += [len(reply.parts) - 1] * (len(feed) - 1)
                reply.parts.append([])
            reply.logits += step(feed, len(reply.fed), at)
            reply.fed += feed
        reply.text = " /".join(sentence(self.text_of(part)) for part in reply.parts)

    def _ends(self, tokens: Sequence[int]) -> bool:
        if llama_cpp.llama_vocab_is_eog(self.llama._model.vocab, tokens[-1]) or len(tokens) == MAX_ANSWER:
            return True
        text = self.text_of(tokens)
        return sentence(text) != text

    def _next(self, tokens: list[int], n_before: int, at: tuple[int, int]) -> list[np.ndarray]:
        rows, cell = _answer_rows(tokens, n_before, at)
        return self._decode(rows, cell, Plan())

    def _decode(self, rows: Rows, cell: int, plan: Plan) -> list[np.ndarray]:
        """Logits of every row."""
        if not len(rows):
            return []
        self.context.all_logits = True
        try:
            outcome = self.context.decode(rows, cell, plan, "answer", logits=True)
        finally:
            self.context.all_logits = False
        if plan.want_cells and not np.array_equal(outcome.cells, np.arange(cell, cell + len(rows))):
            raise RuntimeError(f"rows are in cells {outcome.cells}, not from {cell} on")
        shape = (self.context.n_vocab,)
        pointers = [llama_cpp.llama_get_logits_ith(self.llama.ctx, i) for i in range(len(rows))]
        return [np.ctypeslib.as_array(pointer, shape).copy() for pointer in pointers]


def n_text_rows(hidden: np.ndarray, n_text: int) -> np.ndarray:
    """Indices of the last n_text rows."""
    return np.arange(len(hidden) - n_text, len(hidden))


def _answer_rows(tokens: list[int], n_before: int, at: tuple[int, int]) -> tuple[Rows, int]:
    """Tokens of the answer as rows, and the cell of the first. at: cell and position of the answer's first token."""
    cell, position = (first + n_before for first in at)
    positions = np.arange(position, position + len(tokens), dtype=np.int32)
    return Rows(positions, tokens=np.array(tokens, np.int32)), cell


def is_right(answer: str, item: Item) -> bool:
    """Whether the answer has the values as words, in their order."""
    at = 0
    for value in item.answers:
        match = re.compile(rf"\b{re.escape(value)}\b").search(answer, at)
        if match is None:
            return False
        at = match.end()
    return True
