"""Mixtures of experts where a GPU computes with experts that lie in host memory: there is no decoder stage then."""

import pytest
from helpers.families import FOLDER

from star_edge import StarVLM
from star_edge.llamacpp import context

FIXTURE = FOLDER / "glm4.5v"


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
