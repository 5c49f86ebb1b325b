"""Scorers and representatives against loops written from the papers' definitions."""

import numpy as np
import pytest
from helpers import bounds
from helpers.choosing import distances

from star_edge import PRESETS, PruneConfig, StarVLM, refvlm
from star_edge.pruning.representatives import MAX_CLUSTERED, REPRESENTATIVES, merge, select
from star_edge.pruning.scorers import DECODER_SCORERS, VISION_SCORERS
from star_edge.pruning.selection import MAX_DIMENSIONS, PLACE_WEIGHT, REACH, Tokens, average_tokens

RNG = np.random.default_rng(5)


def random_tokens(n=30, d=12, grid=(5, 6), **fields):
    return Tokens(RNG.standard_normal((n, d)).astype(np.float32), np.arange(n), grid, **fields)


def cosine_distance(x):
    return np.array([[1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in x] for a in x])


def kept_by(scores, k):
    return set(np.argsort(-scores, kind="stable")[:k].tolist())


def test_max_min_diversity_is_the_papers_greedy_choice():
    tokens = random_tokens()
    far = cosine_distance(tokens.vectors.astype(float)) + np.diag([np.inf] * 30)
    chosen = [int(far.min(axis=1).argmax())]
    while len(chosen) < 9:
        rest = [i for i in range(30) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(far[i, j] for j in chosen)))
    for k in (1, 4, 9):
        assert kept_by(VISION_SCORERS["maxmin"].score(tokens, k), k) == set(chosen[:k])


def test_scope_is_saliency_times_coverage_gain():
    tokens = random_tokens(attention=RNG.random(30).astype(np.float32))
    alike = np.maximum(1 - cosine_distance(tokens.vectors.astype(float)), 0)
    chosen = []
    for _ in range(8):
        covered = np.max([alike[j] for j in chosen], axis=0) if chosen else np.zeros(30)
        gain = [-1 if i in chosen else tokens.attention[i] * np.maximum(alike[i] - covered, 0).sum() for i in range(30)]
        chosen.append(int(np.argmax(gain)))
    assert kept_by(VISION_SCORERS["scope"].score(tokens, 8), 8) == set(chosen)


def test_text_raters_leave_out_rows_that_are_not_about_the_image():
    tokens = random_tokens(n=8, d=16)
    about, not_about = tokens.vectors[:4].sum(axis=0), -tokens.vectors.sum(axis=0)
    tokens.text_vectors = np.stack([about, not_about, about * 2])
    tokens.row_attention = RNG.random((3, 8)).astype(np.float32)
    assert np.allclose(DECODER_SCORERS["raters"].score(tokens, 3), tokens.row_attention[[0, 2]].mean(axis=0))
    tokens.text_vectors = np.stack([about] * 3)  # all alike: every row rates
    assert np.allclose(DECODER_SCORERS["raters"].score(tokens, 3), tokens.row_attention.mean(axis=0), atol=1e-6)


def test_baselines():
    tokens = random_tokens(n=12, grid=(3, 4))
    assert kept_by(VISION_SCORERS["uniform"].score(tokens, 4), 4) == {1, 4, 7, 10}
    draws = []
    for seed in (0, 0, 1):
        tokens.seed = seed
        draws.append(kept_by(VISION_SCORERS["random"].score(tokens, 5), 5))
    assert draws[0] == draws[1] != draws[2]


def test_distances():
    tokens = random_tokens()
    far = cosine_distance(tokens.vectors.astype(float))
    place = np.array([divmod(i, 6) for i in range(30)], float)
    apart = np.linalg.norm(place[:, None] - place[None], axis=2)
    want = far / far.mean() + PLACE_WEIGHT * apart / apart.mean()
    assert np.abs(distances(tokens) - want * (1 - np.eye(30))).max() < 1e-4
    nowhere = distances(Tokens(tokens.vectors, np.where(np.arange(30) == 7, -1, np.arange(30)), (5, 6)))
    others = np.arange(30) != 7
    assert np.allclose(nowhere[7, others], (far / far.mean())[7, others] + PLACE_WEIGHT, atol=1e-4)
    assert np.allclose(
        distances(Tokens(tokens.vectors, tokens.cells, None)), far / far.mean() * (1 - np.eye(30)), atol=1e-4
    )
    assert not distances(random_tokens(n=3, grid=None))[[0, 1, 2], [0, 1, 2]].any()


