"""Whatever ends a request, the engine answers the next one: consumers that fail, Ctrl-C, failing decodes."""

import threading

import llama_cpp
import pytest
from helpers.chatting import PLATE, engine, usable

from star_edge import StarVLM, errors, refvlm
from star_edge.llamacpp import native


@pytest.fixture(scope="module")
def vlm():
    with engine(n_ctx=256) as vlm:
        yield vlm


@pytest.fixture(autouse=True)
def goes_on(vlm):
    yield
    assert usable(vlm)


def ask(vlm):
    return vlm.generate(PLATE, refvlm.DEMO_IMAGE, max_tokens=4)


def test_exception_in_a_streaming_consumer(vlm):
    with pytest.raises(ZeroDivisionError, match="in the consumer"):
        for _ in vlm.generate(PLATE, refvlm.DEMO_IMAGE, stream=True):
            raise ZeroDivisionError("in the consumer")


def test_ctrl_c_while_generating(vlm, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vlm.llama, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(vlm)


def test_ctrl_c_while_decoding(vlm, monkeypatch):
    """Interrupted among the windows: rows are parked, and the tap has just been armed."""
    original, calls = llama_cpp.llama_decode, []

    def interrupted(ctx, batch):
        calls.append(1)
        status = original(ctx, batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return status

    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "llama_decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(vlm)


def test_interrupt_right_after_arming(vlm, monkeypatch):
    """The tap is disarmed wherever an interrupt strikes."""
    original = native.lib.se_tap_arm

    class Interrupting:
        def __getattr__(self, name):
            return getattr(native.lib, name)

        def se_tap_arm(self, *args):
            original(*args)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("star_edge.llamacpp.tap.lib", Interrupting())
        with pytest.raises(KeyboardInterrupt):
            ask(vlm)


def test_threads_wait_for_each_other(vlm):
    """Two threads, one engine: every answer is right, none fails."""
    questions = refvlm.demo_questions()
    expected = [vlm.generate(q["question"], refvlm.DEMO_IMAGE, max_tokens=4).text for q in questions]
    answers = [[], []]

    def work(n):
        for _ in range(3):
            answers[n].append([vlm.generate(q["question"], refvlm.DEMO_IMAGE, max_tokens=4).text for q in questions])

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert answers == [[expected] * 3] * 2


def test_failing_decode_is_typed(vlm, monkeypatch):
    for status, error in ((1, errors.ContextLengthError), (-3, errors.EngineError)):
        with monkeypatch.context() as patch:
            patch.setattr(llama_cpp, "llama_decode", lambda ctx, batch, status=status: status)
            with pytest.raises(error):
                ask(vlm)


def test_abandoned_and_outdated_streams(vlm):
    first = vlm.generate(PLATE, refvlm.DEMO_IMAGE, stream=True)
    next(first)
    ask(vlm)
    with pytest.raises(errors.EngineClosedError, match="newer request"):
        next(first)


def test_closed_engine():
    engine = StarVLM(refvlm.TEXT_MODEL, n_ctx=128)
    engine.close()
    engine.close()
    for call in (
        lambda: engine.generate("hello"),
        lambda: engine.tokenize("hello", []),
        lambda: engine.inspect("hello"),
    ):
        with pytest.raises(errors.EngineClosedError, match="closed"):
            call()
    engine = StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=256)
    stream = engine.generate(PLATE, refvlm.DEMO_IMAGE, stream=True)
    engine.close()
    with pytest.raises(errors.EngineClosedError, match="the engine is closed"):
        next(stream)
