"""What StarChatHandler leaves behind in a Llama: nothing. Texts, streams, threads, and the life of both."""

import functools
import threading
import weakref

import llama_cpp
import numpy as np
import pytest
from helpers.chatting import COLOR, DEMO, OTHER, PLATE, ask, bare, complete, load, raise_it, streamed, text_of, user
from helpers.presets import kept
from llama_cpp import LogitsProcessorList
from llama_cpp.llama_cache import LlamaRAMCache

from star_edge import StarChatHandler, errors, refvlm
from star_edge.reader import PromptReader

# ---- nothing is left behind ----


def test_text_is_completed_as_before(llm, text_alone):
    ask(llm)
    assert complete(llm) == text_alone
    list(ask(llm, stream=True))
    assert complete(llm) == text_alone
    stream = ask(llm, stream=True)  # not begun
    assert complete(llm) == text_alone
    stream = ask(llm, stream=True)
    next(stream)
    stream.close()
    assert complete(llm) == text_alone
    stream = ask(llm, stream=True)
    next(stream)
    assert complete(llm) == text_alone  # in the middle of the stream
    with pytest.raises(errors.EngineClosedError, match="ended this stream"):
        list(stream)
    assert complete(llm) == text_alone


def test_states_of_texts_are_restored_as_before(llm, monkeypatch):
    """A state that Llama.load_state brings back is longer than the prompt of the last request, and has positions of its
    own.
    """
    prompt = "is there a red star? " * 8

    def go_on(llm):
        seen = []
        capture = lambda tokens, scores: seen.append(scores.copy()) or scores
        llm.create_completion(
            prompt + PLATE, max_tokens=2, temperature=0.0, logits_processor=LogitsProcessorList([capture])
        )
        return np.array(seen)

    plain = load(None)
    plain.create_completion(prompt, max_tokens=1)  # so that both decode the same rows at a time
    expected = go_on(plain)
    plain.close()
    llm.set_cache(LlamaRAMCache())
    llm.create_completion(prompt, max_tokens=1)
    ask(llm)
    assert np.array_equal(go_on(llm), expected)
    list(ask(llm, stream=True))
    assert np.array_equal(go_on(llm), expected)
    stream = ask(llm, stream=True)
    next(stream)
    stream.close()
    assert np.array_equal(go_on(llm), expected)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm, "sample", functools.partial(raise_it, KeyboardInterrupt()))
        ask(llm)
    assert np.array_equal(go_on(llm), expected)
    llm.set_cache(None)


def test_a_state_ends_a_stream_that_is_under_way(llm):
    """Its prompt's positions and masses are not those of the state, and the stream cannot go on from another's rows."""
    prompt = "is there a red star? " * 8
    end = llm.tokenize(PLATE.encode(), add_bos=False)

    def go_on(llm, state):
        llm.load_state(state)
        llm.eval(end)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).copy()

    llm.reset()
    llm.eval(llm.tokenize(prompt.encode()))
    state = llm.save_state()
    expected = go_on(llm, state)
    stream = ask(llm, stream=True)
    next(stream)
    assert llm._ctx._n_prompt < state.n_tokens
    assert np.array_equal(go_on(llm, state), expected)
    with pytest.raises(errors.EngineClosedError, match="ended this stream"):
        next(stream)
    llm.reset()


def test_requests_do_not_see_each_other(llm, handler):
    questions = [
        (user(DEMO, COLOR), "balanced"),
        (user(DEMO, PLATE), None),
        (user(OTHER, COLOR), "fast"),
        (user("hello"), None),
    ]
    answers = {}
    for cache in (None, LlamaRAMCache()):  # the ids in the cache are the same for any image
        llm.set_cache(cache)
        for i in (0, 1, 2, 3, 3, 0, 2, 1, 0):
            with handler.pruning(questions[i][1]):
                answer = bare(ask(llm, questions[i][0], max_tokens=8, temperature=3.0, seed=1))
            assert answers.setdefault(i, answer) == answer
    llm.set_cache(None)
    assert len({text_of(a) for a in answers.values()}) > 1