def test_long_vectors_keep_their_angles():
    """A random projection: cosines of 4096 dimensions up to 1/sqrt(256), the same each time."""
    tokens = random_tokens(n=60, d=4096, grid=None)
    tokens.vectors[30:] += 2 * tokens.vectors[:30]
    exact = 1 - cosine_distance(tokens.vectors.astype(float))
    assert tokens.unit_vectors.shape == (60, MAX_DIMENSIONS)
    error = tokens.unit_vectors @ tokens.unit_vectors.T - exact
    assert error.std() < 1.2 / np.sqrt(MAX_DIMENSIONS)
    assert np.array_equal(tokens.unit_vectors, Tokens(tokens.vectors.copy(), tokens.cells).unit_vectors)


def test_clusters_by_distance_alone():
    """Four tight groups of unequal size: one representative each, with the group's size as its mass and its mean as its
    embedding.
    """
    centres = np.eye(4, 8) * 10
    sizes = [9, 3, 1, 7]
    vectors = np.concatenate([c + 0.1 * RNG.standard_normal((n, 8)) for c, n in zip(centres, sizes)]).astype(np.float32)
    owner = np.repeat(np.arange(4), sizes)
    order = RNG.permutation(20)
    tokens = Tokens(vectors[order], np.arange(20))
    selection = select("cluster", tokens, np.zeros(20), 4, 1.0)
    assert sorted(owner[order][selection.kept].tolist()) == [0, 1, 2, 3]
    assert selection.mass.tolist() == [sizes[o] for o in owner[order][selection.kept]]
    merged = merge(tokens.vectors, selection)
    for i, kept in enumerate(selection.kept):
        mine = owner[order] == owner[order][kept]
        assert np.allclose(merged[i], tokens.vectors[mine].mean(axis=0), atol=1e-5)
        spread = [np.linalg.norm(cosine_distance(tokens.vectors[mine].astype(float))[j], 1) for j in range(mine.sum())]
        assert np.flatnonzero(mine)[int(np.argmin(spread))] == kept  # the medoid


def edges(tokens, alone, bound):
    """What touches something unlike it and is not of the ground, or is a gap in that, from the definition, token by
    token.
    """
    n = len(tokens)
    place = [divmod(int(cell), tokens.grid[1]) for cell in tokens.cells]
    touches = [
        [j for j in range(n) if j != i and max(abs(a - b) for a, b in zip(place[i], place[j])) <= 1] for i in range(n)
    ]
    flat = [i for i in range(n) if any(alone[i, j] <= bound for j in touches[i])]
    first = max(flat, key=lambda i: sum(alone[i, j] <= bound for j in flat), default=None)
    ground = [i for i in flat if alone[first, i] <= bound]
    things = [place[j] for j in range(n) if j not in ground]
    steps = [[column - place[i][1] for row, column in things if row == place[i][0]] for i in range(n)]
    gap = [i for i in ground if {-1, 1} <= {np.sign(step) for step in steps[i] if abs(step) <= REACH}]
    return [
        i
        for i in range(n)
        if (i not in ground or i in gap) and (i not in flat or any(alone[i, j] > bound for j in touches[i]))
    ]


def within(tokens, k, tolerance, most=None, reach=None):
    """Clusters with a tolerance, as loops in float64 from the definition in `representatives.cluster`."""
    n = len(tokens)
    mass = tokens.masses
    alone = cosine_distance(tokens.vectors.astype(float))
    np.fill_diagonal(alone, 0)
    mean = sum(mass[i] * mass[j] * alone[i, j] for i in range(n) for j in range(n)) / mass.sum() ** 2
    edge = [] if reach is None else edges(tokens, alone, tolerance * mean)
    if reach is not None:
        row, column = np.divmod(tokens.cells, tokens.grid[1])
        for i in range(n):
            for j in range(n):
                if max(abs(row[i] - row[j]), abs(column[i] - column[j])) > reach:
                    alone[i, j] += tolerance * mean + 2
    far = distances(tokens)
    crowded = len(edge) > (most or n)
    chosen = ([] if crowded else edge) or [int(far.sum(axis=1).argmax())]
    while len(chosen) < k:
        chosen.append(max((i for i in range(n) if i not in chosen), key=lambda i: min(far[i, j] for j in chosen)))
    while len(chosen) < (most or n):
        worst = max(range(n), key=lambda i: min(alone[i, j] for j in chosen))
        if min(alone[worst, j] for j in chosen) <= tolerance * mean:
            break
        chosen.append(worst)
    too_few = crowded or max(min(alone[i, j] for j in chosen) for i in range(n)) > tolerance * mean

    def assign(chosen):
        near = lambda i: [j for j in chosen if alone[i, j] <= tolerance * mean] or chosen
        return {i: i if i in chosen else min(near(i), key=lambda j: far[i, j]) for i in range(n)}

    if reach is not None:
        return alone, tolerance * mean, assign(chosen), too_few
    medoids = []
    owner = assign(chosen)
    for j in chosen:
        members = [i for i in range(n) if owner[i] == j]
        n_far = {i: sum(alone[i, m] > tolerance * mean for m in members) for i in members}
        best = [i for i in members if n_far[i] == min(n_far.values())]
        size = {i: max(far[i, m] for m in members) for i in members}
        best = [i for i in best if size[i] <= size[j] + 1e-5] or best
        medoids.append(min(best, key=lambda i: sum(far[i, m] * mass[m] for m in members)))
    return alone, tolerance * mean, assign(medoids), too_few


