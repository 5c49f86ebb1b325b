"""With STAR_EDGE_TEST_GPU=1, engines and stock models of the tests put all layers and the encoder on the GPU
(benchmarks/gpu.sh test).
"""

import functools
import os

ON = os.environ.get("STAR_EDGE_TEST_GPU") == "1"


def install() -> None:
    """What is loaded without n_gpu_layers is loaded with -1."""
    import llama_cpp

    import star_edge
    import star_edge.engine

    for kind in (llama_cpp.Llama, star_edge.StarVLM):

        @functools.wraps(kind.__init__)
        def load(self, *args, _load=kind.__init__, **options):
            _load(self, *args, **{"n_gpu_layers": -1, **options})

        kind.__init__ = load
