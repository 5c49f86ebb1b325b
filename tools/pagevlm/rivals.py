"""Published methods that are not part of the package, rebuilt on its engine, and asked as compare.py asks.

python tools/pagevlm/rivals.py ask QUESTIONS/questions.jsonl --out RESULTS.jsonl [options]
python tools/pagevlm/compare.py table RESULTS.jsonl

Each is written from the paper's text or the authors' code, as named below. Where this engine or a small model cannot
have what the method asks for, the docstring says so. They are put into the package's tables of scorers and
representatives while this script runs; nothing of the package imports them.

What a scorer does not get from the engine (the question's tokens, attention by heads, keys) is in `ASKED`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import compare
import numpy as np
from layers import Layers

from star_edge import PruneConfig, StarVLM, refvlm
from star_edge.pruning import representatives, scorers
from star_edge.pruning.representatives import REPRESENTATIVES
from star_edge.pruning.scorers import DECODER_SCORERS, VISION_SCORERS, Scorer
from star_edge.pruning.selection import Selection, Tokens
from star_edge.vision import stage as vision_stage
from star_edge.vision.chunks import TextChunk


@dataclass
class Asked:
    """What is being asked.

    Attributes:
        layers: The decoder's layers.
        prefix: Tokens before the image, (n,).
        question: Tokens of the question, (n,).
        by_heads: Attention that each image token receives in the encoder's last layer, (n_heads, n_tokens).
        stages: Layer K of the decoder stages that are still to come.
        cells: Grid cells of the image's tokens, before any of them left the decoder.
        is_grid: Positions are M-RoPE's, by rows and columns.
    """

    layers: Layers
    is_grid: bool
    prefix: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    question: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    by_heads: np.ndarray = field(default_factory=lambda: np.empty((1, 0)))
    stages: list[int] = field(default_factory=list)
    cells: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def rows(self, layer: int, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
        """States that enter a layer and positions of all rows: text before, image, text after (if it was read)."""
        prefix, n = self.layers.embed(self.prefix), len(self.prefix)
        positions = np.arange(n) if not self.is_grid else np.tile(np.arange(n), (3, 1))
        for below in range(layer):
            prefix = self.layers.run(below, prefix, positions)
        text = np.empty((0, prefix.shape[1]), np.float32) if tokens.text_vectors is None else tokens.text_vectors
        assert tokens.grid is not None
        n_tokens = tokens.grid[0] * tokens.grid[1]
        self.cells = tokens.cells if len(tokens) == n_tokens else self.cells
        if self.is_grid:
            row, column = np.divmod(tokens.cells, tokens.grid[1])
            after = n + max(tokens.grid) + np.arange(len(text))
            image = np.stack([np.full(len(tokens), n), n + row, n + column])
            positions = np.concatenate([positions, image, np.tile(after, (3, 1))], axis=1)
        else:
            at = np.argsort(self.cells)[np.searchsorted(np.sort(self.cells), tokens.cells)]
            positions = np.concatenate([positions, n + at, n + n_tokens + np.arange(len(text))])
        return np.concatenate([prefix, tokens.vectors, text]), positions


ASKED: Asked


# ---- PACT ----


def pact(tokens: Tokens, scores: np.ndarray, k: int, n_rep: int, important: float = 0.8) -> Selection:
    """PACT (arXiv 2504.08966; github.com/orailix/PACT, configs/pact.json and scripts/pact_qwenvl2.0_7b.sh).

    1. EUTI: a token's score is the mean over heads of the softmax over keys of the mean query (both before RoPE, of all
       rows up to the image's last), times the norm of its state. The best 80% go on, as published for Qwen2-VL.
    2. DBDPC on their keys after RoPE, by 1 - cosine: in order of density, each token farther than a cutoff from all
       centres is a centre. Every token goes to the nearest.
    3. A dropped token of step 1 within 1.5 cutoffs of a centre is taken back into its cluster; others are gone.
    4. A centre has the mean state of its cluster, its own position, and log(size) on its logits.

    The published cutoff (0.1) fixes no number of tokens. Here it is the smallest that leaves at most k centres.

    important: share of the tokens that step 1 lets go on.
    """
    model, layer = ASKED.layers, ASKED.stages.pop(0)
    hidden, positions = ASKED.rows(layer, Tokens(tokens.vectors, tokens.cells, tokens.grid))
    n_prefix = len(ASKED.prefix)
    query = model.project(layer, hidden, "q").mean(axis=0)
    keys = model.project(layer, hidden, "k")
    by_head = keys.repeat(model.n_heads // model.n_kv, axis=1)
    logits = np.einsum("hd,nhd->hn", query, by_head) / np.sqrt(model.size)
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    importance = (e / e.sum(axis=1, keepdims=True)).mean(axis=0)[n_prefix:] * np.linalg.norm(tokens.vectors, axis=1)
    first = np.sort(np.argsort(-importance, kind="stable")[: max(k, int(important * len(tokens)))])
    turned = model.rope(keys, positions)[n_prefix:].reshape(len(tokens), -1)
    turned /= np.linalg.norm(turned, axis=1, keepdims=True)
    far = np.maximum(0, 1 - turned @ turned.T)
    among = far[np.ix_(first, first)]
    order = np.argsort(-np.exp(-((among / 2) ** 2)).sum(axis=1), kind="stable")

    def centres(cutoff: float) -> np.ndarray:
        is_open, found = np.ones(len(first), bool), []
        for i in order:
            if is_open[i]:
                found.append(i)
                is_open &= among[i] > cutoff
        return first[np.sort(found)]

    low, high = 0.0, 2.0
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (low, middle) if len(centres(middle)) <= k else (middle, high)
    kept = centres(high)
    group = far[:, kept].argmin(axis=1)
    group[kept] = np.arange(len(kept))
    goes = np.zeros(len(tokens), bool)
    goes[first] = True
    goes |= far[:, kept].min(axis=1) <= 1.5 * high
    mass = np.bincount(group[goes], minlength=len(kept)).astype(np.float64)
    sums = np.zeros((len(kept), tokens.vectors.shape[1]), np.float64)
    np.add.at(sums, group[goes], tokens.vectors[goes])
    # a view of the states that go on: the engine itself never changes a state
    tokens.vectors[kept] = sums / mass[:, None]
    return Selection(kept, mass)


def dbdpc(tokens: Tokens, scores: np.ndarray, k: int, n_rep: int) -> Selection:
    """PACT's clusters alone, of all tokens (its code's configs/dbdpc.json)."""
    return pact(tokens, scores, k, n_rep, important=1.0)


# ---- TRIO ----


def trio(tokens: Tokens, k: int) -> np.ndarray:
    """TRIO (arXiv 2602.04657; github.com/ocy1/TRIO, `layer_prune` of llava/model/modeling_llama_x.py).

    The score is the norm of a gradient at the token's state: of the cross entropy of the most likely tokens at the four
    rows before the last, if the decoder ended after this layer. Then non-maximum suppression in order of the scores: no
    token with a cosine of 0.8 or more to one that stays; if too few are left, the best of the others.

    llama.cpp has no backward pass for this, so the layer is computed again in NumPy (layers.py).
    """
    layer = ASKED.stages.pop(0)
    hidden, positions = ASKED.rows(layer, tokens)
    n_prefix = len(ASKED.prefix)
    rows = np.arange(max(n_prefix + len(tokens), len(hidden) - 5), len(hidden) - 1)
    grad = ASKED.layers.proxy_gradient(layer, hidden, positions, rows)[n_prefix : n_prefix + len(tokens)]
    order = np.argsort(-np.linalg.norm(grad, axis=1), kind="stable")
    unit = tokens.vectors / np.maximum(np.linalg.norm(tokens.vectors, axis=1, keepdims=True), 1e-12)
    alike = unit @ unit.T >= 0.8
    is_open, picked = np.ones(len(tokens), bool), []
    for i in order:
        if is_open[i] and len(picked) < k:
            picked.append(int(i))
            is_open &= ~alike[i]
    rest = [int(i) for i in order if int(i) not in set(picked)]
    scores: np.ndarray = scorers._by_order([*picked, *rest], len(tokens))
    return scores


# ---- FSR ----


def fsr_scores(tokens: Tokens, k: int) -> np.ndarray:
    """The priority of FSR's first step without instruction relevance, as in its experiments on Qwen2.5-VL."""
    assert tokens.attention is not None
    return tokens.attention


