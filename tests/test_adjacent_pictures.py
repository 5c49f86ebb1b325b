"""Pictures of one size with nothing between them: some versions of libmtmd join them into one chunk."""

import numpy as np
from helpers.models import random_image

from star_edge import MEDIA_MARKER, StarVLM


def test_a_picture_is_not_taken_for_the_one_that_it_was_joined_with(families):
    """The image cache knows both pictures of a chunk."""
    models = families["qwen2vl"]
    first, second, third = (random_image(seed, 112, 112) for seed in (1, 2, 3))
    prompt, logits = MEDIA_MARKER * 2 + "what is shown?", {}
    for cache in (0, 1 << 24):
        options = {"n_ctx": 512, "n_threads": 1, "image_cache_bytes": cache, "reuse": False}
        with StarVLM(models.text, models.mmproj, **options) as vlm:
            for images in ((first, second), (first, third)):
                state, _ = vlm.read_prompt(prompt, images, None, chat=False)
                logits[cache, id(images[1])] = state.logits
    assert not np.array_equal(logits[0, id(second)], logits[0, id(third)])
    for image in (second, third):
        assert np.array_equal(logits[1 << 24, id(image)], logits[0, id(image)])
