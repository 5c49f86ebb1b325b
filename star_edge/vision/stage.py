"""The vision stage: encodes each image, and keeps the tokens that say most about it.

Turns the chunks of a prompt into the segments that the decoder runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from ..pruning import budget
from ..pruning.blas import spread
from ..pruning.choose import Candidates, Policy, at_once, choose, divide, prepare, vision_policy
from ..pruning.config import Keep, PruneConfig, keep_count
from ..pruning.representatives import merge
from ..pruning.selection import Selection, Tokens
from ..rows import Rows, Segment
from ..stopwatch import Stopwatch
from .chunks import Encoded, ImageChunk, TextChunk
from .encoder import VisionEncoder


@dataclass
class StagedImage:
    """An image after the vision stage.

    Attributes:
        chunk: The image, unchanged.
        encoded: The encoder's output, unchanged.
        selection: What stayed of its tokens.
    """

    chunk: ImageChunk
    encoded: Encoded
    selection: Selection


@dataclass(frozen=True)
class Room:
    """What the decoder has room for.

    Attributes:
        n_cells: Sizes of a prompt, in KV cells, above which it loses something. The smallest one holds into which what
            the vision stage keeps at least fits.
        n_batch: Rows that are processed at once at most.
    """

    n_cells: Sequence[int] = ()
    n_batch: int | None = None

    def fill(self, images: Sequence[ImageChunk], least: list[int], most: list[int], n_text: int) -> list[int]:
        """Tokens of each image that the vision stage may leave: between `least` and `most`, as far as there is room."""
        most = self.at_once(images, least, most)
        taken = n_text + sum(least)
        free = next((n - taken for n in sorted(self.n_cells) if n >= taken), 0) if self.n_cells else sum(most)
        return _spread(free, least, most)

    def at_once(self, images: Sequence[ImageChunk], least: Sequence[int], most: Sequence[int]) -> list[int]:
        """`most`, lowered where all of an image's rows are processed at once, but not below `least`."""
        if self.n_batch is None:
            return list(most)
        return [n if image.causal else min(n, max(first, self.n_batch)) for image, first, n in zip(images, least, most)]


def _spread(free: int, least: list[int], most: Sequence[int]) -> list[int]:
    """`least`, and up to `free` more in all, in proportion to what is missing to `most`."""
    dropped = [n - first for first, n in zip(least, most)]
    if free < np.count_nonzero(dropped):
        return least
    more = budget.in_proportion(min(free, sum(dropped)), dropped)
    return [first + n for first, n in zip(least, more)]


@dataclass
class PromptPlan:
    """What a prompt will take, before any of it is decoded.

    Within a group only the sums of `n_vision` and of `windows` are fixed. They are divided by size here, and anew once
    the images are encoded.

    Attributes:
        chunks: The prompt.
        config: What is done, or None for no pruning.
        groups: Indices of images that share a budget: the crops of each picture, the frames of each video, or all
            images.
        n_special: Special tokens of each image. If no profile tells them, they are known once the image is encoded.
        n_encoder: Tokens of each image that leave the encoder, special ones included: at most that many before the
            images are encoded, for of some of them more can be left out than was asked for, or only fewer, and an
            encoder stage may adapt to the picture.
        n_encoder_least: Tokens of each image that the encoder stage leaves at least. `n_encoder` unless it adapts.
        n_vision: Tokens of each image that the vision stage leaves, special ones included: at most that many if it
            adapts to the picture.
        n_least: Tokens of each image that the vision stage leaves at least. `n_vision` unless it adapts to the picture.
        windows: (layer K, tokens of each image that stay from there on) of each decoder stage. At most that many if the
            vision stage adapts to the picture.
        n_text: Text tokens of the prompt.
        room: What the decoder has room for.
        look_ahead: As in decoder.prefill.DecoderStage.
    """

    chunks: Sequence[TextChunk | ImageChunk]
    config: PruneConfig | None
    groups: list[list[int]]
    n_special: list[int]
    n_encoder: list[int]
    n_encoder_least: list[int]
    n_vision: list[int]
    n_least: list[int]
    windows: list[tuple[int, list[int]]]
    n_text: int
    room: Room
    look_ahead: tuple[int, int] | None = None

    @property
    def images(self) -> list[ImageChunk]:
        return [c for c in self.chunks if isinstance(c, ImageChunk)]

    @property
    def n_cells(self) -> int:
        """KV cells that the prompt takes at most, which is during the probe."""
        return self.n_text + sum(self.n_vision)

    def most_of(
        self, group: Sequence[int], least: list[int], planned: Sequence[int], left: Sequence[int], *, to_decoder: bool
    ) -> list[int]:
        """Tokens that each image of a group may keep at most, once the group's budget is divided.

        Together they are no more than planned: what one image does not take, another may.

        Args:
            group: Indices of the images.
            least: Tokens that each of them keeps at least.
            planned: `n_encoder` or `n_vision`.
            left: Tokens that each of them has.
            to_decoder: The decoder reads what stays. False: the vision stage comes first, and makes it fit.
        """
        free = sum(planned[i] for i in group) - sum(least)
        images = self.images
        most = self.room.at_once([images[i] for i in group], least, left) if to_decoder else left
        return _spread(max(0, free), least, most)