def fsr_words(tokens: Tokens, k: int) -> np.ndarray:
    """The priority with instruction relevance: relevance^3 x attention, both scaled to 0..1.

    The paper's relevance is the cosine to CLIP's text embedding. A GGUF model has no text encoder; here it is the
    largest cosine to an input embedding of the question's tokens.
    """

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    def scaled(x: np.ndarray) -> np.ndarray:
        return (x - x.min()) / max(float(x.max() - x.min()), 1e-12)

    assert tokens.attention is not None
    relevance = (unit(tokens.vectors) @ unit(ASKED.layers.embed(ASKED.question)).T).max(axis=1)
    return scaled(relevance) ** 3 * scaled(tokens.attention)


def fsr(tokens: Tokens, scores: np.ndarray, k: int, n_rep: int) -> Selection:
    """FSR (arXiv 2602.05809; its repository has no code yet). Focus, scan, refine.

    1. Focus: the fewest tokens that have 90% of the scores, at most k.
    2. Scan: the others are picked one by one, each the farthest from all before by 1 - cosine.
    3. Refine: of the dropped tokens, as many as step 2 picked, those that are most like one of these, are merged into
       it, weighted by the scores. No masses.
    """
    order = np.argsort(-scores, kind="stable")
    total = np.cumsum(scores[order])
    n_focus = min(k, int(np.searchsorted(total, 0.9 * total[-1])) + 1)
    unit = tokens.vectors / np.maximum(np.linalg.norm(tokens.vectors, axis=1, keepdims=True), 1e-12)
    far = 1 - unit @ unit.T
    is_kept = np.zeros(len(tokens), bool)
    is_kept[order[:n_focus]] = True
    nearest, scan = far[is_kept].min(axis=0), []
    for _ in range(k - n_focus):
        pick = int(np.where(is_kept, -np.inf, nearest).argmax())
        is_kept[pick] = True
        scan.append(pick)
        nearest = np.minimum(nearest, far[pick])
    selection = Selection(np.flatnonzero(is_kept))
    vectors = np.array(tokens.vectors, np.float64)
    dropped = np.flatnonzero(~is_kept)
    if scan and len(dropped):
        to = far[np.ix_(dropped, scan)]
        weight = np.array(scores, np.float64) + 1e-12
        for i in np.argsort(to.min(axis=1), kind="stable")[: len(scan)]:
            anchor, one = scan[int(to[i].argmin())], dropped[i]
            both = weight[anchor] + weight[one]
            vectors[anchor] = (weight[anchor] * vectors[anchor] + weight[one] * vectors[one]) / both
            weight[anchor] = both
    selection.vectors = vectors[selection.kept].astype(np.float32)  # type: ignore[attr-defined]
    return selection


