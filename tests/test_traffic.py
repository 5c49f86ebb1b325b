"""What a tap costs the backend: reads and writes of tensors' memory, and nodes at which all has to be finished.

On a GPU each is a copy or a wait. The numbers follow from what a stage needs, and do not grow with the layers.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import gpu
from helpers.tap_helpers import HEADS, D, L, decode, good_plan, kinds, rows_of, token_step
from helpers.tap_helpers import fresh as fresh  # a fixture
from helpers.tap_helpers import models as models  # a fixture
from helpers.tap_helpers import raw as raw  # a fixture
from helpers.tap_helpers import tapped as tapped  # a fixture

from star_edge import PruneConfig, StarVLM, refvlm
from star_edge.llamacpp.context import DecoderContext
from star_edge.llamacpp.native import ffi, lib
from star_edge.llamacpp.tap import MEAN_ALL, AttentionRead
from star_edge.rows import Rows

pytestmark = pytest.mark.skipif(
    gpu.PLACEMENT in ("half", "encoder"), reason="each device has a copy of the positions and of the mask"
)
N = 24  # rows of a decode
CELL, POSITION, VALUE = 8, 4, 4  # bytes


def traffic_of(context):
    t = context.tap.take_traffic()
    return t.n_stops, t.n_reads, t.n_writes, t.read_bytes, t.written_bytes


def n_positions(arch):
    return 4 if arch == "qwen2vl" else 1


@pytest.fixture
def read(tapped):
    """A context with N rows in its cache, and the rows."""

    def get(arch, flash):
        context, rows = tapped(arch, flash), rows_of(arch, N)
        decode(context, rows)
        context.llama.n_tokens = N
        context.tap.take_traffic()
        contexts.append(context)
        return context, rows

    contexts = []
    yield get
    for context in contexts:
        context.llama.n_tokens = 0
        context.tap.set_position_shift(0, 0)
        context.tap.set_cell_bias(None)


@kinds
def test_a_token_is_free_while_the_tap_is_idle(arch, flash, read):
    context, _ = read(arch, flash)
    token_step(context.llama, 7)
    assert context.tap.take_traffic().n_asked == 0


@kinds
def test_a_token_after_pruning(arch, flash, read):
    """Positions are read and written once, whatever the layers; with masses the mask too. Nothing is waited for."""
    context, _ = read(arch, flash)
    context.tap.set_position_shift(0, 70)
    token_step(context.llama, 7)
    n_bytes = n_positions(arch) * POSITION
    assert traffic_of(context) == (0, 1, 1, n_bytes, n_bytes)
    context.llama.n_tokens = N + 1
    context.tap.set_cell_bias(np.ones(N, np.float32))
    token_step(context.llama, 7)
    n_stops, n_reads, n_writes, read_bytes, written_bytes = traffic_of(context)
    assert (n_stops, n_reads, n_writes) == (0, 2, 2) and read_bytes == written_bytes
    mask = read_bytes - n_bytes
    assert mask % (2 if flash else 4) == 0 and mask >= N * 2


@pytest.mark.parametrize("flash", [False, True])
def test_plain_rows(flash, tapped):
    """Cells are read once, and no node after that is looked at; without cells, none at all."""
    context, rows = tapped("llama", flash), rows_of("llama", N)
    asked = []
    for options in ({}, {"only_cells": True, "want_cells": True}, {"only_cells": True}):
        context.clear()
        context.tap.take_traffic()
        outcome, _ = decode(context, rows, **options)
        t = context.tap.take_traffic()
        asked.append(t.n_asked)
        wants = options.get("want_cells", False)
        assert (t.n_stops, t.n_reads, t.read_bytes, t.n_writes) == (0, wants, wants * N * CELL, 0)
        assert not wants or outcome.cells.tolist() == list(range(N))
    assert asked[0] > 3 * asked[1] > 0 == asked[2]


def test_only_cells_is_for_plain_decodes(raw):
    plan, keep = good_plan()
    assert lib.se_tap_arm(raw, plan) == lib.SE_OK
    lib.se_tap_finish(raw, ffi.NULL)
    plan.only_cells = 1
    assert lib.se_tap_arm(raw, plan) == lib.SE_ERR_ARGUMENT
    assert len(keep) == 5


@kinds
def test_a_window_from_the_first_layer(arch, flash, tapped):
    """A probe: cells, positions, the states that leave it, and where text scores: q, k and mask, or the probabilities
    of each head. Two waits: for the states, and for the attention that ends it.
    """
    context, layer = tapped(arch, flash), L // 2
    rows = rows_of(arch, N, start=70)
    states = np.empty((N, D), np.float32)
    n_bytes = N * n_positions(arch) * POSITION
    context.tap.take_traffic()
    decode(context, rows, window=(0, layer, L), hidden=states, want_cells=True)
    assert traffic_of(context) == (2, 2, 1, N * CELL + N * D * VALUE, n_bytes)
    context.remove(0, 0)
    attention = AttentionRead([layer], 2048, (N - 4, 4, 1), MEAN_ALL)
    decode(context, rows, window=(0, layer, L), hidden=states, want_cells=True, attention=attention)
    n_stops, n_reads, n_writes, _, _ = traffic_of(context)
    assert (n_stops, n_writes) == (2, 1)
    assert n_reads == 2 + (3 if flash else HEADS)


@kinds
def test_a_window_to_the_last_layer(arch, flash, tapped):
    """A resume: cells, positions, and the states that enter it. One wait, for the node whose place they take."""
    context, layer = tapped(arch, flash), L // 2
    rows = rows_of(arch, N, start=70)
    states = np.zeros((N, D), np.float32)
    decode(context, rows, window=(0, layer, L), hidden=states, want_cells=True)
    context.remove(0, 0)
    context.tap.take_traffic()
    decode(context, Rows(rows.positions), window=(layer, L, L), inject=states, want_cells=True)
    n_bytes = N * n_positions(arch) * POSITION
    assert traffic_of(context) == (1, 1, 2, N * CELL, N * D * VALUE + n_bytes)


# Of a decode: stops, reads, writes
PREFIX = (0, 1, 0)  # cells
PROBE = (2, 2, 1)  # the states that leave it and its end; cells, states; positions
SCORES = (0, 3, 0)  # q, k, mask
RESUME = (1, 1, 2)  # where states come in; cells; positions, states
TOKEN = (0, 1, 1)  # positions
MOVED = (0, 0, 1)  # positions
MASSES = (0, 1, 1)  # in the mask
LEVEL = (1, 0, 1)  # the mask once more, where what was dropped is no longer seen


def total(*parts):
    return tuple(sum(numbers) for numbers in zip(*parts))


@pytest.fixture(scope="module")
def vlm():
    options = dict(n_ctx=1024, n_threads=1, image_cache_bytes=0, reuse=False)
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, **options) as engine:
        yield engine


@pytest.fixture
def decodes(monkeypatch):
    """Stops, reads and writes of each decode of a prompt."""
    seen, decode_rows = [], DecoderContext.decode

    def counted(self, *args, **options):
        self.tap.take_traffic()
        outcome = decode_rows(self, *args, **options)
        seen.append(traffic_of(self)[:3])
        return outcome

    monkeypatch.setattr(DecoderContext, "decode", counted)
    return seen


@pytest.mark.parametrize(
    ("config", "prefill", "token", "encoder"),
    [
        (None, [(0, 0, 0)] * 3, (0, 0, 0), (0, 0, 0)),
        (
            PruneConfig(0.3),
            [PREFIX, total(PREFIX, MOVED, MASSES), total(PREFIX, MOVED, MASSES)],
            total(TOKEN, MASSES),
            (0, 1, 0),
        ),
        (
            PruneConfig(0.3, 0.15, seen_below=False),
            [PREFIX, total(PROBE, MASSES), total(PROBE, SCORES, MASSES), total(RESUME, MASSES)],
            total(TOKEN, MASSES),
            (0, 1, 0),
        ),
        (
            PruneConfig(0.3, 0.15, seen_below=True, vision_share=0.5),
            [PREFIX, total(PROBE, MASSES), total(PROBE, SCORES, MASSES), total(RESUME, MASSES)],
            total(TOKEN, MASSES, LEVEL),
            (1, 3, 0),
        ),
        (
            PruneConfig(0.3, 0.15, representatives="none", vision_scorer="uniform", seen_below=False),
            [(0, 0, 0), PROBE, total(PROBE, SCORES), RESUME],
            TOKEN,
            (0, 1, 0),
        ),
    ],
)
def test_a_request(vlm, decodes, config, prefill, token, encoder):
    """Whatever the model's layers: so many stops, reads and writes for each decode, each token and each image."""
    vlm.encoder.tap.take_traffic()
    answer = vlm.generate("what color is the star?", refvlm.DEMO_IMAGE, config, max_tokens=2)
    tokens = traffic_of(vlm.decoder)[:3]
    assert decodes == prefill
    assert answer.report.n_sampled == 2 and tokens == token  # the first token is the prompt's
    assert traffic_of(vlm.encoder)[:3] == encoder


