"""Choices against a reference in float64 that is written from the definitions: loops, one token at a time.

Where arithmetic is exact, every tie is a true one and the lowest index wins it: choices are equal. Elsewhere they are
equal wherever no decision of the reference was nearer than float32 can tell apart.
"""

import math

import numpy as np
import pytest
from helpers.choosing import distances
from helpers.models import random_image

from star_edge import StarVLM, refvlm
from star_edge.errors import EngineError
from star_edge.io.images import load_image
from star_edge.pruning import selection
from star_edge.pruning.blas import spread
from star_edge.pruning.choose import Candidates, choose, decoder_policy, divide, prepare, vision_policy
from star_edge.pruning.config import PruneConfig
from star_edge.pruning.core import Points, cosines, group_means
from star_edge.pruning.representatives import ROUNDING, merge, select
from star_edge.pruning.selection import MAX_DIMENSIONS, PLACE_WEIGHT, Tokens
from star_edge.stopwatch import Stopwatch
from star_edge.vision.stage import encode_images, run_vision_stage


class Reference:
    """Distances of all pairs in float64, and the choice of `representatives.cluster` among them.

    margin: The smallest difference between the best and the second best of any decision; ties do not count.
    """

    def __init__(self, tokens):
        vectors = np.asarray(tokens.vectors, np.float64)
        d = vectors.shape[1]
        if d > 2 * MAX_DIMENSIONS:
            vectors = vectors @ np.random.default_rng(d).standard_normal((d, MAX_DIMENSIONS), np.float32)
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        self.mass = np.ones(len(unit)) if tokens.mass is None else tokens.mass
        self.alone = np.maximum(1 - unit @ unit.T, 0)
        self.far = self.alone / self.alone.mean()
        if tokens.grid is not None:
            place = np.stack(np.divmod(tokens.cells, tokens.grid[1]), axis=1).astype(float)
            apart = np.linalg.norm(place[:, None] - place[None], axis=2)
            self.far = self.far + PLACE_WEIGHT * apart / apart.mean()
        np.fill_diagonal(self.far, 0)
        self.margin = math.inf

    def best(self, values):
        """The index of the largest; the lowest of equal ones."""
        values = np.asarray(values, float)
        below = values[values < values.max()]
        if len(below):
            self.margin = min(self.margin, values.max() - below.max())
        return int(np.flatnonzero(values == values.max())[0])

    def pick(self, distances, kept):
        rest = [i for i in range(len(distances)) if i not in kept]
        return rest[self.best([min(distances[i, j] for j in kept) for i in rest])]

    def assign(self, kept, bound):
        group = np.empty(len(self.far), int)
        for i in range(len(group)):
            near = [j for j in kept if self.alone[i, j] <= bound] or kept
            group[i] = kept.index(i) if i in kept else kept.index(near[self.best([-self.far[i, j] for j in near])])
        return group

    def medoid(self, members, bound, representative):
        broken = [sum(self.alone[i, j] > bound for j in members) for i in members]
        fewest = [i for i, n in zip(members, broken) if n == min(broken)]
        size = {i: max(self.far[i, j] for j in members) for i in members}
        wider = {i: size[i] - size[representative] for i in members}
        self.margin = min([self.margin, *(abs(x - ROUNDING) for x in wider.values() if x not in (0, ROUNDING))])
        small = [i for i in fewest if wider[i] <= ROUNDING] or fewest
        return small[self.best([-sum(self.far[i, j] * self.mass[j] for j in members) for i in small])]

    def choose(self, scores, k, n_rep, tolerance=math.inf, most=None):
        n, bound = len(self.far), math.inf
        ranks = scores / np.sqrt(self.mass)
        kept = sorted(range(n), key=lambda i: (-ranks[i], i))[: k - n_rep]
        if n_rep == k:
            kept = [self.best(self.far.sum(axis=1))]
        while len(kept) < k:
            kept.append(self.pick(self.far, kept))
        if tolerance < math.inf:
            mean = self.mass @ self.alone @ self.mass / self.mass.sum() ** 2
            bound = max(tolerance * mean, ROUNDING)
            self.margin = min(self.margin, np.abs(self.alone - bound)[self.alone != bound].min())
            while len(kept) < (n if most is None else most):
                i = self.pick(self.alone, kept)
                if min(self.alone[i, j] for j in kept) <= bound:
                    break
                kept.append(i)
        kept = sorted(kept)
        group = self.assign(kept, bound)
        if n_rep == k:
            kept = sorted(self.medoid(np.flatnonzero(group == g).tolist(), bound, kept[g]) for g in range(len(kept)))
            group = self.assign(kept, bound)
        return kept, group, [self.mass[group == g].sum() for g in range(len(kept))]


