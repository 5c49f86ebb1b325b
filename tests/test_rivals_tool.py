"""tools/pagevlm/rivals.py: published methods, each against a loop written from its definition; the layers in NumPy that
two of them need, against the engine's attention and against finite differences.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("gguf")

from test_pagevlm_tool import load_tool

from star_edge import PruneConfig, StarVLM, refvlm
from star_edge.io.images import load_image
from star_edge.pruning import representatives, scorers
from star_edge.pruning.scorers import Scorer
from star_edge.pruning.selection import Tokens
from star_edge.synthetic.pictures import photo
from star_edge.vision import stage


@pytest.fixture(scope="module")
def tool():
    """The modules, without what `install` changes in the package."""
    modules = load_tool(["layers", "rivals"])
    return SimpleNamespace(**modules)


@pytest.fixture
def installed(tool, monkeypatch):
    for table in (scorers.VISION_SCORERS, scorers.DECODER_SCORERS, representatives.REPRESENTATIVES):
        for name in ("fsr", "fsr-words", "era", "trio", "pact", "dbdpc", "probe", *tool.rivals.LESS):
            monkeypatch.setitem(table, name, None)  # restored to its absence
    monkeypatch.setattr(stage, "merge", stage.merge)
    tool.rivals.install()
    return tool.rivals


@pytest.fixture(scope="module")
def layers(tool):
    return tool.layers.Layers(refvlm.TEXT_MODEL)


def tokens_of(seed, n=24, n_embd=16, **fields):
    rng = np.random.default_rng(seed)
    return Tokens(rng.standard_normal((n, n_embd)).astype(np.float32), np.arange(n), (4, n // 4), **fields)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# ---- layers in NumPy ----


def test_attention_of_a_layer_is_what_the_engine_reads(installed):
    """The engine reads llama.cpp's own q and k; the difference is what Q8_0 activations round."""
    seen = []

    def probe(tokens, k):
        seen.append(tokens)
        return tokens.row_attention.mean(axis=0)

    scorers.DECODER_SCORERS["probe"] = Scorer(probe, "each")
    asking = installed.Asking(refvlm.TEXT_MODEL, 4)
    config = PruneConfig(windows=((2, 0.5), (4, 0.25)), decoder_scorer="probe", representatives="none")
    row, picture = {"question": "how many red balls are there?", "image": "p"}, load_image(photo(168, 168))
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_threads=1) as vlm:
        asking(vlm, row, picture, config)
        vlm.generate(row["question"], picture, config, max_tokens=1)
    asked = installed.ASKED
    for layer, tokens in zip((2, 4), seen, strict=True):
        hidden, positions = asked.rows(layer, tokens)
        n, n_text = len(asked.prefix), len(tokens.text_vectors)
        queries = np.arange(len(hidden) - n_text, len(hidden))
        attention = asked.layers.attention(layer, hidden, positions, queries)[0].mean(axis=0)
        mine = attention[:, n : n + len(tokens)]
        assert np.abs(mine - tokens.row_attention).max() < 0.02 * tokens.row_attention.max()
        moved = asked.layers.attention(layer, hidden, positions[::-1].copy(), queries)[0].mean(axis=0)
        assert np.abs(moved[:, n : n + len(tokens)] - tokens.row_attention).max() > 0.1 * tokens.row_attention.max()


def test_proxy_gradient_is_that_of_finite_differences(layers):
    rng = np.random.default_rng(0)
    hidden = layers.embed(rng.integers(3, 200, 20)).astype(np.float64)
    positions, rows = np.arange(20), np.arange(15, 19)
    for layer in (0, 3):
        gradient = layers.proxy_gradient(layer, hidden, positions, rows)
        for i in (0, 7, 14):
            direction, step = rng.standard_normal(hidden.shape[1]), 1e-5
            ends = []
            for sign in (1, -1):
                moved = hidden.copy()
                moved[i] += sign * step * direction
                ends.append(layers.proxy_loss(layer, moved, positions, rows))
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(gradient[i] @ direction, rel=1e-3)


# ---- methods ----


