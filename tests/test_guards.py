"""No argument of a request, no callback and no text ends the process, hangs it or is silently ignored; the next request
is answered.

Arguments are derived from the signatures: every parameter gets values of every other type.
"""

import base64
import copy
import ctypes
import inspect
import pickle
import threading

import gguf
import llama_cpp
import numpy as np
import pytest
from helpers.chatting import COLOR, DEMO, load, streamed, text_of, user
from helpers.chatting import ask as chat
from helpers.gguf_files import rewrite
from helpers.models import random_image
from helpers.odd_values import VALUES
from llama_cpp import Llama
from llama_cpp.llama_chat_format import MTMDChatHandler

from star_edge import PruneConfig, StarChatHandler, StarVLM, errors, refvlm
from star_edge.arguments import parameters
from star_edge.asked import SAMPLING
from star_edge.llamacpp.guarded import RANGES, check_length, guard

QUESTION = "what color is the star?"
LONE_BYTE = 258  # a token of the byte 0xFF, which no UTF-8 has


@pytest.fixture(scope="module")
def vlm():
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_threads=1) as engine:
        engine.expected = engine.generate(QUESTION, refvlm.DEMO_IMAGE, max_tokens=4).text
        yield engine


@pytest.fixture
def ask(vlm):
    """Asks; afterwards the engine is as good as before."""
    yield lambda prompt="x", images=(), **options: vlm.generate(prompt, images, **{"max_tokens": 5, **options})
    assert vlm.generate(QUESTION, refvlm.DEMO_IMAGE, max_tokens=4).text == vlm.expected


# ---- every argument of every public call ----


@pytest.mark.parametrize(
    "name",
    # progress: a function that fails fails with an error of its own
    [n for n in parameters(StarVLM.generate) if n not in ("prompt", "images", "prune", "progress")] + sorted(SAMPLING),
)
def test_arguments_of_generate(vlm, name):
    """Each value is answered or refused with a typed error that names the argument, before anything is computed."""
    for value in VALUES.values():
        try:
            result = vlm.generate("x", **{"max_tokens": 2, name: value})
            if name == "stream" and value is True:
                list(result)
        except (errors.ConfigError, errors.ContextLengthError) as error:
            assert name in str(error) and "\n" not in str(error), (name, value, str(error))
    assert vlm.generate(QUESTION, refvlm.DEMO_IMAGE, max_tokens=4).text == vlm.expected


@pytest.mark.parametrize("name", [n for n in parameters(Llama.create_chat_completion) if n != "messages"])
def test_options_of_chat_completions(llm, name):
    for value in VALUES.values():
        try:
            result = chat(llm, user("x"), **{"max_tokens": 2, name: value})
            if name == "stream" and value is True:
                list(result)
        except errors.ConfigError as error:
            assert "\n" not in str(error), (name, value, str(error))
    assert text_of(chat(llm)) == " red"


@pytest.mark.parametrize("name", [n for n in parameters(StarVLM.__init__) if n not in ("model", "mmproj")])
def test_arguments_of_the_constructor(name):
    """Of a file that is not there: a value is refused by its name, or it is the file's turn."""
    for value in VALUES.values():
        with pytest.raises((errors.ConfigError, errors.ModelFileError)) as caught:
            StarVLM("nowhere.gguf", **{name: value})
        assert isinstance(caught.value, errors.ModelFileError) or name in str(caught.value)


@pytest.mark.parametrize("directory", ["", "\0x", 5])
def test_image_cache_directories(directory):
    with pytest.raises(errors.ConfigError, match="image_cache_dir"):
        StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=64, image_cache_dir=directory)


@pytest.mark.parametrize("call", ["inspect", "read_prompt"])
def test_arguments_of_other_calls(vlm, call):
    method = getattr(vlm, call)
    for name in parameters(getattr(StarVLM, call)):
        if name not in ("prompt", "images", "prune"):
            with pytest.raises(errors.ConfigError, match=name):
                method(QUESTION, refvlm.DEMO_IMAGE, **{name: 1.5})
    assert vlm.generate(QUESTION, refvlm.DEMO_IMAGE, max_tokens=4).text == vlm.expected


def test_every_number_of_create_completion_has_a_range():
    numbers = {name for name, hint in parameters(Llama.create_completion).items() if hint in (int, float)}
    assert numbers <= set(RANGES)


