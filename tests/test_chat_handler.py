"""StarChatHandler with pruning: the engine's outputs; nothing is left behind; lives, errors; the script of its page."""

import base64
import functools
import itertools
import json
import threading
import weakref

import llama_cpp
import numpy as np
import pytest
from helpers import pages
from helpers.chatting import COLOR, DEMO, OTHER, PLATE, ask, assistant, bare, data_url, load, streamed, text_of, user
from helpers.models import random_image
from helpers.pictures import png
from helpers.presets import kept
from llama_cpp import LogitsProcessorList, _internals
from llama_cpp.llama_cache import LlamaRAMCache

from star_edge import PRESETS, PruneConfig, StarChatHandler, StarVLM, errors, refvlm
from star_edge.io.images import ImageLimits, load_image
from star_edge.reader import PromptReader


@pytest.fixture(scope="module")
def handler():
    return StarChatHandler(clip_model_path=refvlm.MMPROJ, prune="balanced", verbose=False)


@pytest.fixture(scope="module")
def llm(handler):
    llm = load(handler)
    yield llm
    llm.close()


# ---- pruned ----


CONFIGS = ["balanced", "fast", PruneConfig(0.5, 0.125, 2), PruneConfig(10, 3, vision_share=0.5)]


@pytest.mark.parametrize("family", ["refvlm", "llama", "qwen2vl"])
def test_pruned_equals_the_engine(families, family):
    """The logits of every token, and what was kept, equal StarVLM's with the same config and prompt."""
    text, mmproj = (
        (refvlm.TEXT_MODEL, refvlm.MMPROJ) if family == "refvlm" else (families[family].text, families[family].mmproj)
    )
    image = load_image(refvlm.DEMO_IMAGE) if family == "refvlm" else random_image(5, 112, 112)
    seen = []

    def capture(tokens, scores):
        seen.append((tokens.tolist(), scores.copy()))
        return scores

    options = {"max_tokens": 6, "temperature": 0.0, "logits_processor": LogitsProcessorList([capture])}
    handler = StarChatHandler(mmproj)
    with StarVLM(text, mmproj, n_ctx=512, n_threads=1) as vlm:
        llm = load(handler, text, flash_attn=True)
        for config in CONFIGS:
            answer = vlm.generate(PLATE, image, config, **options)
            expected, seen = seen, []
            handler.prune = config
            chunks = list(llm.create_chat_completion([user(data_url(image), PLATE)], stream=True, **options))
            got, seen = seen, []
            response = chunks[-1]
            assert streamed(chunks) == answer.text and len(got) == len(expected) >= 2
            for (tokens_a, logits_a), (tokens_b, logits_b) in zip(got, expected):
                assert tokens_a == tokens_b and np.array_equal(logits_a, logits_b)
            for name in ("vision_kept", "decoder_kept", "vision_scores", "decoder_scores"):
                assert np.array_equal(
                    getattr(handler.last_report.images[0], name), getattr(answer.report.images[0], name)
                )
            assert response["star_edge"]["average_tokens"] == answer.report.average_tokens < 40
            assert response["star_edge"]["n_sampled"] == answer.report.n_sampled == len(got)
        llm.close()


def test_pruned_conversation_with_images_in_several_turns(llm, handler):
    """As StarVLM reads the same prompt: each image keeps its share, and the pixels are those of its turn."""
    messages = [user(DEMO, COLOR), assistant(" red"), user(OTHER, PLATE)]
    prompt = f"USER:<__media__>{COLOR} ASSISTANT:  red</s>USER:<__media__>{PLATE} ASSISTANT:"
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, flash_attn=False, n_threads=1) as vlm:
        response = ask(llm, *messages)
        report = handler.last_report
        rendered = llm.tokenize(prompt.replace("<__media__>", "").replace("</s>", "").encode())
        assert abs(report.n_text_tokens - len(rendered)) <= 6
        _, expected = vlm.read_prompt(
            prompt.replace("</s>", ""), [refvlm.DEMO_IMAGE, random_image(3, 168, 168)], chat=False
        )
    assert (
        report.n_image_tokens == 288 and [len(i.decoder_kept) for i in report.images] == [kept("balanced").decoder] * 2
    )
    for got, want in zip(report.images, expected.images):
        assert np.array_equal(got.vision_kept, want.vision_kept)
    assert response["usage"]["prompt_tokens"] == report.n_text_tokens + 288


def test_config_of_a_request(llm, handler):
    average = lambda: ask(llm)["star_edge"]["average_tokens"]
    assert average() == 36
    with handler.pruning("fast"):
        assert average() == kept("fast").average
        with handler.pruning(PruneConfig(1.0, 0.5, 3)):
            assert average() == 108
            stream = ask(llm, stream=True)
        with handler.pruning(None):
            assert average() == 144
        assert average() == kept("fast").average
        others = []
        thread = threading.Thread(target=lambda: others.append(average()))
        thread.start()
        thread.join()
        assert others == [36]  # another thread's requests are not in the block
        other = StarChatHandler(refvlm.MMPROJ, prune="quality")
        assert other.prune == PRESETS["quality"] and handler.prune == PRESETS["balanced"]
    assert average() == 36
    with handler.pruning(PruneConfig(1.0, 0.5, 3)):
        stream = ask(llm, stream=True)
    assert list(stream)[-1]["star_edge"]["average_tokens"] == 108
    with pytest.raises(errors.ConfigError, match="no preset 'fsat'"), handler.pruning("fsat"):
        pass
    with pytest.raises(errors.ConfigError, match="no preset"):
        handler.prune = "fsat"
    with pytest.raises(errors.ConfigError, match="no preset"):
        StarChatHandler(refvlm.MMPROJ, prune="fsat")
    assert average() == 36