def plan_prompt(
    chunks: Sequence[TextChunk | ImageChunk],
    config: PruneConfig | None,
    windows: Sequence[tuple[int, Keep]],
    encoded: Sequence[Encoded] | None = None,
    room: Room = Room(),
) -> PromptPlan:
    """Counts what each stage leaves. At least one ordinary token of each image stays, and all special ones.

    Args:
        chunks: The prompt.
        config: What is done, or None for no pruning.
        windows: (layer, keep) of the decoder stages that are possible.
        encoded: The images, if they are encoded already.
        room: What a stage that adapts to the picture may fill.

    Raises:
        ConfigError: A count is over an image's tokens.
    """
    images = [chunk for chunk in chunks if isinstance(chunk, ImageChunk)]
    n_special = [0 if i.special is None else int(i.special.sum()) for i in (images if encoded is None else encoded)]
    pictures: dict[int, list[int]] = {}
    for i, image in enumerate(images):
        alone = config is not None and config.budget == "crop"
        pictures.setdefault(i if alone else image.picture, []).append(i)
    groups = list(pictures.values())
    if config is not None and config.budget == "image":
        groups = _join_frames(groups, images)
    elif config is not None and config.budget == "prompt" and images:
        groups = [list(range(len(images)))]
    n_vision = left = [image.n_tokens for image in images] if encoded is None else [len(e.tokens) for e in encoded]

    def keep_of(name: str, keep: Keep, left: list[int]) -> list[int]:
        kept = [0] * len(images)
        for crops in pictures.values():
            sizes = [images[i].n_tokens for i in crops]
            special = [n_special[i] for i in crops]
            n_crops = sum(size > n for size, n in zip(sizes, special))  # each keeps at least one
            total = max(keep_count(name, keep, sum(sizes), sum(special)) - sum(special), n_crops)
            ordinary = [left[i] - n_special[i] for i in crops]
            shares = budget.in_proportion(min(total, sum(ordinary)), ordinary)
            for i, n in zip(crops, shares):
                kept[i] = n_special[i] + n
        return kept

    n_text = sum(len(c.tokens) for c in chunks if isinstance(c, TextChunk))
    n_encoder_least = left
    if config is not None and encoded is None:
        n_encoder_least = keep_of("encoder_keep", config.encoder_keep, left)
        if not config.encoder_adapts:
            left = n_encoder_least
        elif not config.prunes_in_vision:  # which would make what stays fit
            left = room.fill(images, n_encoder_least, left, n_text)
    n_encoder = n_least = n_vision = left
    if config is not None:
        n_least = n_vision = left = keep_of("vision_keep", config.vision_keep, left)
        if config.adapts_to_picture:
            n_vision = left = room.fill(images, n_least, n_encoder, n_text)
    counts = []
    for layer, keep in windows:
        left = keep_of("decoder_keep", keep, left)
        counts.append((layer, left))
    return PromptPlan(
        chunks, config, groups, n_special, n_encoder, n_encoder_least, n_vision, n_least, counts, n_text, room
    )


def _join_frames(groups: Sequence[list[int]], images: Sequence[ImageChunk]) -> list[list[int]]:
    """The groups, with those of one video's frames as one."""
    joined: dict[tuple[str, int], list[int]] = {}
    for crops in groups:
        first = images[crops[0]]
        key = ("picture", first.picture) if first.video is None else ("video", first.video)
        joined.setdefault(key, []).extend(crops)
    return list(joined.values())