@pytest.mark.parametrize("tolerance", [0.15, 0.3, 0.6, 0.9, 1.2])
@pytest.mark.parametrize(("k", "most"), [(1, None), (6, None), (6, 9), (20, None)])
@pytest.mark.parametrize("reach", [None, 1, 2])
def test_a_tolerance_keeps_what_the_picture_needs(tolerance, k, most, reach):
    centres = RNG.standard_normal((9, 12))
    vectors = (centres[RNG.integers(0, 9, 30)] + 0.3 * RNG.standard_normal((30, 12))).astype(np.float32)
    tokens = Tokens(vectors, RNG.permutation(30), (5, 6), mass=RNG.integers(1, 4, 30).astype(float))
    selection = select("cluster", tokens, np.zeros(30), k, 1.0, tolerance, most, reach)
    alone, bound, owner, too_few = within(tokens, k, tolerance, most, reach)
    assert selection.kept.tolist() == sorted(set(owner.values()))
    assert selection.kept[selection.group].tolist() == [owner[i] for i in range(30)]
    assert selection.mass.sum() == pytest.approx(tokens.mass.sum())
    distance = alone[np.arange(30), selection.kept[selection.group]]
    assert k <= len(selection.kept) <= (most or 30)
    assert selection.too_few == too_few
    if most is None:  # the promise itself
        assert distance.max() <= bound * (1 + 1e-6) and not too_few


def test_a_loose_tolerance_changes_nothing():
    tokens = random_tokens(mass=RNG.uniform(1, 5, 30))
    for share in (0.5, 1.0):
        scores = RNG.random(30)
        plain, loose = (select("cluster", tokens, scores, 7, share, t) for t in (np.inf, 100.0))
        assert np.array_equal(plain.kept, loose.kept) and np.array_equal(plain.group, loose.group)


def test_a_reach_without_a_tolerance_changes_nothing():
    """Medoids take over then too, and do in most of these pictures of four things."""
    for _ in range(10):
        vectors = np.repeat(np.eye(4, 8) * 10, 5, axis=0) + RNG.standard_normal((20, 8))
        tokens = Tokens(vectors.astype(np.float32), np.arange(20), (4, 5))
        plain, reaching = (select("cluster", tokens, np.zeros(20), 4, 1.0, reach=reach) for reach in (None, 1))
        assert np.array_equal(plain.kept, reaching.kept) and np.array_equal(plain.group, reaching.group)


def test_a_tolerance_leaves_little_of_a_plain_picture_and_all_of_a_busy_one():
    plain = np.tile(RNG.standard_normal(300), (64, 1)).astype(np.float32)  # long: through the projection
    assert len(select("cluster", Tokens(plain, np.arange(64), (8, 8)), np.zeros(64), 2, 1.0, 0.2).kept) == 2
    plain[9] = RNG.standard_normal(300)
    selection = select("cluster", Tokens(plain, np.arange(64), (8, 8)), np.zeros(64), 2, 1.0, 0.2)
    assert 9 in selection.kept and len(selection.kept) == 2 and sorted(selection.mass) == [1, 63]
    busy = RNG.standard_normal((64, 300)).astype(np.float32)
    assert len(select("cluster", Tokens(busy, np.arange(64), (8, 8)), np.zeros(64), 2, 1.0, 0.2).kept) == 64