def test_report_comes_back_with_the_response(llm, handler):
    response = ask(llm, user(DEMO, PLATE), max_tokens=8)
    summary = json.loads(json.dumps(response, allow_nan=False))["star_edge"]
    assert len(json.dumps(summary)) < 2000
    tokens = {
        "n_tokens": 144,
        "n_special": 0,
        "n_redundant": 0,
        "n_encoder_kept": 144,
        "n_vision_kept": kept("balanced").vision,
        "n_decoder_kept": kept("balanced").decoder,
    }
    of_no_video = {"video": None, "second": None}
    assert summary["images"] == [{"picture": 0, **tokens, "cached": True, **of_no_video}]
    assert summary["pictures"] == [{"images": [0], **tokens}]
    assert (summary["config"]["vision_keep"], summary["decoder_layer"], summary["n_layers"]) == (
        PRESETS["balanced"].vision_keep,
        4,
        6,
    )
    assert summary["n_kv_cells"] == summary["n_text_tokens"] + kept("balanced").decoder
    assert summary["n_generated"] == 2 and summary["n_sampled"] == 3  # two digits, and the end
    assert {"preprocess", "encode", "probe", "resume", "first_token", "generate"} <= set(summary["milliseconds"])
    report = handler.last_report
    assert report.figures() == summary and len(report.images[0].decoder_kept) == kept("balanced").decoder
    assert {k: report.to_dict()[k] for k in summary if k != "images"} == {
        k: v for k, v in summary.items() if k != "images"
    }
    assert report.milliseconds["first_token"] >= report.milliseconds["encode"] > 0

    chunks = list(ask(llm, user(DEMO, PLATE), max_tokens=8, stream=True))
    assert all("star_edge" not in chunk for chunk in chunks[:-1])
    last = json.loads(json.dumps(chunks[-1]))["star_edge"]
    assert last["n_generated"] == 2 and last["milliseconds"]["generate"] > 0
    assert streamed(chunks) == text_of(response)
    assert ask(llm, {"role": "user", "content": "is there a red star?"})["star_edge"]["n_image_tokens"] == 0


def test_a_template_that_takes_only_strings():
    """Many text models of LLaVA files have one: MTMDChatHandler shows them a Python list."""
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}[assistant]"
    handler = StarChatHandler(refvlm.MMPROJ)
    llm = load(handler, template=template)
    response = ask(llm, user("look:", DEMO, COLOR), assistant("red"), user(COLOR))
    text = f"[user]look:{COLOR}[assistant]red[user]{COLOR}[assistant]"
    assert abs(handler.last_report.n_text_tokens - len(llm.tokenize(text.encode()))) <= 6
    assert response["star_edge"]["n_decoder_kept"] == kept("balanced").decoder
    llm.close()


# ---- images ----


def test_sources_of_images(llm, tmp_path):
    expected = ask(llm, logprobs=None)
    path = tmp_path / "a picture.png"
    path.write_bytes(refvlm.DEMO_IMAGE.read_bytes())
    for url in (str(path), path.as_uri(), f"file://localhost{path.as_uri()[7:]}"):
        message = {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": COLOR}],
        }
        response = ask(llm, message)
        assert text_of(response) == text_of(expected) and response["usage"] == expected["usage"]
    # the question may name the image
    named = {"role": "user", "content": [message["content"][0], {"type": "text", "text": f"{url} {COLOR}"}]}
    assert ask(llm, named)["star_edge"]["n_image_tokens"] == 144


def test_image_loader_and_limits():
    asked = []

    def loader(url):
        asked.append(url)
        return load_image(refvlm.DEMO_IMAGE)[:, ::-1]  # a view: not contiguous

    llm = load(StarChatHandler(refvlm.MMPROJ, image_loader=loader))
    mirrored = ask(llm, user("data:1", "data:2", COLOR))
    assert asked == ["data:1", "data:2"] and mirrored["star_edge"]["n_image_tokens"] == 288
    report = llm.chat_handler.last_report
    llm.chat_handler.image_loader = lambda url: np.ascontiguousarray(load_image(refvlm.DEMO_IMAGE)[:, ::-1])
    ask(llm, user("data:1", "data:2", COLOR))
    assert np.array_equal(report.images[0].vision_scores, llm.chat_handler.last_report.images[0].vision_scores)
    for bad in (
        None,
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ):
        llm.chat_handler.image_loader = lambda url, bad=bad: bad
        with pytest.raises(errors.ImageError, match="image_loader returned"):
            ask(llm)
    llm.close()

    llm = load(StarChatHandler(refvlm.MMPROJ, image_limits=ImageLimits(max_pixels=1000, allow_http=False)))
    with pytest.raises(errors.ImageTooLargeError):
        ask(llm)
    with pytest.raises(errors.ImageError, match="HTTP is off"):
        ask(llm, {"role": "user", "content": [{"type": "image_url", "image_url": "http://127.0.0.1:9/a.png"}]})
    llm.close()


