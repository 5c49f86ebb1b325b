"""No leak: resident memory is flat over 500 requests of every kind."""

import contextlib

import psutil
from helpers.models import random_image

from star_edge import PruneConfig, StarEdgeError, StarVLM, refvlm


def test_rss_is_flat_over_500_requests():
    images = [refvlm.DEMO_IMAGE, random_image(0, 300, 200), random_image(1, 168, 168)]
    configs = [None, "balanced", PruneConfig(1.0, 0.25, 4), PruneConfig(0.25, 1.0)]
    process = psutil.Process()
    sizes = []
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512) as vlm:
        for i in range(600):
            if i % 10 == 9:
                with contextlib.suppress(StarEdgeError):
                    vlm.generate("x", b"no image")
            elif i % 10 == 8:
                next(vlm.generate("is there a red star?", images[i % 3], configs[i % 4], stream=True))
            elif i % 50 == 7:
                vlm.inspect("is there a red star?", images[0], decoder_layers=[2], encoder_layers=[1])
            else:
                vlm.generate("is there a red star?", images[i % 3], configs[i % 4], max_tokens=4)
            if i >= 100:  # allocators settle first
                sizes.append(process.memory_info().rss)
    # a leak of one image's embeddings (144 x 256 float32) for each request would be 74 MB over 500 requests
    assert max(sizes) - sizes[0] < 12 * 2**20, [s - sizes[0] for s in sizes[::50]]
