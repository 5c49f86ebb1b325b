"""After a request whose encoder computed less, one with everything kept equals a fresh engine's, bit for bit."""

import numpy as np
import pytest
from helpers.families import FOLDER, load_fixtures

from star_edge import PruneConfig, StarVLM

FIXTURES = load_fixtures()
ANY_SIZE = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5", "pixtral", "mistral3", "glm4.5v", "paddleocr-vl")
FIXED = ("smolvlm", "gemma3", "internvl", "gemma4", "lfm2-vl", "llava")
BOTH = PruneConfig(0.75, 0.5, redundancy=0.2, encoder_keep=0.75, encoder_layer=1)


def load(name):
    folder = FOLDER / name
    return StarVLM(folder / "text.gguf", folder / "mmproj.gguf", n_ctx=1024, n_threads=1)


def ask(vlm, fixture, config):
    prompt = fixture.prompts[0]
    state, report = vlm.read_prompt(prompt.text, prompt.pictures, config, chat=False)
    return state.logits.copy(), report


@pytest.mark.parametrize("name", ANY_SIZE + FIXED)
def test_keep_all_after_a_pruned_request(name):
    """With caches on: what was kept of the pruned request must not be taken for the whole. And the other way round."""
    fixture = FIXTURES[name]
    config = BOTH if name in ANY_SIZE else PruneConfig(0.75, 0.5, encoder_keep=0.75, encoder_layer=1)
    with load(name) as vlm:
        fresh, _ = ask(vlm, fixture, None)
    with load(name) as vlm:
        pruned, report = ask(vlm, fixture, config)
        assert report.encoder_layer == 1 and report.n_encoder_kept < report.n_image_tokens
        whole, report = ask(vlm, fixture, None)
        assert report.n_encoder_kept == report.n_image_tokens and report.n_redundant == 0
        assert np.array_equal(whole, fresh) and not np.array_equal(pruned, fresh)
        again, report = ask(vlm, fixture, config)
        assert report.n_encoder_kept < report.n_image_tokens
        assert np.array_equal(again, pruned)