def test_numbers_of_numpy(ask):
    assert ask(
        QUESTION,
        refvlm.DEMO_IMAGE,
        max_tokens=np.int64(4),
        temperature=np.float32(0),
        seed=np.uint32(3),
        top_k=np.int16(5),
    ).text


def test_ranges(ask):
    for option in (
        {"temperature": -1},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"mirostat_mode": 3},
        {"repeat_penalty": 0},
        {"tfs_z": 0.5},
        {"stop": [""]},
    ):
        with pytest.raises(errors.ConfigError, match=next(iter(option))):
            ask(**option)
    with pytest.raises(errors.ConfigError, match="token 448.*0 to 447"):
        ask(logit_bias={448: 1.0})


# ---- options that were ignored ----


def test_logprobs(refuses):
    refuses(errors.ConfigError, "logits_all=True", logprobs=True)
    refuses(errors.ConfigError, "without logprobs", top_logprobs=2)
    llm = load(StarChatHandler(refvlm.MMPROJ), logits_all=True)
    content = chat(llm, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert content[0]["token"] == " red" and content[0]["logprob"] <= 0
    assert chat(llm, logprobs=False)["choices"][0]["logprobs"] is None
    llm.close()


def test_options_and_template_variables(llm):
    call = lambda **options: llm.chat_handler(
        llama=llm, messages=[user(DEMO, COLOR)], max_tokens=4, temperature=0, **options
    )
    for option in (
        {"n": 2},
        {"stream_options": {}},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"chat_template_kwargs": 3},
        {"bogus": None},
    ):
        with pytest.raises(errors.ConfigError, match="neither an option|chat_template_kwargs"):
            call(**option)
    template = llm.metadata["tokenizer.chat_template"] + "{{ last | default('') }}"
    llm = load(StarChatHandler(refvlm.MMPROJ, chat_template=template))
    plain = call()["usage"]["prompt_tokens"]
    assert (
        call(last="abc")["usage"]["prompt_tokens"]
        == call(chat_template_kwargs={"last": "abc"})["usage"]["prompt_tokens"]
        > plain
    )
    llm.close()


def test_bias_and_processor_hold_together(vlm, ask):
    """Llama drops both where both are given."""
    a, b = (vlm.llama.tokenize(text.encode(), add_bos=False)[-1] for text in ("a", "b"))
    seen = []
    answer = ask(
        logit_bias={a: 100.0, b: 99.0}, logits_processor=[lambda ids, scores: seen.append(1) or scores], max_tokens=2
    )
    assert answer.text.replace(" ", "") == "aa" and len(seen) == 2


# ---- answers that do not end ----


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 5])
def test_max_tokens_holds_inside_a_character(vlm, ask, llm, n, stream):
    answer = ask(logit_bias={LONE_BYTE: 100.0}, max_tokens=n, stream=stream)
    assert "".join(answer) == answer.text if stream else isinstance(answer.text, str)
    assert answer.finish_reason == "length" and answer.report.n_generated in (n, n + 1)
    answer = chat(llm, logit_bias={LONE_BYTE: 100.0}, max_tokens=n, stream=stream)
    if stream:
        assert list(answer)[-1]["choices"][0]["finish_reason"] == "length"
    else:
        assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == n


def test_an_unfinished_character_fills_the_context():
    with StarVLM(refvlm.TEXT_MODEL, n_ctx=32, n_threads=1) as small:
        answer = small.generate("x", max_tokens=None, logit_bias={LONE_BYTE: 100.0})
        assert answer.finish_reason == "length" and small.generate("x", max_tokens=2).text


def test_users_criteria_still_stop(ask):
    answer = ask(QUESTION, refvlm.DEMO_IMAGE, stopping_criteria=[lambda ids, logits: True])
    assert answer.finish_reason == "stop" and answer.text == ""