def encode_images(
    images: Sequence[ImageChunk], encoder: VisionEncoder | None, config: PruneConfig | None, watch: Stopwatch
) -> list[Encoded]:
    """Encodes the images whose output is not cached. Steps: "encode"; "vision_stage", as far as attention is read.

    Raises:
        EngineError: the encoder failed.
    """
    if not images:
        return []
    assert encoder is not None  # which made the images
    attention = config.encoder_attention if config is not None else None
    with watch.step("encode"):
        encoded = [encoder.encode_once(image, attention, want_cells=config is not None) for image in images]
        watch.take("vision_stage", sum(e.score_seconds for e in encoded))
    return encoded


class Ahead:
    """Works out what choosing needs of an image's vectors while a GPU encodes the next one: most of the stage's work.

    What is chosen does not depend on it. Leave the block before the images go.

    Args:
        plan: The prompt's plan.
        n_threads: Threads that it may take.
    """

    def __init__(self, plan: PromptPlan, n_threads: int) -> None:
        self._plan, self._n_threads = plan, n_threads
        self._pool = ThreadPoolExecutor(1)
        self._begun: dict[int, tuple[Encoded, Future[np.ndarray]]] = {}

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self, number: int, encoded: Encoded) -> None:
        """Begins with an image. number: its index among the prompt's images."""
        if encoded.cached or encoded.same_as is not None:  # the encoder has not run, nor was there time
            return
        image, policy = _candidates(self._plan, number, encoded), _policy(self._plan, encoded)
        if policy is None or not policy.needs_distances or self._plan.n_least[number] >= len(image.tokens):
            return

        def unit_vectors() -> np.ndarray:
            prepare([(policy, image)], self._n_threads)
            return image.tokens.unit_vectors

        self._begun[number] = encoded, self._pool.submit(unit_vectors)

    def unit_vectors(self, number: int, encoded: Encoded) -> np.ndarray | None:
        """`Tokens.unit_vectors` of an image, once they are there; None if nobody works them out.

        Raises:
            EngineError: The model computed NaN or infinity.
        """
        begun, vectors = self._begun.get(number, (None, None))
        return vectors.result() if vectors is not None and begun is encoded else None


def run_vision_stage(
    plan: PromptPlan,
    encoded: Sequence[Encoded],
    mrope: bool,
    watch: Stopwatch,
    n_threads: int = 1,
    ahead: Ahead | None = None,
) -> tuple[list[Segment], list[StagedImage], int]:
    """Prunes each image after the encoder.

    Args:
        plan: The prompt's plan.
        encoded: Its images, encoded.
        mrope: Whether the decoder takes M-RoPE positions, (4, n).
        watch: Counts the time as "vision_stage" if there are images.
        n_threads: Threads that choosing may take. They choose the same as one.
        ahead: What has been begun meanwhile, or None.

    Returns:
        The segments for the decoder, the images with what stayed of them, and the RoPE position after the prompt.
    """
    with watch.step("vision_stage") if encoded else nullcontext():
        return _run_vision_stage(plan, encoded, mrope, n_threads, ahead)


def _run_vision_stage(
    plan: PromptPlan, encoded: Sequence[Encoded], mrope: bool, n_threads: int, ahead: Ahead | None
) -> tuple[list[Segment], list[StagedImage], int]:
    config = plan.config
    chosen = _choose(plan, encoded, n_threads, ahead)
    segments: list[Segment] = []
    staged: list[StagedImage] = []
    position = 0
    for chunk in plan.chunks:
        if isinstance(chunk, TextChunk):
            n = len(chunk.tokens)
            if n:
                segments.append(Segment(Rows(_text_positions(position, n, mrope), tokens=chunk.tokens)))
            position += n
            continue
        i = len(staged)
        tokens, (selection, embeddings) = encoded[i].tokens, chosen[i]
        selection = _of_image(selection, tokens, chunk.n_tokens)
        kept = selection.kept
        positions, n_positions = chunk.positions_at(position)[..., kept], chunk.n_positions
        if config is not None and config.positions == "renumbered" and len(kept) < chunk.n_tokens:
            positions, n_positions = _text_positions(position, len(kept), mrope), len(kept)
        rows, pruned = Rows(positions, embeddings=embeddings), len(kept) < chunk.n_tokens
        segments.append(Segment(rows, i, chunk.causal, selection.mass, pruned))
        staged.append(StagedImage(chunk, encoded[i], selection))
        position += n_positions
    return segments, staged, position