def exact_tokens(seed):
    """Vectors whose cosines are sixteenths, some of them equal, each with its opposite: distances have the mean 1, and
    float32 rounds nothing.
    """
    rng = np.random.default_rng(seed)
    half = rng.choice([-1.0, 1.0], (rng.integers(10, 60), 16))
    half = np.concatenate([half, half[: rng.integers(0, len(half))]])
    mass = rng.choice([1.0, 4.0, 9.0], len(half)) if seed % 2 else np.ones(len(half))
    order = rng.permutation(2 * len(half))
    vectors = np.concatenate([half, -half])[order].astype(np.float32)
    return Tokens(vectors, np.arange(len(order)), None, np.concatenate([mass, mass])[order]), rng


def same(got, want):
    kept, group, mass = want
    return np.array_equal(got.kept, kept) and np.array_equal(got.group, group) and np.array_equal(got.mass, mass)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("tolerance", [math.inf, 0.75, 0.5])
def test_ties_go_to_the_lowest_index(share, tolerance):
    n_tied = 0
    for seed in range(25):
        tokens, rng = exact_tokens(seed)
        n = len(tokens)
        scores = rng.integers(0, 5, n).astype(np.float64)
        k = int(rng.integers(2, n // 2))
        most = None if seed % 3 else n // 2 + 1
        reference = Reference(tokens)
        want = reference.choose(scores, k, round(share * k), tolerance, most)
        got = select("cluster", tokens, scores, k, share, tolerance, most)
        assert same(got, want), f"seed {seed}"
        distances = reference.far[want[0]]
        n_tied += int((np.sort(distances, axis=0)[0] == np.sort(distances, axis=0)[1]).sum())
    assert n_tied > 100  # tokens as near to one as to another


@pytest.mark.parametrize("d", [48, 1024])
@pytest.mark.parametrize(("share", "tolerance"), [(1.0, math.inf), (0.5, math.inf), (1.0, 0.6)])
def test_choices_are_those_of_float64(d, share, tolerance):
    n_told = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        waves = rng.standard_normal((4, 4, d)).repeat(3, 0).repeat(3, 1).reshape(144, d)
        mass = None if seed % 2 else rng.integers(1, 5, 144).astype(float)
        vectors = (waves + 0.3 * rng.standard_normal((144, d))).astype(np.float32)
        tokens = Tokens(vectors, np.arange(144), (12, 12), mass)
        reference, scores = Reference(tokens), rng.random(144)
        want = reference.choose(scores, 20, round(share * 20), tolerance)
        got = select("cluster", tokens, scores, 20, share, tolerance)
        told = reference.margin > 2e-6
        assert same(got, want) or not told, f"seed {seed}"
        assert np.abs(distances(tokens) - reference.far).max() < 1e-4
        n_told += told
    assert n_told >= 4


def test_means_of_groups():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((300, 70)).astype(np.float32)
    group = np.minimum(rng.geometric(0.05, 300) - 1, 39)
    group[:40] = np.arange(40)
    kept = np.array([np.flatnonzero(group == g)[0] for g in range(40)])
    means = merge(vectors, selection.Selection(kept, None, group))
    want = np.array([vectors[group == g].astype(np.float64).mean(axis=0) for g in range(40)])
    assert means.dtype == np.float32 and np.abs(means - want).max() < 1e-6


# ---- the C core ----


@pytest.mark.parametrize(("n", "d"), [(1, 24), (2, 1), (15, 3), (24, 128), (97, 24), (256, 130), (500, 24)])
def test_cosines(n, d):
    """Symmetric to the bit, the same for any number of threads, and as good as float32 sums of d products."""
    unit = np.random.default_rng(n).standard_normal((n, d)).astype(np.float32)
    unit[n // 2] = unit[0]
    products = cosines(unit)
    assert np.array_equal(products, products.T) and np.array_equal(products[n // 2], products[0])
    want = unit.astype(np.float64) @ unit.T.astype(np.float64)
    assert np.abs(products - want).max() <= d * 2.0**-24 * (np.abs(unit) @ np.abs(unit).T).max()
    for n_threads in (0, 2, 7, 1000):
        assert np.array_equal(cosines(unit, n_threads), products)


def test_threads_choose_the_same():
    """Bit for bit, with so many tokens that each of several threads has its share."""
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((700, 128)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    tokens = Tokens(unit, np.arange(700), (28, 25))
    tokens.unit_vectors = unit
    mass, few = rng.integers(1, 4, 700).astype(float), rng.permutation(700)[:20]
    found = []
    for n_threads in (1, 2, 5, 64):
        points = Points(unit, tokens.place_distances(), PLACE_WEIGHT, n_threads)
        parts = [cosines(unit, n_threads), points.farthest(90)]
        for best, bound, near, medoids in (
            ([], math.inf, None, True),
            (few, math.inf, None, False),
            ([], 0.8, None, True),
            (few, 0.9, (*tokens.on_grid(), 2), False),
        ):
            parts += points.cluster(np.asarray(best, np.int64), mass, 90, 600, bound, ROUNDING, near, medoids)
        found.append(parts)
    for other in found[1:]:
        assert all(np.array_equal(got, want) for got, want in zip(other, found[0], strict=True))
    vectors, group = rng.standard_normal((3000, 700)).astype(np.float32), rng.integers(0, 400, 3000)
    group[:400] = np.arange(400)
    means = [group_means(vectors, group, 400, n_threads) for n_threads in (1, 2, 5, 64)]
    assert all(np.array_equal(m, means[0]) for m in means)


@pytest.mark.parametrize("seed", range(12))
def test_picks_that_count_for_the_first_that_shows_them(seed):
    """`budget.by_distinctness` as loops in float64, where float32 rounds nothing."""
    tokens, rng = exact_tokens(seed)
    reference = Reference(tokens)
    k = int(rng.integers(1, len(tokens)))
    picks, radius = [reference.best(reference.far.sum(axis=1))], 0.0
    while len(picks) < k:
        picks.append(reference.pick(reference.far, picks))
        radius = min(reference.far[picks[-1], j] for j in picks[:-1])
    want = [int(np.flatnonzero(reference.far[i] <= radius / 2)[0]) for i in picks]
    points = Points(tokens.unit_vectors, tokens.place_distances(), PLACE_WEIGHT, 1)
    assert points.farthest(k).tolist() == want


def test_numbers_that_are_none_choose_something():
    """`Tokens.checked` lets none through. The core, given some, stays within its arrays and ends."""
    unit = np.full((40, 8), math.nan, np.float32)
    points = Points(unit, None, PLACE_WEIGHT, 2)
    mass = np.ones(40)
    for bound, near, medoids in ((math.inf, None, True), (0.1, (np.arange(40), np.arange(40), 1), False)):
        kept, group, _ = points.cluster(np.empty(0, np.int64), mass, 5, 40, bound, ROUNDING, near, medoids)
        assert 1 <= len(kept) <= 40 and set(group.tolist()) <= set(range(len(kept)))
    assert all(len(found) == 40 for found in points.edges(0.1, np.arange(40), np.arange(40)))
    assert set(points.farthest(7).tolist()) <= set(range(40))


def test_arguments_that_the_core_refuses():
    unit, none = np.eye(6, 8, dtype=np.float32), np.empty(0, np.int64)
    points, mass = Points(unit, None, PLACE_WEIGHT, 1), np.ones(6)
    for k, bound, best in (
        (0, 1.0, none),
        (7, 1.0, none),
        (2, -1.0, none),
        (2, math.nan, none),
        (2, 1.0, [6]),
        (2, 1.0, [-1]),
    ):
        with pytest.raises(ValueError):
            points.cluster(np.asarray(best), mass, k, 6, bound, ROUNDING, None, True)
    for call in (
        lambda: points.farthest(0),
        lambda: points.farthest(7),
        lambda: points.edges(math.nan, np.arange(6), np.arange(6)),
        lambda: cosines(np.empty((0, 4), np.float32)),
        lambda: cosines(np.empty((4, 0), np.float32)),
        lambda: group_means(unit, np.full(6, 2), 2),
        lambda: group_means(unit, np.full(6, -1), 2),
        lambda: Points(unit, None, math.nan, 1).farthest(1),
    ):
        with pytest.raises(ValueError):
            call()


def crops(seed, n=5):
    rng = np.random.default_rng(seed)
    tokens = [rng.standard_normal((100 + 20 * i, 600)).astype(np.float32) for i in range(n)]
    return [
        Candidates(
            Tokens(t, np.arange(len(t)), (10, len(t) // 10), None, rng.random(len(t)).astype(np.float32)),
            None,
            0,
            len(t),
        )
        for t in tokens
    ]


@pytest.mark.parametrize("make_policy", [lambda c: vision_policy(c, True), decoder_policy])
@pytest.mark.parametrize("config", [PruneConfig(0.3), PruneConfig(0.3, vision_scorer="maxmin", representatives="none")])
def test_threads_and_preparing_change_nothing(make_policy, config):
    """Bit for bit: rows are multiplied in blocks of one size, whoever does it."""
    policy, found = make_policy(config), []
    for n_threads in (None, 1, 2, 7):
        images = crops(3)
        if n_threads is not None:
            prepare([(policy, image) for image in images], n_threads)
        counts = divide(policy, images, 200)
        selections = [choose(policy, image, n) for image, n in zip(images, counts)]
        found.append([counts, [(s.kept.tolist(), None if s.mass is None else s.mass.tolist()) for s in selections]])
        if n_threads is not None and policy.needs_distances:
            assert all("unit_vectors" in vars(image.tokens) for image in images)
    assert found[1] == found[2] == found[3]
    if not policy.compares:  # where images are sampled first, rows stand in other blocks
        assert found[0] == found[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none(bad):
    policy, images = vision_policy(PruneConfig(0.3), False), crops(1)
    images[3].tokens.vectors[17, 4] = bad
    with pytest.raises(EngineError, match="NaN or infinity"):
        prepare([(policy, image) for image in images], 2)
    with pytest.raises(EngineError, match="NaN or infinity"):
        choose(policy, images[3], 10)


def test_large_numbers_are_numbers():
    """The sum of their squares is not, in float32."""
    (image,) = crops(1, n=1)
    image.tokens.vectors *= np.float32(2.0**60)
    assert np.isinf(np.vdot(image.tokens.vectors, image.tokens.vectors))
    assert image.tokens.checked() is image.tokens


def test_spread():
    assert spread(lambda i: i * i, range(50), 4) == [i * i for i in range(50)]
    assert spread(abs, [], 4) == []

    def fails(i):
        raise KeyError(i)

    with pytest.raises(KeyError):
        spread(fails, [1, 2, 3], 2)


def test_images_of_a_prompt_on_several_threads():
    """The vision stage as a whole: the same rows for the decoder, whoever chose them."""
    pictures = [random_image(i, 168, 168) for i in range(3)] + [refvlm.DEMO_IMAGE]
    for config in (PruneConfig(0.3), PruneConfig(0.2, budget="prompt"), PruneConfig(0.1, vision_tolerance=0.1), None):
        with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=1024, n_threads=1) as vlm:
            tokenized = vlm.tokenize("what?", [load_image(picture) for picture in pictures])
            plan, _ = vlm._reader.plan(tokenized, config)
            encoded = encode_images(plan.images, vlm.encoder, config, Stopwatch())
            found = [run_vision_stage(plan, encoded, False, Stopwatch(), n) for n in (1, 2, 5)]
            tokenized.close()
        for segments, images, position in found:
            assert position == found[0][2] and len(images) == 4
            for got, want in zip(segments, found[0][0]):
                assert np.array_equal(got.rows.positions, want.rows.positions)
                assert np.array_equal(got.rows.embeddings, want.rows.embeddings) or got.image is None
                assert np.array_equal(got.mass, want.mass)