def test_streams_that_yield_nothing_are_cancelled(llm):
    """The client's departure is seen before the next decode, wherever the stream is read."""
    handler, gone, n = llm.chat_handler, threading.Event(), []

    def processor(ids, scores):
        n.append(1)
        if len(n) == 3:
            gone.set()
        return scores

    with handler.cancellable(gone.is_set):
        stream = chat(llm, logit_bias={LONE_BYTE: 100.0}, logits_processor=[processor], stream=True, max_tokens=300)
    assert handler._reader.context.is_cancelled is None
    with pytest.raises(errors.RequestCancelledError):
        list(stream)
    assert len(n) == 3
    assert handler._reader.context.is_cancelled is None
    assert text_of(chat(llm)) == " red" and streamed(chat(llm, stream=True)) == " red"


def test_close_ends_a_piece_that_another_thread_waits_for(vlm, ask):
    begun, caught = threading.Event(), []
    stream = ask(
        logit_bias={LONE_BYTE: 100.0}, max_tokens=None, stream=True, logits_processor=[lambda ids, s: begun.set() or s]
    )

    def read():
        with pytest.raises(errors.RequestCancelledError) as cancelled:
            next(stream)
        caught.append(cancelled)

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait()
    stream.close()
    reader.join()
    assert caught


# ---- long text ----


def test_long_text_is_refused_before_it_is_tokenized(vlm, ask, llm, refuses, monkeypatch):
    def must_not_run(*args, **kwargs):
        raise AssertionError("tokenized")

    text = "x" * 1_000_000
    with monkeypatch.context() as patch:
        patch.setattr(vlm.llama.tokenizer_, "tokenize", must_not_run)
        patch.setattr(llama_cpp.mtmd_cpp, "mtmd_tokenize", must_not_run)
        for options in ({}, {"chat": False}):
            with pytest.raises(errors.ContextLengthError, match="1000000 bytes"):
                ask(text, **options)
        with pytest.raises(errors.ContextLengthError, match="bytes, which"):
            chat(llm, user(DEMO, text))
        with pytest.raises(errors.ContextLengthError, match="bytes, which"):
            llm.create_completion(text)


def test_no_text_that_fits_is_refused(vlm):
    """The densest text is the longest token again and again."""
    pieces = [vlm.llama.detokenize([token], special=True) for token in range(vlm.llama.n_vocab())]
    longest = max((p for p in pieces if p.isascii()), key=len).decode()
    check_length(vlm.llama, longest * vlm.llama.n_ctx())
    with pytest.raises(errors.ContextLengthError):
        check_length(vlm.llama, "x" * 100 * vlm.llama.n_ctx())


# ---- callbacks, copies ----