def test_streams(llm):
    expected = text_of(ask(llm, user(DEMO, PLATE), max_tokens=8))
    first = ask(llm, stream=True)
    next(first)
    second = ask(llm, user(DEMO, PLATE), max_tokens=8, stream=True)
    with pytest.raises(errors.EngineClosedError, match="newer request"):
        next(first)
    assert streamed(second) == expected
    finished = ask(llm, stream=True)
    while next(finished)["choices"][0]["finish_reason"] is None:
        pass
    ask(llm)
    assert list(finished) == []  # it had said everything
    for _ in range(3):  # dropped, while another one goes on
        dropped = ask(llm, stream=True)
        next(dropped)
        last = ask(llm, user(DEMO, PLATE), max_tokens=8, stream=True)
        start = [next(last), next(last)]
        del dropped
        assert streamed([*start, *last]) == expected


def test_dropping_a_stream_does_not_wait(llm, handler):
    stream = ask(llm, stream=True)
    next(stream)
    held, release = threading.Event(), threading.Event()

    def busy():
        with handler._lock:
            held.set()
            release.wait(10)

    thread = threading.Thread(target=busy)
    thread.start()
    held.wait(10)
    closer = threading.Thread(target=stream.close)
    closer.start()
    closer.join(5)
    alive = closer.is_alive()
    release.set()
    thread.join()
    assert not alive
    assert text_of(ask(llm)) == " red"


def test_threads_take_turns(llm):
    expected = {question: text_of(ask(llm, user(DEMO, question), max_tokens=8)) for question in (COLOR, PLATE)}
    wrong = []

    def run(question):
        for _ in range(3):
            try:
                answer = text_of(ask(llm, user(DEMO, question), max_tokens=8))
            except Exception as error:
                answer = error
            if answer != expected[question]:
                wrong.append(answer)

    threads = [threading.Thread(target=run, args=(q,)) for q in (COLOR, PLATE)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert wrong == []


# ---- life of the Llama ----


def test_a_llama_that_is_let_go_is_freed_at_once():
    handler = StarChatHandler(refvlm.MMPROJ)
    llm = load(handler)
    expected = text_of(ask(llm))
    gone = weakref.ref(llm)
    del llm
    assert gone() is None  # no reference cycle keeps its memory until the next collection
    llm = load(handler)  # and the handler can serve another
    assert text_of(ask(llm)) == expected
    llm.close()


def test_a_handler_serves_one_llama(llm, handler):
    other = load(handler)
    with pytest.raises(errors.ConfigError, match="serves another Llama"):
        ask(other)
    other.close()
    assert text_of(ask(llm)) == " red"


def test_two_handlers_on_one_llama(llm, handler):
    second = StarChatHandler(refvlm.MMPROJ, prune="fast")
    llm.chat_handler = second
    assert ask(llm)["star_edge"]["average_tokens"] == kept("fast").average
    llm.chat_handler = handler
    stream = ask(llm, stream=True)
    llm.chat_handler = second
    ask(llm)
    llm.chat_handler = handler
    with pytest.raises(errors.EngineClosedError):
        next(stream)
    assert ask(llm)["star_edge"]["average_tokens"] == 36


def test_closed():
    handler = StarChatHandler(refvlm.MMPROJ)
    llm = load(handler)
    stream = ask(llm, stream=True)
    next(stream)
    state = llm.save_state()
    llm.close()
    with pytest.raises(errors.EngineClosedError, match="the Llama is closed"):
        llm.load_state(state)
    with pytest.raises(errors.EngineClosedError, match="the Llama is closed"):
        next(stream)
    with pytest.raises(errors.EngineClosedError, match="the Llama is closed"):
        ask(llm)
    llm.close()


def test_the_reader_does_not_keep_a_llama(families):
    llm = load(None, families["llama"].text)
    reader = PromptReader(llm, None)
    gone = weakref.ref(llm)
    del llm
    assert gone() is None and reader.encoder is None