@pytest.fixture
def asked(tool, layers, monkeypatch):
    one = tool.rivals.Asked(layers, False, prefix=np.array([1, 259]))
    monkeypatch.setattr(tool.rivals, "ASKED", one, raising=False)
    return one


@pytest.mark.parametrize("seed, k, important", [(0, 5, 0.8), (1, 12, 0.8), (2, 20, 0.8), (1, 12, 1.0)])
def test_pact_clusters_the_keys_of_important_tokens(tool, asked, layers, seed, k, important):
    tokens, layer = tokens_of(seed, n_embd=256), 2
    n, before = len(tokens), tokens.vectors.copy()
    asked.stages = [layer]
    hidden, positions = asked.rows(layer, tokens)
    # EUTI
    query = layers.project(layer, hidden, "q").mean(axis=0)
    keys = layers.project(layer, hidden, "k")
    importance = np.zeros(len(hidden))
    for head in range(layers.n_heads):
        e = np.exp(keys[:, head // 2] @ query[head] / np.sqrt(layers.size))
        importance += e / e.sum() / layers.n_heads
    importance = importance[2:] * np.linalg.norm(before, axis=1)
    first = sorted(np.argsort(-importance)[: max(k, int(important * n))].tolist())
    # DBDPC, with the smallest cutoff that leaves at most k centres: one of the distances
    turned = unit(layers.rope(keys, positions)[2:].reshape(n, -1))
    far = 1 - turned @ turned.T
    density = {i: sum(np.exp(-((far[i, j] / 2) ** 2)) for j in first) for i in first}

    def centres(cutoff):
        found = []
        for i in sorted(first, key=lambda i: -density[i]):
            if all(far[i, j] > cutoff for j in found):
                found.append(i)
        return sorted(found)

    cutoff = min(c for c in far[np.ix_(first, first)].ravel() if len(centres(c)) <= k)
    expected = centres(cutoff)
    method = tool.rivals.pact if important < 1 else tool.rivals.dbdpc
    chosen = method(tokens, np.zeros(n), k, 1)
    assert chosen.kept.tolist() == expected
    members = {j: [j] for j in expected}
    for i in range(n):
        nearest = min(expected, key=lambda j: far[i, j])
        if i not in expected and (i in first or far[i, nearest] <= 1.5 * cutoff):
            members[nearest].append(i)
    assert chosen.mass.tolist() == [len(members[j]) for j in expected]
    for j in expected:
        assert np.allclose(tokens.vectors[j], before[members[j]].mean(axis=0), atol=1e-5)
    others = np.setdiff1d(np.arange(n), expected)
    assert np.array_equal(tokens.vectors[others], before[others])


@pytest.mark.parametrize("k", [4, 19])
def test_trio_suppresses_what_is_like_a_better_one(tool, asked, layers, k):
    text = layers.embed(np.arange(20, 28))
    tokens = tokens_of(3, n_embd=256, text_vectors=text)
    tokens.vectors[1:6] = tokens.vectors[0] + 0.1 * tokens.vectors[1:6]  # six that are alike
    asked.stages = [2]
    hidden, positions = asked.rows(2, tokens)
    rows = np.arange(len(hidden) - 5, len(hidden) - 1)
    size = np.linalg.norm(layers.proxy_gradient(2, hidden, positions, rows), axis=1)[2:26]
    picked = np.argsort(-tool.rivals.trio(tokens, k), kind="stable")[:k]
    alike = unit(tokens.vectors) @ unit(tokens.vectors).T >= 0.8
    expected = []
    for i in np.argsort(-size):
        if len(expected) < k and not any(alike[i, j] for j in expected):
            expected.append(int(i))
    assert picked.tolist() == expected
    assert sum(i < 6 for i in expected) <= 1


@pytest.mark.parametrize("seed, k", [(0, 4), (1, 10), (2, 23)])
def test_fsr_focuses_scans_and_refines(tool, seed, k):
    tokens = tokens_of(seed)
    scores = np.random.default_rng(seed).random(len(tokens)) ** 4
    chosen = tool.rivals.fsr(tokens, scores, k, 1)
    order = sorted(range(len(tokens)), key=lambda i: -scores[i])
    focus = []
    for i in order:
        if len(focus) == k or scores[focus].sum() >= 0.9 * scores.sum():
            break
        focus.append(i)
    cosine = unit(tokens.vectors) @ unit(tokens.vectors).T
    scan = []
    while len(focus) + len(scan) < k:
        left = [i for i in range(len(tokens)) if i not in focus + scan]
        scan.append(min(left, key=lambda i: max(cosine[i, j] for j in focus + scan)))
    assert chosen.kept.tolist() == sorted(focus + scan) and chosen.mass is None
    for i, vector in zip(chosen.kept, chosen.vectors):
        if i in focus or len(focus) == k:
            assert np.allclose(vector, tokens.vectors[i], atol=1e-6)
    if scan:
        dropped = [i for i in range(len(tokens)) if i not in focus + scan]
        best = sorted(dropped, key=lambda i: -cosine[i, scan].max())[: len(scan)]
        for one in scan:
            mine = [i for i in best if scan[int(cosine[i, scan].argmax())] == one]
            mean = np.average(tokens.vectors[[one, *mine]], axis=0, weights=scores[[one, *mine]])
            assert np.allclose(chosen.vectors[chosen.kept.tolist().index(one)], mean, atol=1e-4)


def test_era_picks_the_largest_determinant_step_by_step(tool):
    tokens = tokens_of(5, n=12)
    scores = np.random.default_rng(5).random(12)
    chosen = tool.rivals.era(tokens, scores, 5, 1)
    relevance = (scores - scores.min() + 1e-3) / (scores.max() - scores.min() + 1e-3)
    kernel = np.outer(relevance, relevance) * (unit(tokens.vectors) @ unit(tokens.vectors).T)
    picked = []
    for _ in range(5):
        left = [i for i in range(12) if i not in picked]
        picked.append(max(left, key=lambda i: np.linalg.det(kernel[np.ix_([*picked, i], [*picked, i])])))
    assert chosen.kept.tolist() == sorted(picked)
    assert chosen.mass.sum() == 12


def test_era_goes_on_by_saliency_where_vectors_span_no_more(tool):
    tokens = tokens_of(6, n=12, n_embd=3)
    scores = np.linspace(0, 1, 12)
    chosen = tool.rivals.era(tokens, scores, 8, 1)
    assert len(np.unique(chosen.kept)) == 8 and chosen.mass.sum() == 12
    assert {11, 10, 9, 8, 7} <= set(chosen.kept.tolist())


def test_era_scores_are_high_where_one_head_looks(tool, asked):
    asked.by_heads = np.array([[0.9, 0.25, 0.5], [0.0, 0.25, 0.5], [0.0, 0.25, 0.0], [0.0, 0.25, 0.0]])
    assert tool.rivals.era_scores(tokens_of(0, n=4), 1) == pytest.approx([1, 0, 0.5])


def test_clusters_with_less_keep_what_the_clusters_keep(tool):
    tokens, zeros = tokens_of(7), np.zeros(24)
    whole = representatives.cluster(tokens, zeros, 6, 6)
    less = {name: one(tokens, zeros, 6, 6) for name, one in tool.rivals.LESS.items()}
    assert all(one.group is None for one in less.values())
    assert np.array_equal(less["without means"].kept, whole.kept)
    assert np.array_equal(less["without means"].mass, whole.mass)
    assert np.array_equal(less["without masses"].kept, whole.kept) and less["without masses"].mass is None
    nowhere = Tokens(tokens.vectors, tokens.cells)  # without a grid places do not count
    assert np.array_equal(less["without places"].kept, representatives.cluster(nowhere, zeros, 6, 6).kept)


def test_every_rival_reaches_its_budget(tool, installed):
    for name, config in installed.configs(12, [0.5, 0.25, 0.1]):
        budget = float(name.rsplit(" ", 1)[1])
        first = config.vision_keep
        edges = [(0, first), *(config.decoder_windows(12) if config.prunes_in_decoder else []), (12, 0)]
        average = sum(n * (after - layer) for (layer, n), (after, _) in itertools.pairwise(edges)) / 12
        assert average == pytest.approx(budget)
