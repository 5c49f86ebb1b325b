"""A saved sequence goes back into an empty cache: row i into cell i, bit for bit (llama_kv_cache::state_read)."""

import numpy as np
import pytest
from helpers.reusing import cells, engine

from star_edge.llamacpp.context import MAIN, PARKED
from star_edge.llamacpp.saved_rows import restore_rows, save_rows

PROMPTS = ("the first prompt is of some length", "another one")


@pytest.mark.parametrize("family", ["llama", "qwen2vl", "qwen35", "lfm2"])
def test_rows_come_back_bit_for_bit_and_to_their_cells(families, family):
    with engine(families[family]) as vlm:
        decoder = vlm.decoder
        vlm.read_prompt(PROMPTS[0], chat=False, prune=None)
        sequence = MAIN if decoder.is_hybrid else PARKED
        spans, data = cells(vlm), save_rows(vlm.llama, sequence, 2**40)
        size = len(data)
        assert save_rows(vlm.llama, sequence, size - 1) is None
        own = data.copy()
        decoder.clear()
        vlm.read_prompt(PROMPTS[1], chat=False, prune=None)
        decoder.clear()
        restore_rows(vlm.llama, sequence, data)
        assert np.array_equal(own, data)
        assert cells(vlm)[sequence] == spans[sequence]
        assert np.array_equal(save_rows(vlm.llama, sequence, 2**40), data)
