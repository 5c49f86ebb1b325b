"""Engines and comparisons for the tests of what is kept from one request to the next."""

import contextlib

import llama_cpp
import numpy as np

from star_edge import StarVLM
from star_edge.llamacpp.context import N_SEQUENCES

QUESTIONS = ("what is this?", "where is the cat, and how many are there?")


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
        for name in (
            "cells",
            "vision_kept",
            "vision_scores",
            "vision_mass",
            "decoder_kept",
            "decoder_scores",
            "decoder_mass",
        ):
            a, b = getattr(image, name), getattr(want, name)
            assert (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b)), name
    return report


def first_tokens(vlm, prompt, images):
    """Text tokens before the first image."""
    with contextlib.closing(vlm.tokenize(prompt, images, chat=False)) as tokenized:
        return tokenized.chunks[0].tokens


def cells(vlm):
    """Positions of each sequence."""
    span = lambda s: (
        llama_cpp.llama_memory_seq_pos_min(vlm.decoder.memory, s),
        llama_cpp.llama_memory_seq_pos_max(vlm.decoder.memory, s),
    )
    return [span(s) for s in range(N_SEQUENCES)]


def answers(vlm, request, n=12):
    """Token by token, with logits: what is sampled from, so that masses, positions and cells while generating count."""
    state, _ = vlm.read_prompt(*request, chat=False)
    prompt = vlm._reader.hand_over(state)
    logits, tokens = [state.logits], []
    for _ in range(n):
        tokens.append(int(logits[-1].argmax()))
        vlm.llama.eval(tokens[-1:])
        logits.append(vlm.decoder.logits())
    assert len(prompt) == state.n_cells
    return np.array(logits)
