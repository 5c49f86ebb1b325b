"""What hybrid decoders keep for the next prompt: two recurrent states, and rows that stay hidden in MAIN. Every answer
equals a fresh engine's. That a further question does is in test_reuse.py, and what must not be used again in
test_reuse_limits.py, with all other decoders.
"""

import contextlib

import numpy as np
import pytest
from helpers.models import random_image
from helpers.reusing import QUESTIONS, answers, engine, fresh, same

from star_edge import PruneConfig
from star_edge.vision.chunks import TextChunk

M = "<__media__>"
FAMILIES = ["qwen35", "lfm2"]
AT3, AT7 = (PruneConfig(1.0, 0.25, layer, representatives="none") for layer in (3, 7))


@pytest.mark.parametrize("family", FAMILIES)
def test_as_much_is_read_again_as_differs(families, family):
    """A state is there after the last image and after the text before the first, and nowhere else."""
    models = families[family]
    a, b = random_image(1), random_image(2)
    steps = [  # with what is used again: nothing, the prefix, or all up to the last image
        (f"one {M} two {M} three?", [a, b], AT3, None),
        (f"one {M} two {M} four?", [a, b], AT3, "stem"),
        (f"one {M} two {M} four?", [a, b], AT7, "prefix"),
        (f"one {M} two {M} five?", [a, b], AT7, "stem"),
        (f"one {M} two {M} five?", [a, b], None, "prefix"),
        (f"one {M} two {M} six?", [a, b], None, "stem"),
        (f"one {M} two {M} six?", [a, a], AT3, "prefix"),
        (f"one {M} two?", a, AT3, "prefix"),
        (f"one {M} three?", a, AT3, "stem"),
        (f"one {M} three? yes. four {M} five?", [a, b], AT3, "stem before"),
        (f"one {M} three? yes. four {M} six?", [a, b], AT3, "stem"),
        (f"one {M} three?", a, PruneConfig(0.5, 0.25, 3), "prefix"),  # other rows and masses
        (f"one {M} four?", a, PruneConfig(0.5, 0.25, 3), "stem"),
        ("hello", [], None, None),
        (f"one {M} four?", a, PruneConfig(0.5, 0.25, 3), None),
        (f"{M} y?", a, AT3, None),
        (f"{M} z?", a, AT3, "stem"),
        (f"{M} z?", b, AT3, "prefix"),
    ]
    with engine(models) as vlm:
        last = 0
        for i, (prompt, images, config, what) in enumerate(steps):
            report = same(vlm.read_prompt(prompt, images, config, chat=False), fresh(models, (prompt, images, config)))
            assert report.in_place
            chosen = images if isinstance(images, list) else [images]
            with contextlib.closing(vlm.tokenize(prompt, chosen, chat=False)) as tokenized:
                chunks = tokenized.chunks
                n_prefix = len(chunks[0].tokens) if isinstance(chunks[0], TextChunk) else 0
                stem = report.n_text_tokens - len(chunks[-1].tokens) + report.n_vision_kept
            wanted = {None: 0, "prefix": n_prefix, "stem": stem, "stem before": last}[what]
            assert report.reused_tokens == wanted, (i, prompt)
            last = stem
            if i % 3 == 1:
                answers(vlm, (prompt, images, config), 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_decoder_stages(families, family):
    models = families[family]
    config = PruneConfig(0.8, windows=((3, 0.4), (7, 5)))
    with engine(models) as vlm:
        for i, question in enumerate((*QUESTIONS, "x")):
            request = (f"ab {M} {question}", random_image(1), config)
            report = same(vlm.read_prompt(*request, chat=False), fresh(models, request))
            assert bool(report.reused_tokens) is (i > 0) and report.in_place
            answers(vlm, request, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_owner_finds_the_llama_as_if_nothing_had_been_asked(families, family):
    models = families[family]
    with engine(models, n_ctx=256) as vlm:
        complete = lambda: vlm.llama.create_completion("x" * 60, max_tokens=20, temperature=0.0)["choices"][0]["text"]
        expected = complete()
        for _ in range(2):
            vlm.generate(f"ab {M} c", random_image(1), "star", max_tokens=3, chat=False)
            assert complete() == expected and vlm.llama._ctx.stem is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_answer_takes_the_cells_of_the_stem(families, family):
    """The context is as large as without reuse. Rows that come into cells of dropped ones are seen."""
    request = (f"ab {M} {QUESTIONS[0]}", random_image(1), PruneConfig(1.0, 5, 3, representatives="none"))
    logits = []
    for reuse in (True, False):
        with engine(families[family], n_ctx=256, reuse=reuse) as vlm:
            state, _ = vlm.read_prompt(*request, chat=False)
            logits.append(answers(vlm, request, 256 - state.n_cells - 1))
            assert vlm.llama._ctx.stem is None
    assert len(logits[0]) > 150 and np.array_equal(logits[0][0], logits[1][0])
    n = next((i for i, (a, b) in enumerate(zip(*logits)) if a.argmax() != b.argmax()), len(logits[0]))
    # the answer's rows lie in other cells, which rounds otherwise
    assert np.abs(logits[0][:n] - logits[1][:n]).max() < 0.1 * logits[0].std()


@pytest.mark.parametrize("family", FAMILIES)
def test_seen_below(families, family):
    """Dropped rows that the answer sees in lower layers stay, and are gone for the next prompt."""
    models = families[family]
    plain, seen = (PruneConfig(1.0, 0.2, 3, representatives="none", seen_below=below) for below in (False, True))
    got = {}
    for reuse in (True, False):
        with engine(models, reuse=reuse) as vlm:
            for name, config in (("seen", seen), ("plain", plain), ("seen", seen)):
                logits = answers(vlm, (f"ab {M} c", random_image(1), config), 8)
                # Cells that are free without reuse are taken by the answer's rows, which rounds otherwise.
                assert np.array_equal(logits, got.setdefault((name, reuse), logits))
        assert np.array_equal(got["seen", reuse][0], got["plain", reuse][0])
        assert not np.array_equal(got["seen", reuse][1], got["plain", reuse][1])
    assert np.array_equal(got["seen", True], got["seen", False])  # they keep their cells in both