def test_redundant_tokens_that_left_before_count_in_the_mean():
    """Whether equal tokens are there one by one or as one of that mass: the same tolerance, the same choice."""
    rng = np.random.default_rng(3)
    some = rng.standard_normal((12, 8)).astype(np.float32)
    mass = rng.integers(1, 6, 12)
    whole = Tokens(np.repeat(some, mass, axis=0), np.arange(mass.sum()))
    less = Tokens(some, np.arange(12), mass=mass.astype(float))
    for tolerance in (0.2, 0.5, 0.8):
        sizes = [len(select("cluster", t, np.zeros(len(t)), 1, 1.0, tolerance).kept) for t in (whole, less)]
        assert abs(sizes[0] - sizes[1]) <= 1, tolerance  # the first pick follows the unweighted sum of distances


def test_clusters_around_tokens_chosen_by_score():
    tokens = random_tokens(mass=RNG.uniform(1, 5, 30))
    scores = RNG.random(30)
    selection = select("cluster", tokens, scores, 8, 0.5)
    best = np.argsort(-scores / np.sqrt(tokens.mass), kind="stable")[:4]
    far = distances(tokens)
    chosen = best.tolist()
    while len(chosen) < 8:
        chosen.append(max((i for i in range(30) if i not in chosen), key=lambda i: min(far[i, j] for j in chosen)))
    assert selection.kept.tolist() == sorted(chosen)
    mass = dict.fromkeys(selection.kept.tolist(), 0.0)
    for i in range(30):
        mass[i if i in mass else min(mass, key=lambda j: far[i, j])] += tokens.mass[i]
    assert np.allclose(selection.mass, [mass[i] for i in selection.kept])


def test_even_spread():
    scores = np.array([9.0, 1, 8, 1, 1, 1, 7, 1])
    tokens = random_tokens(n=8, grid=None)
    chosen = select("even", tokens, scores, 4, 0.5)
    # 9 and 8 stay; 2 of the other six, evenly spread over 1 3 4 5 6 7, stand for three tokens each
    assert chosen.kept.tolist() == [0, 2, 3, 6] and chosen.mass.tolist() == [1, 1, 3, 3]
    # a representative is ranked by what it receives for each token that it stands for
    heavy = random_tokens(n=3, grid=None, mass=np.array([1.0, 1.0, 6.0]))
    again = select("even", heavy, np.array([2.0, 3.0, 6.0]), 1, 0.0)
    assert again.kept.tolist() == [1] and again.mass.tolist() == [1]
    assert select("even", tokens, scores, 1, 0.5).mass.tolist() == [8]


def test_contextual_targets_take_in_the_alike():
    tokens = random_tokens(n=10, grid=None)
    scores = np.arange(10.0)
    selection = select("contextual", tokens, scores, 5, 0.4)
    assert selection.mass is None and {7, 8, 9} <= set(selection.kept.tolist())
    targets = [i for i in selection.kept.tolist() if i < 7]
    alike = 1 - cosine_distance(tokens.vectors.astype(float))
    for i in range(7):
        owner = selection.kept[selection.group[i]]
        assert owner == (i if i in targets else max(targets, key=lambda j: alike[i, j]))
    merged = merge(tokens.vectors, selection)
    for i in (7, 8, 9):
        assert np.array_equal(merged[np.searchsorted(selection.kept, i)], tokens.vectors[i])


@pytest.mark.parametrize("kind", list(REPRESENTATIVES))
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_counts_and_masses_add_up(kind, share):
    for n, k in ((1, 1), (7, 1), (7, 6), (7, 7), (40, 13)):
        mass = RNG.uniform(1, 3, n)
        tokens = random_tokens(n=n, grid=None, mass=mass)
        selection = select(kind, tokens, RNG.random(n), k, share)
        assert (
            len(set(selection.kept.tolist())) == k and np.all(np.diff(selection.kept) > 0) and selection.kept.max() < n
        )
        if kind == "cluster" or (kind == "even" and share > 0):
            assert selection.mass.sum() == pytest.approx(mass.sum())  # nothing is lost


def test_equal_tokens_are_no_trouble():
    tokens = Tokens(np.zeros((9, 4), np.float32), np.zeros(9, np.int64), (3, 3))
    selection = select("cluster", tokens, np.zeros(9), 4, 1.0)
    assert len(selection.kept) == 4 and selection.mass.sum() == 9 and selection.mass.min() >= 1


