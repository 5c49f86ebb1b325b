"""What StarChatHandler refuses, and that the Llama answers as before afterwards."""

import base64
import functools

import llama_cpp
import pytest
from helpers.chatting import COLOR, DEMO, ask, complete, load, raise_it, text_of, user
from helpers.pictures import png
from llama_cpp import _internals

from star_edge import PruneConfig, StarChatHandler, errors, refvlm

BAD_MESSAGES = {
    "no list": 5,
    "no dicts": [5],
    "no content": [{"role": "user"}],
    "no role": [{"content": "x"}],
    "an image without a URL": [{"role": "user", "content": [{"type": "image_url", "image_url": {"no": "url"}}]}],
    "a part of another kind": [
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}
    ],
    "surrogates": [{"role": "user", "content": "\ud800"}],
}
BAD_IMAGES = {
    "": "path is empty",
    "/nowhere/at/all.png": "does not exist",
    "data:image/png;base64,AAAA": "",
    "data:,": "",
    "ftp://a/b": "",
    "file://host/a": "another host",
}


@pytest.fixture
def fails(llm):
    def check(error, words, *messages, **options):
        with pytest.raises(error) as caught:
            response = ask(llm, *messages, **options)
            list(response)
        assert isinstance(caught.value, errors.StarEdgeError) and "\n" not in str(caught.value)
        assert words in str(caught.value), str(caught.value)
        assert text_of(ask(llm)) == " red"

    return check


@pytest.mark.parametrize("messages", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_bad_messages(llm, messages):
    with pytest.raises(errors.PromptError) as caught:
        llm.create_chat_completion(messages)
    assert "\n" not in str(caught.value)
    assert text_of(ask(llm)) == " red"


@pytest.mark.parametrize(("url", "words"), BAD_IMAGES.items())
def test_bad_images(fails, url, words):
    message = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": COLOR}],
    }
    fails(errors.ImageError, words, message)


def test_bad_options(fails, llm, handler, monkeypatch):
    fails(
        errors.ImageTooLargeError,
        "",
        user("data:image/png;base64," + base64.b64encode(png(100_000, 100_000)).decode(), COLOR),
    )
    fails(errors.ConfigError, "logits_all=True", logprobs=True, top_logprobs=2)
    fails(
        errors.ConfigError,
        "Tool choice 'x' not found",
        tools=[],
        tool_choice={"type": "function", "function": {"name": "x"}},
    )
    fails(errors.ConfigError, "response_format={} is unknown", response_format={})
    fails(errors.ContextLengthError, "of a context of 512", user(*[DEMO] * 40, COLOR))
    with handler.pruning(PruneConfig(500, 1)), pytest.raises(errors.ConfigError, match="over the image's 144 tokens"):
        ask(llm)
    for target, name, error in (
        (handler._reader.encoder, "encode_once", errors.EngineError("the encoder failed")),
        (llm._ctx, "decode", RuntimeError("llama_decode returned -3")),
        (llm, "sample", KeyboardInterrupt()),
    ):
        for stream in (False, True):
            with (
                monkeypatch.context() as patch,
                pytest.raises(errors.EngineError if not isinstance(error, KeyboardInterrupt) else KeyboardInterrupt),
            ):
                patch.setattr(target, name, functools.partial(raise_it, error))
                list(ask(llm, stream=stream))
            assert text_of(ask(llm)) == " red"


def test_a_loader_may_refuse_in_its_own_words(llm, handler, monkeypatch):
    class Refused(Exception):
        pass

    monkeypatch.setattr(handler, "image_loader", functools.partial(raise_it, Refused()))
    with pytest.raises(Refused):
        ask(llm)
    monkeypatch.undo()
    assert text_of(ask(llm)) == " red"


def test_bad_files(families, tmp_path, text_alone):
    with pytest.raises(errors.ModelFileError, match="nowhere.gguf does not exist"):
        StarChatHandler(clip_model_path=str(tmp_path / "nowhere.gguf"))
    llm = load(StarChatHandler(refvlm.MMPROJ), families["qwen2vl"].text)
    with pytest.raises(errors.StarEdgeError):
        StarChatHandler(tmp_path)
    llm.close()
    (tmp_path / "wide").mkdir()
    for mmproj, error in ((refvlm.TEXT_MODEL, errors.ModelFileError), (families["qwen2vl"].mmproj, None)):
        llm = load(StarChatHandler(mmproj))
        if error:
            with pytest.raises(error, match="is a text model"):
                ask(llm)
            assert complete(llm) == text_alone  # nothing was done to the Llama
            llm.chat_handler = StarChatHandler(refvlm.MMPROJ)
            assert text_of(ask(llm)) == " red"
        llm.close()


def test_templates_that_cannot_be_used():
    for template, error in (
        ("{{ foo(", errors.UnsupportedModelError),
        ("{{ raise_exception('no') }}", errors.PromptError),
        ("no messages", errors.PromptError),
    ):
        llm = load(StarChatHandler(refvlm.MMPROJ), template=template)
        with pytest.raises(error, match="template"):
            ask(llm)
        llm.close()
    llm = load(StarChatHandler(refvlm.MMPROJ))
    del llm.metadata["tokenizer.chat_template"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(errors.UnsupportedModelError, match="no chat template"):
        patch.setattr("star_edge.chat._OF_FAMILY", {})
        ask(llm)
    llm.close()


def test_no_memory_for_the_context(monkeypatch, text_alone):
    """The Llama gets a context as it had, and the next request may try again."""
    llm = load(StarChatHandler(refvlm.MMPROJ))
    create = llama_cpp.llama_init_from_model
    with monkeypatch.context() as patch, pytest.raises(errors.EngineError, match="could not create a context"):
        patch.setattr(
            _internals.llama_cpp,
            "llama_init_from_model",
            lambda model, p: None if p.cb_eval_user_data else create(model, p),
        )
        ask(llm)
    assert not llm.context_params.cb_eval_user_data and llm.context_params.n_seq_max == 1
    assert complete(llm) == text_alone
    assert text_of(ask(llm)) == " red"
    assert llama_cpp.llama_n_seq_max(llm.ctx) >= 2
    llm.close()
