"""Exact and in place at a real shape and real quantization: a random 1.1B Llama in Q4_K_M (670 MB, minutes). `make
test-slow`.
"""

import numpy as np
import pytest
from helpers import stock
from helpers.choosing import by_score, keep_all
from helpers.models import Models, random_prompt

from star_edge.decoder.prefill import DecoderStage, prefill
from star_edge.llamacpp.context import DecoderContext, attach_tap
from star_edge.llamacpp.tap import Tap
from star_edge.synthetic import TINYLLAMA_1B, write_decoder


@pytest.mark.slow
def test_one_billion_parameters_in_q4_k_m(tmp_path):
    models = Models(tmp_path / "m.gguf", None, TINYLLAMA_1B)
    write_decoder(models.text, TINYLLAMA_1B, "q4_k_m")
    prompt = random_prompt(models, [35, (24, 24), 40])
    plain = stock.load(models.text, True)
    expected, _ = stock.run_segments(plain, prompt.segments[:1], 0)
    for at in (0, 512):  # what libmtmd does with n_batch = 512
        rows = prompt.segments[1].rows.slice(at, min(at + 512, 576))
        stock.decode(plain, embeddings=rows.embeddings, positions=rows.positions)
    expected, _ = stock.run_segments(plain, prompt.segments[2:], 0)
    plain.close()
    tap = Tap()
    llama = stock.load(models.text, True)
    attach_tap(llama, tap)
    context = DecoderContext(llama, tap)
    for layer in (1, 11, 21):
        context.clear()
        state = prefill(context, prompt.segments, prompt.next_position, DecoderStage([(layer, [0])], keep_all))
        assert state.in_place and np.array_equal(state.logits, expected[0])
    context.clear()
    pruned = prefill(context, prompt.segments, prompt.next_position, DecoderStage([(11, [58])], by_score))
    assert pruned.in_place and pruned.n_cells == 35 + 58 + 40
    llama.close()
    tap.close()