def test_large_images_are_clustered_band_by_band():
    n = 2 * MAX_CLUSTERED + 100
    tokens = Tokens(RNG.standard_normal((n, 8)).astype(np.float32), np.arange(n), (1, n))
    for k, share in ((50, 1.0), (50, 0.5), (2, 1.0)):
        selection = select("cluster", tokens, RNG.random(n), k, share)
        assert len(selection.kept) == k == len(set(selection.kept.tolist())) and selection.mass.sum() == pytest.approx(
            n
        )
    edges = np.linspace(0, n, 4)
    assert np.ptp(np.histogram(select("cluster", tokens, np.zeros(n), 60, 1.0).kept, edges)[0]) <= 1


def test_average_tokens_of_windows():
    assert average_tokens(100, [], 8) == 100
    assert average_tokens(100, [(2, 50), (4, 20)], 8) == (2 * 100 + 2 * 50 + 4 * 20) / 8


@pytest.mark.parametrize("scorer", list(VISION_SCORERS))
@pytest.mark.parametrize("representatives", list(REPRESENTATIVES))
def test_every_combination_runs(scorer, representatives, vlm):
    config = PruneConfig(0.25, 0.1, 3, vision_scorer=scorer, representatives=representatives, vision_share=0.4)
    state, report = vlm.read_prompt("how many squares?", refvlm.DEMO_IMAGE, config)
    image = report.images[0]
    assert (
        (len(image.vision_kept), len(image.decoder_kept)) == (36, 14)
        and state.in_place
        and np.isfinite(state.logits).all()
    )
    if representatives == "none":
        assert image.vision_mass is None and image.decoder_mass is None


@pytest.fixture(scope="module")
def vlm():
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_threads=2) as engine:
        yield engine


def test_cls_attention_is_not_attention_received(vlm):
    report = lambda scorer: vlm.read_prompt(
        "how many squares?", refvlm.DEMO_IMAGE, PruneConfig(0.25, vision_scorer=scorer, vision_share=0.0)
    )[1]
    received, cls = (report(s).images[0].vision_scores for s in ("attention", "cls"))
    from helpers.reference import ClipEncoder

    from star_edge.io.images import load_image

    encoder = ClipEncoder(str(refvlm.MMPROJ))
    features, attention = encoder.encode(load_image(refvlm.DEMO_IMAGE))
    theirs = attention[:, -1].mean(axis=0)[encoder.token_rows()]  # CLS is the last row in this layout
    prompt = vlm.tokenize("<__media__>", [load_image(refvlm.DEMO_IMAGE)], chat=False)
    got = vlm.encoder.encode(next(c for c in prompt.chunks if hasattr(c, "causal"))).embeddings.copy()
    prompt.close()
    assert bounds.are_features(got, features)
    limit = bounds.share(bounds.relative([(got, features)])) * theirs.max()
    assert bounds.distance(cls, theirs) <= limit < bounds.distance(received, theirs)


def test_nothing_is_read_that_is_not_needed():
    """The defaults choose by distances: the encoder's attention is not computed."""
    assert PruneConfig(0.5, 0.25).encoder_attention is None
    assert PruneConfig(1.0, 0.25, vision_share=0.5).encoder_attention is None
    assert PRESETS["star"].encoder_attention == "received" and PRESETS["visionzip"].encoder_attention == "cls"
    assert PRESETS["divprune"].encoder_attention is None and PRESETS["fastv"].encoder_attention is None


@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if config])
def test_presets_run(name, vlm):
    _, report = vlm.read_prompt("how many squares?", refvlm.DEMO_IMAGE, name)
    assert report.average_tokens < 144
    whole = ["no tokens are left out before the encoder"] if name == "document" else []  # a model of one picture size
    assert [note.partition(":")[0] for note in report.notes] == whole


def test_renumbered_positions(vlm, families):
    config = PruneConfig(20, 7, 3)
    ask = lambda positions, engine: engine.read_prompt(
        "what is it?", refvlm.DEMO_IMAGE, PruneConfig(20, 7, 3, positions=positions)
    )
    state, report = ask("original", vlm)
    closed, same = ask("renumbered", vlm)
    assert np.array_equal(report.images[0].vision_kept, same.images[0].vision_kept)
    assert state.next_position - closed.next_position == 144 - 20
    assert np.abs(state.logits - closed.logits).max() > 0.01
    assert config.positions == "original"
    models = families["qwen2vl"]
    with StarVLM(models.text, models.mmproj, n_ctx=512, n_threads=2) as qwen:
        state, report = ask("original", qwen)
        closed, _ = ask("renumbered", qwen)
        assert closed.next_position == report.n_text_tokens + 20 and np.abs(state.logits - closed.logits).max() > 1e-3
