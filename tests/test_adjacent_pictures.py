"""Pictures of one size with nothing between them: some versions of libmtmd join them into one chunk."""

import numpy as np
import pytest
from helpers.models import random_image

from star_edge import MEDIA_MARKER, StarVLM
from star_edge.llamacpp.mtmd import names_alone


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


@pytest.mark.parametrize("family", ["qwen2vl", "llama"])
def test_pictures_without_a_cache_are_not_taken_for_each_other(families, family):
    """Three, of which two that differ had one name where libmtmd may join them and nothing is known of their pixels."""
    models, side = families[family], 112 if family == "qwen2vl" else 28
    pictures, logits = [random_image(seed, side, side) for seed in (1, 2, 3)], []
    for cache in (0, 1 << 24):
        options = {"n_ctx": 512, "n_threads": 1, "image_cache_bytes": cache, "reuse": False}
        with StarVLM(models.text, models.mmproj, **options) as vlm:
            state, report = vlm.read_prompt(MEDIA_MARKER * 3 + "what is shown?", pictures, None, chat=False)
            assert [image.same_as for image in report.images] == [None] * len(report.images)
            logits.append(state.logits)
    assert np.array_equal(*logits)


def test_names_of_what_was_not_joined():
    assert names_alone(["0:a+b", "1:b+c", "2:c"]) == ["0:a", "1:b", "2:c"]
    assert names_alone(["0:a+b", "2:c+d"]) == ["0:a+b", "2:c+d"]
    assert names_alone(["0:a+b", "2:c+d", "3:d"]) == ["0:a+b", "2:c", "3:d"]
    assert names_alone(["", "0:", "1:", "x:a+b"]) == ["", "0:", "1:", "x:a+b"]
