"""How the decoder stages of a prompt choose among the image rows that they see.

`decoder.prefill` runs the stages and knows rows; `vision.stage` knows which tokens of which image these are.
"""

from __future__ import annotations

from collections.abc import Sequence

from .decoder.prefill import DecoderStage, Seen
from .errors import ConfigError
from .llamacpp.context import DecoderContext
from .pruning.choose import Candidates, choose, decoder_policy, divide, prepare
from .pruning.config import look_ahead_layers
from .pruning.selection import Tokens, with_neighbours
from .vision.stage import PromptPlan, StagedImage

# What a token that touches one counts of its attention, where the question looks ahead. It does so for the first token
# of an answer, and the next ones are read beside that: the last digits of a price (ACCURACY.md, "Looking ahead")
BESIDE = 0.1


def adapt(plan: PromptPlan, images: Sequence[StagedImage]) -> list[str]:
    """Lowers the plan's counts of decoder stages to what a vision stage that adapts to the picture has left.

    Returns:
        A note if there was no room for what the pictures need.
    """
    kept = [len(image.selection.kept) for image in images]
    plan.windows = [(layer, [min(n, left) for n, left in zip(counts, kept)]) for layer, counts in plan.windows]
    full = [i for i, image in enumerate(images) if image.selection.too_few]
    if not full:
        return []
    n, n_tokens = sum(kept[i] for i in full), sum(images[i].chunk.n_tokens for i in full)
    return [f"there is room for {n} of {n_tokens} image tokens, which is less than vision_tolerance asks for"]


def ranking_layers(
    decoder: DecoderContext, look_ahead: int | float, layer: int, notes: list[str]
) -> tuple[int, int] | None:
    """The first and the last layer whose attention ranks, or None if the decoder cannot look ahead from layer K.

    notes: Gets why it cannot.

    Raises:
        ConfigError: They are not after layer K.
    """
    first, last = look_ahead_layers(look_ahead, decoder.n_layers)
    if last <= layer:
        raise ConfigError(
            f"look_ahead={look_ahead} is layer {last}, which is not after layer K = {layer}",
            "raise look_ahead, or lower decoder_layer",
        )
    problem = "a hybrid decoder's states cannot go back" if decoder.is_hybrid else ""
    if decoder.cells_move_on:
        problem = "with swa_full=False, KV cells of tokens that leave the sliding window go to later ones"
    if problem:
        notes.append(f"the question does not look ahead: {problem}")
        return None
    return first, last


def decoder_stage(plan: PromptPlan, images: Sequence[StagedImage], n_threads: int) -> DecoderStage:
    """The decoder stages of a plan, as `prefill` runs them. Choosing may take n_threads threads."""
    assert plan.config is not None  # which asked for them
    policy = decoder_policy(plan.config)
    candidates: dict[int, Candidates] = {}  # of the stage that chooses, by the image's index

    def share(seen: Sequence[Seen], n_keep: Sequence[int]) -> list[int]:
        """How many rows of each image stay. Images that share a budget keep the best rows among all of them."""
        beside = 0.0 if plan.look_ahead is None else BESIDE
        candidates.update((s.image, _candidates(s, images[s.image], plan.n_special[s.image], beside)) for s in seen)
        losing = [candidates[s.image] for s in seen if n_keep[s.image] < len(s.rows)]
        prepare([(policy, image) for image in losing], n_threads)
        counts = list(n_keep)
        for group in (group for group in plan.groups if len(group) > 1):
            total = sum(n_keep[i] - plan.n_special[i] for i in group)
            for i, n in zip(group, divide(policy, [candidates[i] for i in group], total, n_threads)):
                counts[i] = plan.n_special[i] + n
        return counts

    return DecoderStage(
        plan.windows,
        lambda seen, n: choose(policy, candidates[seen.image], n - plan.n_special[seen.image], n_threads=n_threads),
        policy.scorer.reads or "all",
        share,
        plan.config.seen_below,
        plan.look_ahead,
    )


def _candidates(seen: Seen, image: StagedImage, n_special: int, beside: float) -> Candidates:
    """The rows of an image in a decoder stage. beside: what a row that touches one counts of its attention."""
    rows = image.selection.kept[seen.rows]
    cells, grid = image.encoded.cells[rows], image.chunk.grid
    tokens = Tokens(
        seen.hidden,
        cells,
        grid,
        seen.mass,
        with_neighbours(seen.attention, cells, grid, beside) if beside else seen.attention,
        seen.row_attention,
        seen.text_hidden,
    )
    special = image.encoded.special
    return Candidates(
        tokens, None if special is None else special[rows], image.chunk.picture, image.chunk.n_tokens - n_special
    )