def test_encoder_options_reach_the_encoder(families):
    models = families["qwen2vl"]
    n_tokens = {}
    for limit in (4, 16):
        handler = StarChatHandler(models.mmproj, image_min_tokens=limit, image_max_tokens=limit, use_gpu=False)
        llm = load(handler, models.text)
        n_tokens[limit] = ask(llm, user(data_url(random_image(1, 112, 112)), "?"))["star_edge"]["n_image_tokens"]
        llm.close()
    assert n_tokens == {4: 4, 16: 16}


@pytest.mark.parametrize(
    ("llama_flash", "encoder_flash", "expected"),
    [(False, None, False), (True, None, True), (True, False, False), (False, True, True)],
)
def test_flash_attention_of_the_encoder(llama_flash, encoder_flash, expected):
    handler = StarChatHandler(refvlm.MMPROJ, encoder_flash_attn=encoder_flash)
    llm = load(handler, flash_attn=llama_flash)
    ask(llm)
    assert handler._reader.encoder.last_outcome.flash is expected
    llm.close()


# ---- nothing is left behind ----


def complete(llm):
    prompt = llm.tokenize(b"USER: is there a red star? ASSISTANT:", add_bos=True)
    return [int(t) for t in itertools.islice(llm.generate(prompt, temp=0.0), 6)]


@pytest.fixture(scope="module")
def fresh():
    """What a Llama without any handler makes of a text."""
    llm = load(None)
    yield complete(llm)
    llm.close()


def test_text_is_completed_as_before(llm, fresh):
    ask(llm)
    assert complete(llm) == fresh
    list(ask(llm, stream=True))
    assert complete(llm) == fresh
    stream = ask(llm, stream=True)  # not begun
    assert complete(llm) == fresh
    stream = ask(llm, stream=True)
    next(stream)
    stream.close()
    assert complete(llm) == fresh
    stream = ask(llm, stream=True)
    next(stream)
    assert complete(llm) == fresh  # in the middle of the stream
    with pytest.raises(errors.EngineClosedError, match="ended this stream"):
        list(stream)
    assert complete(llm) == fresh


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
        patch.setattr(llm, "sample", functools.partial(_raise, KeyboardInterrupt()))
        ask(llm)
    assert np.array_equal(go_on(llm), expected)
    llm.set_cache(None)


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
    llm.close()
    with pytest.raises(errors.EngineClosedError, match="the Llama is closed"):
        next(stream)
    with pytest.raises(errors.EngineClosedError, match="the Llama is closed"):
        ask(llm)
    llm.close()


# ---- errors ----


IMAGE = {"type": "image_url", "image_url": {"url": DEMO}}
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
                patch.setattr(target, name, functools.partial(_raise, error))
                list(ask(llm, stream=stream))
            assert text_of(ask(llm)) == " red"


def _raise(error, *args, **options):
    raise error


def test_a_loader_may_refuse_in_its_own_words(llm, handler, monkeypatch):
    class Refused(Exception):
        pass

    monkeypatch.setattr(handler, "image_loader", functools.partial(_raise, Refused()))
    with pytest.raises(Refused):
        ask(llm)
    monkeypatch.undo()
    assert text_of(ask(llm)) == " red"


def test_bad_files(families, tmp_path, fresh):
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
            assert complete(llm) == fresh  # nothing was done to the Llama
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


def test_no_memory_for_the_context(monkeypatch, fresh):
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
    assert complete(llm) == fresh
    assert text_of(ask(llm)) == " red"
    assert llama_cpp.llama_n_seq_max(llm.ctx) >= 2
    llm.close()


# ---- the page ----


def test_script_of_the_page(tmp_path, monkeypatch, capsys):
    """The block after the marker runs as it is, with the reference model in place of the user's files."""
    (code,) = pages.executed("docs/chat-handler.md", "script")
    for name, source in (
        ("text.gguf", refvlm.TEXT_MODEL),
        ("mmproj.gguf", refvlm.MMPROJ),
        ("receipt.png", refvlm.DEMO_IMAGE),
    ):
        (tmp_path / name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    variables = {}
    exec(compile(code, "docs/chat-handler.md", "exec"), variables)
    printed = capsys.readouterr().out
    assert str(kept("balanced").average) in printed and str(kept("fast").average) in printed
    variables["llm"].close()


def test_the_reader_does_not_keep_a_llama(families):
    llm = load(None, families["llama"].text)
    reader = PromptReader(llm, None)
    gone = weakref.ref(llm)
    del llm
    assert gone() is None and reader.encoder is None
