"""How a request ends before its answer does, and what it tells until then: timeouts, cancelling, progress."""

import io
import itertools
import threading

import numpy as np
import pytest
from helpers.chatting import COLOR, DEMO, PLATE, assistant, engine, usable, user
from helpers.models import random_image

from star_edge import PruneConfig, refvlm
from star_edge import request as requests
from star_edge.errors import ConfigError, RequestCancelledError, RequestTimeoutError
from star_edge.io.images import load_image


@pytest.fixture(scope="module")
def vlm():
    with engine() as vlm:
        yield vlm


# ---- timeouts and cancelling ----


@pytest.fixture
def clock(monkeypatch):
    """Time stands still, but for what a test adds: clock[0]."""
    now = [100.0]
    monkeypatch.setattr(requests, "perf_counter", lambda: now[0])
    return now


@pytest.fixture(scope="module")
def small():
    """Many decodes for a prompt."""
    with engine(n_ubatch=16, n_batch=16, image_cache_bytes=0, reuse=False) as vlm:
        yield vlm


@pytest.mark.parametrize("prune", [None, "balanced"])
def test_a_timeout_ends_the_reading_between_two_decodes(small, clock, prune):
    n_all = len(told := [])
    small.chat([user(DEMO, PLATE)], prune=prune, max_tokens=1, progress=told.append, timeout=5)
    n_all = sum(p.phase == "read" and p.done > 0 for p in told)
    assert n_all > 4
    reads = []

    def slow(progress):
        if progress.phase == "read" and progress.done > 0:
            reads.append(progress)
            clock[0] += 3.0  # the second is too late

    with pytest.raises(RequestTimeoutError, match="timeout=5 seconds have passed while the prompt was read") as caught:
        small.chat([user(DEMO, PLATE)], prune=prune, progress=slow, timeout=5)
    assert len(reads) == 2 and caught.value.text == "" and isinstance(caught.value, TimeoutError)
    assert usable(small)


def test_a_timeout_between_two_images(small, clock):
    told = []

    def slow(progress):
        told.append((progress.phase, progress.picture, progress.n_pictures))
        clock[0] += 3.0

    with pytest.raises(RequestTimeoutError, match="while the prompt was read"):
        small.generate("what?", [refvlm.DEMO_IMAGE, random_image(3, 168, 168)] * 2, progress=slow, timeout=5)
    assert told == [("encode", 1, 4), ("encode", 2, 4)]
    assert usable(small)


def test_a_timeout_while_pictures_are_loaded(vlm, clock):
    class Slow(io.BytesIO):
        def read(self, *size):
            clock[0] += 3.0
            return super().read(*size)

    with pytest.raises(RequestTimeoutError, match="while the pictures were loaded"):
        vlm.generate("what?", [Slow(refvlm.DEMO_IMAGE.read_bytes()) for _ in range(5)], timeout=5)
    assert usable(vlm)


@pytest.mark.parametrize("stream", [False, True])
def test_a_timeout_of_an_answer_has_its_text(vlm, clock, stream):
    n = []

    def slow(tokens, scores):
        n.append(0)
        clock[0] += 1.0
        return scores

    whole = vlm.generate("a b c", refvlm.DEMO_IMAGE, max_tokens=24, logit_bias={vlm.llama.token_eos(): -1e5}).text
    n.clear()
    options = {
        "max_tokens": 24,
        "timeout": 6.5,
        "logits_processor": [slow],
        "logit_bias": {vlm.llama.token_eos(): -1e5},
    }
    pieces = []
    with pytest.raises(RequestTimeoutError, match="while the answer was written") as caught:
        if stream:
            pieces += (piece for piece in vlm.generate("a b c", refvlm.DEMO_IMAGE, stream=True, **options))
        else:
            vlm.generate("a b c", refvlm.DEMO_IMAGE, **options)
    assert len(n) == 7 and 0 < len(caught.value.text) < len(whole) and whole.startswith(caught.value.text)
    assert usable(vlm)


