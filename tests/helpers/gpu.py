"""What of the models a GPU computes in the tests: STAR_EDGE_TEST_GPU (tools/vulkan.py, benchmarks/gpu.sh test).

unset: nothing. "all" or 1: all layers and the encoder. "half": the encoder, and the upper half of the decoder's
layers. "encoder": the encoder alone; llama.cpp hands the large matrix products of the decoder's prefill to the GPU all
the same.
"""

import functools
import os

import gguf

PLACEMENTS = ("all", "half", "encoder")
PLACEMENT = {"": None, "1": "all"}.get(os.environ.get("STAR_EDGE_TEST_GPU", ""), os.environ.get("STAR_EDGE_TEST_GPU"))
ON = PLACEMENT is not None


@functools.cache
def metadata(path: str, key: str) -> int:
    """A number of the architecture, 0 if it has none."""
    fields = gguf.GGUFReader(path).fields
    field = fields.get(f"{fields['general.architecture'].contents()}.{key}")
    return int(field.contents()) if field else 0


def n_experts(path: object) -> int:
    return metadata(os.fspath(path), "expert_count")


def n_gpu_layers(path: object) -> int:
    """As llama_cpp.Llama takes it: the output layer is counted too, and layers come off the top."""
    if PLACEMENT == "half":
        return (metadata(os.fspath(path), "block_count") + 1) // 2
    return -1 if PLACEMENT == "all" else 0


def install() -> None:
    """What is loaded without n_gpu_layers, or without use_gpu, goes where PLACEMENT says."""
    assert PLACEMENT in PLACEMENTS, f"STAR_EDGE_TEST_GPU={PLACEMENT} is none of {PLACEMENTS}"
    import llama_cpp

    import star_edge
    import star_edge.engine
    from star_edge.vision.encoder import VisionEncoder

    assert llama_cpp.llama_supports_gpu_offload(), "STAR_EDGE_TEST_GPU is set, and this llama-cpp-python sees no GPU"

    for kind, name in ((llama_cpp.Llama, "model_path"), (star_edge.StarVLM, "model")):

        @functools.wraps(kind.__init__)
        def load(self, *args, _load=kind.__init__, _name=name, **options):
            if "n_gpu_layers" not in options:
                options["n_gpu_layers"] = n_gpu_layers(args[0] if args else options[_name])
            _load(self, *args, **options)

        kind.__init__ = load

    @functools.wraps(VisionEncoder.__init__)
    def load_encoder(self, *args, _load=VisionEncoder.__init__, **options):
        _load(self, *args, **{**options, "use_gpu": True})

    VisionEncoder.__init__ = load_encoder
    if os.environ.get("STAR_EDGE_TEST_STOCK") == "1":
        leave_out_the_tap()


def leave_out_the_tap() -> None:
    """With STAR_EDGE_TEST_STOCK=1 no context gets a callback: what a test decodes and encodes is then the work of stock
    llama.cpp alone.

    Its assertions mean nothing then, and fail. It shows whether stock itself ends the process with these calls.
    """
    from contextlib import contextmanager

    import numpy as np

    from star_edge.llamacpp.tap import MEAN_HEADS, MEAN_ROWS, Tap

    armed = Tap.armed

    @contextmanager
    def armed_without(self, plan, what):
        with armed(self, plan, what) as outcome:
            yield outcome
        read = plan.attention
        if read is not None:  # something to choose by, so that the test goes on to its next decode
            shape = () if read.reduce & MEAN_ROWS else (read.max_rows,)
            shape = (*(() if read.reduce & MEAN_HEADS else (read.max_heads,)), *shape, read.max_columns)
            outcome.attention = [np.zeros(shape, np.float32) for _ in read.layers]

    Tap.armed, Tap.callback = armed_without, property(lambda self: 0)