@pytest.mark.parametrize(
    ("config", "one"),
    [
        (PruneConfig(0.3), [PREFIX, total(PREFIX, MOVED, MASSES), total(PREFIX, MOVED, MASSES)]),
        (PruneConfig(0.3, 0.15), [PREFIX, total(PROBE, MASSES), total(PROBE, SCORES, MASSES), total(RESUME, MASSES)]),
    ],
)
def test_images_side_by_side_cost_as_much_as_one(vlm, decodes, config, one):
    """Once the vision stage has dropped tokens. While they are whole, each has a decode in every window."""
    for n in (1, 2, 5):
        decodes.clear()
        _, report = vlm.read_prompt("what color is the star?", [refvlm.DEMO_IMAGE] * n, config)
        assert decodes == one and len(report.images) == n and report.n_vision_kept == n * 43
    decodes.clear()
    vlm.read_prompt("what color is the star?", [refvlm.DEMO_IMAGE] * 3, PruneConfig(decoder_layer=3))
    assert [n_stops for n_stops, _, _ in decodes] == [0, 2, 2, 2, 2, 1, 1, 1, 1]


def test_the_table_of_the_docs_is_reckoned_as_it_is_counted():
    """benchmarks/traffic.py: counts and bytes of a prompt with a decoder stage, from the model's sizes."""
    path = Path(__file__).parent.parent / "benchmarks" / "traffic.py"
    spec = importlib.util.spec_from_file_location("traffic", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["traffic"] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        counted, reckoned = module.compare()
        table = module.table()
    finally:
        del sys.modules["traffic"]
    assert counted == reckoned
    page = (path.parent.parent / "docs" / "gpu.md").read_text()
    assert len(table) > 4 and all(line in page for line in table)