def merge(vectors: np.ndarray, selection: Selection) -> np.ndarray:
    """`representatives.merge`, or what a rival has merged itself."""
    own: np.ndarray | None = getattr(selection, "vectors", None)
    return representatives.merge(vectors, selection) if own is None else own


# ---- ERA ----


def era_scores(tokens: Tokens, k: int) -> np.ndarray:
    """Saliency by heads: 1 - the entropy of a token's attention over the encoder's heads, over its largest value."""
    share = ASKED.by_heads / np.maximum(ASKED.by_heads.sum(axis=0), 1e-30)
    entropy = -(share * np.log(np.maximum(share, 1e-30))).sum(axis=0)
    saliency: np.ndarray = 1 - entropy / np.log(len(share))
    return saliency


def era(tokens: Tokens, scores: np.ndarray, k: int, n_rep: int) -> Selection:
    """ERA, as far as its abstract and its README say (arXiv 2606.31982; github.com/924973292/ERA, without code).

    They say: anchors are chosen "in a unified space that jointly models visual diversity and head-wise saliency derived
    from attention entropy"; dropped tokens are recycled into the nearest anchors, with a "cluster-level logit bias" on
    attention logits. They do not say how saliency and diversity are joined, whether the entropy is over heads or over
    tokens, how the bias is estimated, nor where it acts. Here: the greedy determinant of saliency x cosine x saliency
    (CDPruner's, on which ERA's code is said to be built), the mean of each cluster, and log(size) in all layers.
    """
    low, high = scores.min(), scores.max()
    relevance = (scores - low + 1e-3) / (high - low + 1e-3)
    unit = tokens.vectors / np.maximum(np.linalg.norm(tokens.vectors, axis=1, keepdims=True), 1e-12)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    gain = np.diag(kernel).copy()
    rows = np.zeros((k, len(tokens)))
    picked: list[int] = []
    for i in range(k):
        pick = int(gain.argmax())
        if gain[pick] < 1e-6:  # more tokens than dimensions: the determinant says nothing of the rest
            rest = np.setdiff1d(np.argsort(-relevance, kind="stable"), picked, assume_unique=True)
            picked += rest[: k - i].tolist()
            break
        picked.append(pick)
        row = (kernel[pick] - rows[:i, pick] @ rows[:i]) / np.sqrt(gain[pick])
        rows[i] = row
        gain -= row**2
        gain[picked] = -np.inf
    kept = np.sort(picked)
    group = (unit @ unit[kept].T).argmax(axis=1)
    group[kept] = np.arange(k)
    return Selection(kept, np.bincount(group, minlength=k).astype(np.float64), group)


