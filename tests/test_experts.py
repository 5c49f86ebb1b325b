"""Mixtures of experts: how surely rows of the fixtures choose theirs, and where a GPU computes with experts that lie in
host memory: there is no decoder stage then.
"""

import numpy as np
import pytest
from helpers import bounds, gpu, stock, stock_attention
from helpers.families import FOLDER, load_fixtures, tokenized

from star_edge import StarVLM
from star_edge.llamacpp import context
from star_edge.llamacpp.names import KV_TYPES

FIXTURE = FOLDER / "glm4.5v"
WITH_EXPERTS = {name: fixture for name, fixture in load_fixtures().items() if gpu.n_experts(fixture.text)}


class Reader(stock_attention.Reader):
    """Notes what each row chooses its experts by (llm_graph_context::build_moe_ffn): `scores`, of each layer a list of
    (rows, experts), one for each decode.
    """

    def __init__(self, llama):
        self.scores = {}
        super().__init__(llama)

    def _visit(self, node, asking, _):
        kind, _, layer = node.contents.name.decode().partition("-")
        if kind not in ("ffn_moe_probs", "ffn_moe_probs_biased") or not layer.isdigit():
            return not asking
        if not asking:
            got = self.scores.setdefault(int(layer), [])
            if kind == "ffn_moe_probs_biased":
                got.pop()
            got.append(stock_attention.values(node)[0])
        return True


def least_lead(fixture, prompt, segments):
    """(of all rows of a prompt in stock llama.cpp, what tools/fixtures/routers.py calls a lead; what stock rounds)."""
    cache = KV_TYPES["f32"]
    llama = stock.load(fixture.text, False, type_k=cache, type_v=cache, n_threads=1)
    reader = Reader(llama)
    logits = stock.run_segments(llama, segments, prompt.next_position)[0][0]
    llama.close()
    n_used, leads = gpu.metadata(str(fixture.text), "expert_used_count"), []
    for decodes in reader.scores.values():
        scores = np.concatenate(decodes)
        if len(scores) < len(prompt.tokens):
            continue  # of the last layer llama.cpp computes the last row alone
        if np.allclose(scores.sum(axis=1), 1.0):
            scores = np.log(scores)  # a softmax: the logits but for a constant of each row
        ordered = np.sort(scores, axis=1)[:, ::-1]
        deviation = (scores - scores.mean(axis=1, keepdims=True)).std()
        leads.append((ordered[:, n_used - 1] - ordered[:, n_used]).min() / deviation)
    assert leads
    return min(leads), bounds.rounding([(logits, prompt.logits)])


@pytest.mark.parametrize("name", list(WITH_EXPERTS))
def test_no_backend_turns_a_choice(name):
    """Another expert is another result, by a jump that no bound made of rounding explains. Each row of the fixtures
    leads by 5e-3 of a deviation, as the tool found out and stock finds too; a Vulkan device's routers have been off by
    1e-3.
    """
    fixture = WITH_EXPERTS[name]
    with fixture.engine() as vlm:
        for prompt, facts in zip(fixture.prompts, fixture.facts["prompts"]):
            assert min(f["expert_lead"] for f in (facts, *facts["cases"])) >= 5e-3
            with tokenized(vlm, prompt) as chunks:
                segments = prompt.segments(chunks)
            lead, rounding = least_lead(fixture, prompt, segments)
            assert lead >= facts["expert_lead"] - bounds.MEAN_FACTOR * rounding > 0


@pytest.mark.parametrize(
    ("has_gpu", "options", "is_refused"),
    [
        (False, {}, False),
        (True, {}, True),  # -ngl 0: the GPU takes the large products all the same
        (True, {"n_gpu_layers": 2}, True),
        (True, {"n_gpu_layers": -1}, False),
        (True, {"op_offload": False}, False),
        (True, {"op_offload": False, "n_gpu_layers": 2}, False),
    ],
)
def test_when_there_is_no_decoder_stage(monkeypatch, has_gpu, options, is_refused):
    monkeypatch.setattr(context, "can_offload", lambda: has_gpu)
    with StarVLM(FIXTURE / "text.gguf", FIXTURE / "mmproj.gguf", **{"n_ctx": 256, "n_gpu_layers": 0, **options}) as vlm:
        assert (vlm.decoder.stage_problem == context.EXPERTS_IN_HOST_MEMORY) is is_refused
        assert vlm.decoder.stage_problem is None or is_refused


def test_a_model_without_experts_is_not_concerned(monkeypatch):
    monkeypatch.setattr(context, "can_offload", lambda: True)
    with StarVLM(FOLDER / "llava" / "text.gguf", n_ctx=256, n_gpu_layers=2) as vlm:
        assert vlm.decoder.stage_problem is None