@pytest.mark.parametrize("where", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize(
    "act",
    [
        lambda v: v.close(),
        lambda v: v.llama.close(),
        lambda v: v.generate("y"),
        lambda v: v.read_prompt("y"),
        lambda v: v.inspect("y"),
        lambda v: v.llama.create_completion("y", max_tokens=1),
    ],
    ids=["close", "close-llama", "generate", "read_prompt", "inspect", "create_completion"],
)
def test_callbacks_cannot_pull_the_engine_away(vlm, ask, where, act):
    for stream in (False, True):
        with pytest.raises(errors.EngineClosedError, match="busy"):
            list(ask(**{where: [lambda ids, scores: act(vlm)]}, stream=stream))


def test_callbacks_of_the_handler(llm):
    handler = llm.chat_handler

    def closing(url):
        llm.close()

    original, handler.image_loader = handler.image_loader, closing
    try:
        with pytest.raises(errors.EngineClosedError, match="busy"):
            chat(llm)
    finally:
        handler.image_loader = original
    with handler.cancellable(llm.close), pytest.raises(errors.EngineClosedError, match="busy"):
        chat(llm)
    with pytest.raises(errors.EngineClosedError, match="busy"):
        chat(llm, logits_processor=[lambda ids, scores: chat(llm)])
    with pytest.raises(errors.EngineClosedError, match="busy"):
        list(chat(llm, stream=True, logits_processor=[lambda ids, scores: llm.close()]))
    assert text_of(chat(llm)) == " red"


def test_a_stream_closed_by_its_own_callback(vlm, ask):
    stream = ask(stream=True, logits_processor=[lambda ids, scores: stream.close()])
    with pytest.raises((errors.EngineClosedError, errors.RequestCancelledError)):
        list(stream)


def test_exceptions_of_callbacks_come_out(ask):
    class Mine(Exception):
        pass

    def fail(ids, scores):
        raise Mine

    for option in ({"logits_processor": [fail]}, {"stopping_criteria": [fail]}):
        with pytest.raises(Mine):
            ask(**option)
    with pytest.raises(errors.ConfigError, match="NaN"):
        ask(logits_processor=[lambda ids, scores: scores * np.float32("nan")])
    with pytest.raises(errors.ConfigError, match="leaves no token"):
        ask(logits_processor=[lambda ids, scores: scores - np.inf])


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(vlm, ask, llm, how):
    for engine in (vlm, llm.chat_handler):
        with pytest.raises(errors.ConfigError, match="neither copied nor pickled"):
            how(engine)


# ---- damaged models ----


@pytest.mark.parametrize("prune", ["balanced", "fast", "star", "fastv", "visionzip", "divprune", "pyramiddrop", None])
@pytest.mark.parametrize("which", ["text", "mmproj", "quantized"])
def test_models_that_compute_nan(tmp_path_factory, families, which, prune):
    """Quantized products round NaN away: such a model answers, as it does on stock."""
    text, mmproj = (
        (refvlm.TEXT_MODEL, refvlm.MMPROJ)
        if which == "quantized"
        else (families["llama"].text, families["llama"].mmproj)
    )
    source = mmproj if which == "mmproj" else text
    damaged = tmp_path_factory.getbasetemp() / f"nan-{which}.gguf"
    if not damaged.exists():
        norms = [t for t in gguf.GGUFReader(str(source)).tensors if t.name.endswith(("attn_norm.weight", "ln1.weight"))]
        values = np.array(norms[0].data, np.float32)
        values[0] = np.nan
        rewrite(source, damaged, drop=[norms[0].name], tensors=[(norms[0].name, values)])
    with StarVLM(*((text, damaged) if which == "mmproj" else (damaged, mmproj)), n_ctx=512) as vlm:
        ask = lambda: vlm.generate("<__media__>what?", random_image(0), prune, chat=False, max_tokens=2)
        if which == "quantized":
            assert isinstance(ask().text, str)
            return
        with pytest.raises(errors.EngineError, match="damaged"):
            ask()
        if which == "mmproj":
            assert isinstance(vlm.generate("is there a red star?", chat=False, max_tokens=2).text, str)


def test_clear_forgets_what_was_parked(vlm):
    vlm.generate(QUESTION, refvlm.DEMO_IMAGE, PruneConfig(0.5, 0.25), max_tokens=2)
    assert vlm.decoder.llama._ctx.n_parked > 0
    vlm.decoder.clear()
    assert vlm.decoder.llama._ctx.n_parked == 0 and vlm.decoder.llama._ctx.stem is None
    assert vlm.generate(QUESTION, refvlm.DEMO_IMAGE, max_tokens=4).text == vlm.expected


def test_candidates_are_where_the_guard_reads_them():
    """llama_token_data: three fields of 4 bytes, the id, the logit and the probability."""
    fields = [
        (name, getattr(llama_cpp.llama_token_data, name).offset) for name, _ in llama_cpp.llama_token_data._fields_
    ]
    assert fields == [("id", 0), ("logit", 4), ("p", 8)] and ctypes.sizeof(llama_cpp.llama_token_data) == 12
    assert "grammar" in inspect.signature(Llama._init_sampler).parameters


def test_tokens_of_images_are_no_tokens():
    """MTMDChatHandler leaves whatever was in Llama.input_ids where an image's tokens are."""
    llm = Llama(
        str(refvlm.TEXT_MODEL),
        n_ctx=512,
        chat_handler=MTMDChatHandler(str(refvlm.MMPROJ), verbose=False),
        verbose=False,
    )
    guard(llm)
    url = "data:image/png;base64," + base64.b64encode(refvlm.DEMO_IMAGE.read_bytes()).decode()
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": "what color is the star?"},
            ],
        }
    ]
    answers = []
    for filler in (0, 2**30, -7):
        llm.input_ids.fill(filler)
        llm.reset()
        answers.append(
            llm.create_chat_completion(messages, max_tokens=4, temperature=0.0)["choices"][0]["message"]["content"]
        )
    assert len(set(answers)) == 1 and answers[0]
    with pytest.raises(errors.ConfigError, match="a token that the model does not have"):
        llm.create_completion([1, 2**30], max_tokens=1)
    llm.close()