# ---- clusters with less ----


def without_means(tokens: Tokens, scores: np.ndarray, k: int, n_rep: int) -> Selection:
    """The package's clusters, but each kept token has its own embedding."""
    chosen = representatives.cluster(tokens, scores, k, n_rep)
    return Selection(chosen.kept, chosen.mass)


def without_masses(tokens: Tokens, scores: np.ndarray, k: int, n_rep: int) -> Selection:
    """The package's choice alone: medoids of groups by embeddings and places."""
    return Selection(representatives.cluster(tokens, scores, k, n_rep).kept)


@dataclass
class Placeless(Tokens):
    """Tokens whose distance does not count places."""

    def place_distances(self) -> None:
        return None


def without_places(tokens: Tokens, scores: np.ndarray, k: int, n_rep: int) -> Selection:
    """The package's choice alone, by embeddings alone."""
    return without_masses(Placeless(*(getattr(tokens, f.name) for f in fields(Tokens))), scores, k, n_rep)


LESS = {"without means": without_means, "without masses": without_masses, "without places": without_places}


# ---- asking ----


def configs(n_layers: int, budgets: list[float]) -> Iterator[tuple[str, PruneConfig]]:
    """Each rival at each budget that it can reach: average image tokens of the decoder's layers."""

    def at(share: float) -> int:
        return max(1, round(share * n_layers))

    early = at(4 / 28)  # PACT's layer 4 of 28
    first, second, third = at(1 / 32), max(2, at(10 / 32)), max(3, at(15 / 32))  # TRIO's layers of 32
    for budget in budgets:
        for name, scorer, kind in (
            ("FSR", "fsr", "fsr"),
            ("FSR, relevance by word embeddings", "fsr-words", "fsr"),
            ("ERA (abstract)", "era", "era"),
        ):
            yield (
                f"{name} {budget:g}",
                PruneConfig(vision_keep=budget, vision_scorer=scorer, representatives=kind, vision_share=0.5),
            )
        for name in LESS:
            config = PruneConfig(vision_keep=budget, representatives=name, vision_share=1.0)
            yield f"clusters {name} {budget:g}", config
        keep = (budget * n_layers - early) / (n_layers - early)
        if keep > 0:
            stage = {"decoder_keep": keep, "decoder_layer": early, "decoder_scorer": "last"}
            yield f"PACT, K={early} {budget:g}", PruneConfig(**stage, representatives="pact")
            yield f"PACT's clusters alone, K={early} {budget:g}", PruneConfig(**stage, representatives="dbdpc")
        # TRIO's three counts are as 92 : 54 : 22 (its code's for LLaVA-1.5)
        widths = np.array([second - first, third - second, n_layers - third]) * (1, 54 / 92, 22 / 92)
        top = (budget * n_layers - first) / widths.sum()
        if 0 < top <= 1:
            windows = tuple((k, float(top * x)) for k, x in zip((first, second, third), (1, 54 / 92, 22 / 92)))
            yield f"TRIO {budget:g}", PruneConfig(windows=windows, decoder_scorer="trio", representatives="none")