def _candidates(plan: PromptPlan, number: int, encoded: Encoded) -> Candidates:
    """The tokens of an image that left the encoder. number: its index among the prompt's images."""
    chunk = plan.images[number]
    return Candidates(
        Tokens(encoded.embeddings, encoded.cells[encoded.tokens], chunk.grid, encoded.mass, attention=encoded.scores),
        None if encoded.special is None else encoded.special[encoded.tokens],
        chunk.picture,
        chunk.n_tokens - plan.n_special[number],
    )


def _policy(plan: PromptPlan, encoded: Encoded) -> Policy | None:
    """How the stage chooses from an image."""
    return None if plan.config is None else vision_policy(plan.config, encoded.scores is not None)


def _choose(
    plan: PromptPlan, encoded: Sequence[Encoded], n_threads: int, ahead: Ahead | None
) -> list[tuple[Selection, np.ndarray]]:
    """What stays of the tokens that left the encoder, and its embeddings, for each image."""
    candidates = [_candidates(plan, i, e) for i, e in enumerate(encoded)]
    policies = [_policy(plan, e) for e in encoded]
    for i, (image, e) in enumerate(zip(candidates, encoded)):
        vectors = None if ahead is None else ahead.unit_vectors(i, e)
        if vectors is not None:
            image.tokens.unit_vectors = vectors
    losing = zip(policies, candidates, plan.n_least)
    prepare([(policy, c) for policy, c, n in losing if policy is not None and n < len(c.tokens)], n_threads)
    n_keep = _divide(plan, candidates, n_threads)
    n_most = list(n_keep)
    for group in plan.groups:
        least, left = ([numbers[i] for i in group] for numbers in (n_keep, [len(c.tokens) for c in candidates]))
        for i, n in zip(group, plan.most_of(group, least, plan.n_vision, left, to_decoder=True)):
            n_most[i] = n

    n_images, of_each = at_once([c for n, c in zip(n_keep, candidates) if n < len(c.tokens)], n_threads)

    def of_image(i: int) -> tuple[Selection, np.ndarray]:
        image, policy = candidates[i], policies[i]
        n = len(image.tokens)
        if policy is None or n_keep[i] == n:
            return Selection(np.arange(n), encoded[i].mass), encoded[i].embeddings
        selection = choose(policy, image, n_keep[i] - plan.n_special[i], n_most[i] - plan.n_special[i], of_each)
        return selection, merge(encoded[i].embeddings, selection, of_each)

    return spread(of_image, range(len(candidates)), n_images)


def _of_image(selection: Selection, tokens: np.ndarray, n_tokens: int) -> Selection:
    """A selection of the tokens that left the encoder as one of all n_tokens. Others have the score 0."""
    if len(tokens) == n_tokens:
        return selection
    scores = None
    if selection.scores is not None:
        scores = np.zeros(n_tokens, np.float32)
        scores[tokens] = selection.scores
    return Selection(tokens[selection.kept], selection.mass, None, scores, selection.too_few)


def _divide(plan: PromptPlan, candidates: Sequence[Candidates], n_threads: int) -> list[int]:
    """Tokens of each image that stay at least, special ones included: the plan's counts, with shared budgets divided
    anew.
    """
    n_keep = list(plan.n_least)
    for group in plan.groups:
        images = [candidates[i] for i in group]
        if len(group) > 1 and any(n_keep[i] < len(candidates[i].tokens) for i in group):
            assert plan.config is not None  # without one everything stays
            policy = vision_policy(plan.config, all(image.tokens.attention is not None for image in images))
            total = sum(n_keep[i] - plan.n_special[i] for i in group)
            for i, n in zip(group, divide(policy, images, total, n_threads)):
                n_keep[i] = plan.n_special[i] + n
    return n_keep


def _text_positions(start: int, n: int, mrope: bool) -> np.ndarray:
    positions = np.arange(start, start + n, dtype=np.int32)
    return np.stack([positions] * 3 + [np.zeros_like(positions)]) if mrope else positions
