"""Engines and comparisons for the tests of what is kept from one request to the next."""

import numpy as np

from star_edge import StarVLM


def engine(models, **options):
    return StarVLM(models.text, models.mmproj, **{"n_ctx": 512, "n_threads": 1, **options})


def fresh(models, request, **options):
    with engine(models, image_cache_bytes=0, **options) as vlm:
        return vlm.read_prompt(*request, chat=False)


def same(one, other):
    """Logits and everything in a report that is no time."""
    (state, report), (expected, wanted) = one, other
    assert np.array_equal(state.logits, expected.logits)
    for image, want in zip(report.images, wanted.images, strict=True):
        for name in ("cells", "vision_kept", "vision_scores", "vision_mass", "decoder_kept", "decoder_scores", "decoder_mass"):
            a, b = getattr(image, name), getattr(want, name)
            assert (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b)), name
    return report