def install() -> None:
    """Puts the rivals into the package's tables."""
    VISION_SCORERS["fsr"] = Scorer(fsr_scores, "received")
    VISION_SCORERS["fsr-words"] = Scorer(fsr_words, "received")
    VISION_SCORERS["era"] = Scorer(era_scores)
    DECODER_SCORERS["trio"] = Scorer(trio, "each")
    REPRESENTATIVES.update(pact=pact, dbdpc=dbdpc, fsr=fsr, era=era, **LESS)
    vision_stage.merge = merge


def received(attention: np.ndarray, n_tokens: int) -> np.ndarray:
    """Attention that each token receives, by heads, (n_heads, n_tokens), from that among the encoder's rows."""
    n_rows = attention.shape[-1]
    if n_rows == n_tokens + 1:  # tokens are made of all rows but the first
        return attention.mean(axis=1)[:, 1:]
    return attention.mean(axis=1).reshape(len(attention), n_tokens, -1).sum(axis=2)


class Asking:
    """Keeps `ASKED` up to date. Attention by heads is read once for each picture."""

    def __init__(self, text: Path, n_encoder_layers: int) -> None:
        """n_encoder_layers: those that run."""
        global ASKED
        layers = Layers(text)
        ASKED = Asked(layers, layers.sections is not None)
        self.heads: dict[str, np.ndarray] = {}
        self.n_encoder_layers = n_encoder_layers

    def __call__(self, vlm: StarVLM, row: dict, picture: np.ndarray, config: PruneConfig | None) -> None:
        if not len(ASKED.prefix):
            prompt = vlm.tokenize(row["question"], [picture])
            before = prompt.chunks[0]
            assert isinstance(before, TextChunk)
            ASKED.prefix = before.tokens
            prompt.close()
        ASKED.question = np.array(vlm.llama.tokenize(row["question"].encode(), add_bos=False))
        if config is not None and config.vision_scorer == "era":
            if row["image"] not in self.heads:
                last = self.n_encoder_layers - 1
                seen = vlm.inspect(row["question"], picture, encoder_layers=[last])
                self.heads[row["image"]] = received(seen.encoder[0][last], int((seen.image_of_token == 0).sum()))
            ASKED.by_heads = self.heads[row["image"]]
        prunes = config is not None and config.prunes_in_decoder
        ASKED.stages = [k for k, _ in config.decoder_windows(ASKED.layers.n_layers)] if prunes and config else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    asking = commands.add_parser("ask")
    compare.add_options(asking)
    asking.add_argument("--only", nargs="+", default=[""], help="configs whose names begin with one of these")
    asking.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.25], help="average tokens over all")
    args = parser.parse_args()
    install()
    text = refvlm.TEXT_MODEL if args.refvlm else args.text
    wanted = {
        name: config
        for name, config in configs(Layers(text).n_layers, args.budgets)
        if any(name.startswith(only) for only in args.only)
    }
    compare.ask(args, {"off": None, **wanted}, Asking(Path(text), 4 if args.refvlm else 6))


if __name__ == "__main__":
    main()