def test_a_timeout_covers_the_wait_for_a_turn(vlm):
    holds, done = threading.Event(), threading.Event()

    def other():
        def processor(tokens, scores):
            holds.set()
            done.wait(60)
            return scores

        vlm.generate("x", max_tokens=1, logits_processor=[processor])

    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert holds.wait(60)
        with pytest.raises(RequestTimeoutError, match="before the request's turn came"):
            vlm.chat([user("x")], timeout=0.2)
        with vlm.cancellable(lambda: True), pytest.raises(RequestCancelledError):
            vlm.chat([user("x")])
    finally:
        done.set()
        thread.join()
    assert usable(vlm)


def test_a_request_is_cancelled_while_its_prompt_is_read(small):
    told, stop = [], threading.Event()

    def progress(p):
        told.append(p)
        if p.phase == "read" and p.done > 0.3:
            stop.set()

    with small.cancellable(stop.is_set), pytest.raises(RequestCancelledError):
        small.chat([user(DEMO, PLATE)], progress=progress)
    assert told[-1].done < 0.6  # no decode after it
    with pytest.raises(ConfigError, match="is_cancelled"), small.cancellable(5):
        pass
    assert usable(small)


def test_an_error_of_the_callback_ends_the_request(vlm):
    def fails(progress):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        vlm.generate(COLOR, random_image(9, 168, 168), progress=fails)
    assert usable(vlm)


# ---- progress ----


def test_progress_of_a_prompt_without_pruning(small):
    """Rows of each decode over all rows: counted from the prompt's chunks."""
    told = []
    small.generate(PLATE, refvlm.DEMO_IMAGE, None, 1, progress=told.append)
    prompt = small.tokenize(PLATE, [load_image(refvlm.DEMO_IMAGE)])
    sizes = [len(c.tokens) if hasattr(c, "tokens") else c.n_tokens for c in prompt.chunks]
    prompt.close()
    rows = [min(16, n - i) for n in sizes for i in range(0, n, 16)]
    assert [p.phase for p in told] == ["encode"] + ["read"] * (1 + len(rows))
    done = [p.done for p in told[1:]]
    assert done == pytest.approx([0, *np.cumsum(rows) / sum(rows)]) and done[-1] == 1
    assert told[1].seconds_left is None and told[-1].seconds_left == 0
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(told))
    assert (told[0].picture, told[0].n_pictures, told[0].done) == (1, 1, 0)


@pytest.mark.parametrize("prune", ["balanced", PruneConfig(windows=((2, 0.5), (4, 0.125)))], ids=str)
def test_progress_with_stages(small, prune):
    told = []
    small.generate(PLATE, [refvlm.DEMO_IMAGE] * 2, prune, 1, progress=told.append)
    phases = [p.phase for p in told]
    assert phases.count("choose") == 2  # vision and decoder, or two of the decoder
    read = [p.done for p in told if p.phase == "read"]
    assert read == sorted(read) and read[-1] == pytest.approx(1.0)  # the counts come out even
    assert phases[-1] == "read" and small.decoder.meter is None and small.encoder.before_run is None


def test_progress_counts_only_what_is_read(vlm):
    """What an earlier turn has left is neither encoded nor counted."""
    messages = [user(DEMO, COLOR), assistant(" red"), user(PLATE)]
    vlm.chat(messages[:1], max_tokens=1)
    told = []
    answer = vlm.chat(messages, max_tokens=1, progress=told.append)
    assert answer.report.reused_tokens and "encode" not in [p.phase for p in told]
    read = [p.done for p in told if p.phase == "read"]
    assert read[0] == 0 and read[-1] == pytest.approx(1.0)


def test_images_that_another_thread_encodes_are_not_the_request_s(vlm):
    """A server encodes the next request's pictures meanwhile: they are neither told of nor cancelled with this one."""
    prompt = vlm.tokenize("x", [random_image(31, 168, 168)])
    image = next(chunk for chunk in prompt.chunks if hasattr(chunk, "n_tokens"))
    told, errors, stop = [], [], threading.Event()

    def encode():
        try:
            vlm.encoder.encode(image, None)
        except BaseException as error:
            errors.append(error)

    def progress(p):
        told.append(p.phase)
        if p.phase == "read":
            stop.set()
            thread = threading.Thread(target=encode)
            thread.start()
            thread.join()

    with vlm.cancellable(stop.is_set), pytest.raises(RequestCancelledError):
        vlm.generate("x", random_image(32, 168, 168), progress=progress)
    prompt.close()
    assert told == ["encode", "choose", "read"] and not errors
