"""StarVLM.chat beside StarChatHandler; turns; the report in words and as values."""

import contextlib
import io
import json
import typing

import numpy as np
import pytest
from helpers.chatting import COLOR, DEMO, OTHER, PLATE, TOOL, TOOL_TEMPLATE, assistant, engine, load, usable, user
from helpers.models import random_image
from llama_cpp import LogitsProcessorList, StoppingCriteriaList

from star_edge import PruneConfig, StarChatHandler, StarVLM, refvlm, report_json
from star_edge.errors import (
    ConfigError,
    ContextLengthError,
    ImageError,
    PromptError,
    UnsupportedModelError,
)
from star_edge.io.images import load_image

TOOLS = [{"type": "function", "function": TOOL}]
CHOICE = {"type": "function", "function": {"name": "report"}}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]}
SHOWN = {"type": "image"}  # a part whose image is given beside the messages
# Options that StarChatHandler and StarVLM have other defaults for
SAME = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": 24}


@pytest.fixture(scope="module")
def vlm():
    with engine() as vlm:
        yield vlm


@pytest.fixture(scope="module")
def pairs():
    """By chat template: an engine, and a Llama with the handler."""
    with contextlib.ExitStack() as stack:
        made = {}
        for template in (None, TOOL_TEMPLATE):
            llm = load(StarChatHandler(refvlm.MMPROJ, chat_template=template), flash_attn=True)
            stack.callback(llm.close)
            made[template] = stack.enter_context(engine(chat_template=template)), llm
        yield made


class Capture:
    """A logits processor that keeps what is sampled from."""

    def __init__(self):
        self.logits = []

    def __call__(self, tokens, scores):
        self.logits.append(scores.copy())
        return scores


# ---- beside the handler ----

CONVERSATIONS = {
    "a picture": ([user(DEMO, COLOR)], {}),
    "a system message": ([{"role": "system", "content": "Be brief."}, user(DEMO, COLOR)], {}),
    "turns": ([user(DEMO, COLOR), assistant(" red"), {"role": "user", "content": PLATE}], {}),
    "pictures in turns": ([user(DEMO, COLOR), assistant(" red"), user(OTHER, PLATE)], {}),
    "text before a picture": ([user("look:", DEMO, COLOR)], {}),
    "no picture": ([user("is there a red star?")], {}),
    "stop": ([user(DEMO, PLATE)], {"stop": [" 7"]}),
    "sampling": ([user(DEMO, PLATE)], {"temperature": 0.9, "seed": 5, "top_k": 20, "top_p": 0.8, "min_p": 0.01}),
    "a schema": (
        [user(DEMO, PLATE)],
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
    ),
    "json": ([user(DEMO, PLATE)], {"response_format": {"type": "json_object"}}),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_equals_the_handler(pairs, name):
    """The answer, and the logits of each of its tokens."""
    vlm, llm = pairs[None]
    messages, options = CONVERSATIONS[name]
    one, other = Capture(), Capture()
    answer = vlm.chat(messages, **{**SAME, **options}, logits_processor=LogitsProcessorList([one]))
    wanted = llm.create_chat_completion(messages, **{**SAME, **options}, logits_processor=LogitsProcessorList([other]))
    choice = wanted["choices"][0]
    assert answer.text == choice["message"]["content"] and answer.finish_reason == choice["finish_reason"]
    assert answer.message == choice["message"] and answer.tool_calls == []
    assert len(one.logits) == len(other.logits) and np.array_equal(one.logits, other.logits)
    figures = answer.report.figures()
    for field in ("pictures", "n_text_tokens", "average_tokens", "n_generated", "n_kv_cells"):
        assert figures[field] == wanted["star_edge"][field]
    stream = vlm.chat(messages, stream=True, **{**SAME, **options})
    assert "".join(stream) == answer.text == stream.text
    assert stream.finish_reason == answer.finish_reason and stream.message == answer.message


def test_tools_as_the_handler_has_them(pairs):
    vlm, llm = pairs[TOOL_TEMPLATE]
    messages = [user(DEMO, "report")]
    for choice in (CHOICE, "required"):
        options = {**SAME, "tools": TOOLS, "tool_choice": choice, "max_tokens": 64}
        answer = vlm.chat(messages, **options)
        wanted = llm.create_chat_completion(messages, **options)["choices"][0]
        (call,), (expected,) = answer.tool_calls, wanted["message"]["tool_calls"]
        assert call["function"] == expected["function"] and answer.finish_reason == wanted["finish_reason"]
        assert json.loads(answer.text)["color"] in ("red", "blue") and answer.text == call["function"]["arguments"]
        assert answer.message == {"role": "assistant", "content": None, "tool_calls": [call]}
        stream = vlm.chat(messages, stream=True, **options)
        assert stream.finish_reason is None and stream.tool_calls == []
        assert "".join(stream) == answer.text and stream.finish_reason == "tool_calls"
        assert [call["function"] for call in stream.tool_calls] == [expected["function"]]
    # the call and its result are the conversation's next messages
    messages += [answer.message, {"role": "tool", "tool_call_id": call["id"], "content": "noted"}, user(COLOR)]
    options = {**SAME, "tools": TOOLS}
    wanted = llm.create_chat_completion(messages, **options)["choices"][0]
    assert vlm.chat(messages, **options).text == wanted["message"]["content"]
    # of its own accord: the template shows the tools, the text is the model's
    free, without = (vlm.chat([user(DEMO, COLOR)], **SAME, **more).report for more in ({"tools": TOOLS}, {}))
    assert free.n_text_tokens > without.n_text_tokens + 50


def test_options_that_generate_has(vlm):
    """The same prompt through both: also what StarChatHandler does not take."""
    stop = StoppingCriteriaList([lambda ids, logits: True])
    for options in ({}, {"stopping_criteria": stop}, {"logit_bias": {5: -100.0}}, {"max_tokens": None, "stop": "r"}):
        wanted = vlm.generate(PLATE, refvlm.DEMO_IMAGE, "fast", **options)
        answer = vlm.chat([user(DEMO, PLATE)], prune="fast", **options)
        assert (answer.text, answer.finish_reason) == (wanted.text, wanted.finish_reason)
        assert answer.report.n_kv_cells == wanted.report.n_kv_cells


# ---- images ----


def test_images_beside_the_messages(vlm):
    """In the places that messages leave; without any, first in the user's first message."""
    demo, other = refvlm.DEMO_IMAGE, random_image(3, 168, 168)
    read = lambda messages, images=(): vlm.chat(messages, images, max_tokens=1, logits_processor=[seen])
    part = lambda given: given if isinstance(given, dict) else {"type": "text", "text": given}
    text = lambda *parts: {"role": "user", "content": [part(given) for given in parts]}
    x, spoken = assistant("x"), {"role": "system", "content": "s"}
    plain = lambda words: {"role": "user", "content": words}
    both = [user(DEMO, COLOR), x, user(OTHER, PLATE)]
    cases = [
        ([text(SHOWN, COLOR)], demo, [user(DEMO, COLOR)]),
        ([text("see", SHOWN, COLOR)], [demo], [user("see", DEMO, COLOR)]),
        ([text(SHOWN, COLOR), x, text(SHOWN, PLATE)], [demo, other], both),
        ([text(SHOWN, COLOR), x, user(OTHER, PLATE)], demo, both),
        ([plain(COLOR), x, text(PLATE)], demo, [user(DEMO, COLOR), x, user(PLATE)]),
        ([spoken, text(COLOR)], demo, [spoken, user(DEMO, COLOR)]),
        ([plain("a <image> b")], demo, [user("a ", DEMO, " b")]),
    ]
    for messages, images, same in cases:
        seen = Capture()
        got = read(messages, images), seen.logits
        seen = Capture()
        wanted = read(same), seen.logits
        assert np.array_equal(got[1], wanted[1]) and got[0].report.n_text_tokens == wanted[0].report.n_text_tokens


def test_images_that_do_not_fit_the_messages(vlm):
    demo = refvlm.DEMO_IMAGE
    shown = {"role": "user", "content": [SHOWN, {"type": "text", "text": COLOR}]}
    for messages, images, words in (
        ([shown], [demo, demo], "1 parts .* images has 2"),
        ([shown, assistant("x"), shown], demo, "2 parts .* images has 1"),
        ([shown], [], "names no image"),
        ([{"role": "system", "content": "x"}], demo, "no message of the user"),
        ("what?", demo, "messages is a str"),
        ([], demo, "no messages"),
    ):
        with pytest.raises(PromptError, match=words):
            vlm.chat(messages, images)
    with pytest.raises(ImageError, match="does not exist"):
        vlm.chat([user("x")], "nowhere.png")


def test_every_kind_of_image_in_a_message(vlm):
    """Paths, open files, arrays, file: URLs; one file object serves every turn."""
    wanted = vlm.chat([user(DEMO, COLOR)], **SAME).text
    pixels = np.asarray(load_image(refvlm.DEMO_IMAGE))
    with refvlm.DEMO_IMAGE.open("rb") as file:
        for source in (str(refvlm.DEMO_IMAGE), refvlm.DEMO_IMAGE.as_uri(), pixels, file, file, io.BytesIO(file.read())):
            if isinstance(source, io.BytesIO) and not source.getvalue():
                continue  # the file has been read to its end
            part = {"type": "image", "image": source}
            assert (
                vlm.chat([{"role": "user", "content": [part, {"type": "text", "text": COLOR}]}], **SAME).text == wanted
            )
        file.seek(7)  # somewhere within
        for _ in range(2):
            assert vlm.generate(COLOR, file, max_tokens=24).text == wanted
            assert vlm.generate(COLOR, [file], max_tokens=24).text == wanted


def test_a_model_without_an_encoder():
    with StarVLM(refvlm.TEXT_MODEL, n_ctx=128, chat_template="vicuna") as vlm:
        assert vlm.chat([user("is there a red star?")], max_tokens=2).text
        with pytest.raises(UnsupportedModelError, match="without a vision encoder"):
            vlm.chat([user(DEMO, COLOR)])


# ---- turns ----


@pytest.mark.parametrize("prune", ["balanced", None, PruneConfig(0.5, 0.25, 2), PruneConfig(36)], ids=str)
def test_a_second_turn_about_the_same_picture(vlm, prune):
    """It reads neither the encoder's part nor the decoder's again, and the logits are those of a fresh engine."""
    messages = [user(DEMO, COLOR)]
    messages += [vlm.chat(messages, prune=prune, **SAME).message, {"role": "user", "content": PLATE}]
    got, wanted = Capture(), Capture()
    answer = vlm.chat(messages, prune=prune, logits_processor=[got], **SAME)
    with engine(image_cache_bytes=0) as fresh:
        expected = fresh.chat(messages, prune=prune, logits_processor=[wanted], **SAME)
    assert answer.text == expected.text and np.array_equal(got.logits, wanted.logits)
    assert answer.report.n_cached == 1 and answer.report.reused_tokens > answer.report.n_vision_kept
    assert expected.report.n_cached == 0 and expected.report.reused_tokens == 0


def test_answer_messages_are_json(vlm):
    messages = [user(DEMO, COLOR)]
    answer = vlm.chat(messages, **SAME)
    assert json.loads(json.dumps(answer.message)) == {"role": "assistant", "content": answer.text}


# ---- errors ----


@pytest.mark.parametrize(
    ("call", "options", "words"),
    [
        ("generate", {"image": "x.png"}, "image is not an option of generate: did you mean images="),
        ("generate", {"temprature": 1.0}, "did you mean temperature="),
        ("generate", {"qqq": 1}, "use one of prompt, images,"),
        ("chat", {"image": "x.png"}, "'image' .*did you mean images="),
        ("chat", {"tool": []}, "did you mean tools="),
        ("chat", {"qqq": 1}, "'qqq' is neither an option nor a variable of the chat template .*leave it out"),
        ("chat", {"logprobs": True}, "logprobs is not an option of chat"),
        ("chat", {"top_p": 2.0}, "top_p=2.0"),
        ("chat", {"timeout": 0}, "timeout=0.*out of range"),
        ("generate", {"timeout": "1"}, "timeout='1'"),
        ("generate", {"progress": 5}, "progress=5"),
        ("chat", {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "'x' not found"),
    ],
)
def test_options_that_cannot_be_used(vlm, call, options, words):
    asked = "x" if call == "generate" else [user("x")]
    with pytest.raises(ConfigError, match=words):
        getattr(vlm, call)(asked, **options)


def test_what_is_refused_leaves_a_stream_alone(vlm):
    """A request that ends before its turn does not end another's stream."""
    stream = vlm.chat([user(DEMO, PLATE)], stream=True, max_tokens=8)
    first = next(stream)
    for options in ({"image": 1}, {"top_p": 5.0}, {"response_format": {"type": "x"}}):
        with pytest.raises(ConfigError):
            vlm.chat([user("x")], **options)
    assert first + "".join(stream) == vlm.chat([user(DEMO, PLATE)], max_tokens=8).text


# ---- the report ----


def test_summary_says_what_the_figures_say(vlm):
    first = vlm.generate(
        PLATE, random_image(21, 168, 168), PruneConfig(36), 8, logit_bias={vlm.llama.token_eos(): -1e5}
    )
    text = first.report.summary()
    first.report.reused_tokens, reused = 0, first.report.reused_tokens  # of BOS, which every prompt begins with
    assert text == first.report.summary().replace("(25%)", f"(25%), {reused} tokens reused") or not reused
    text = first.report.summary()
    assert repr(first.report) == str(first.report) == text and "\n" not in text and len(text) < 200
    assert text.startswith("read 36 of 144 image tokens (25%), first token ")
    assert "answer of 8 tokens at " in text and "not encoded again" not in text
    again = vlm.generate(COLOR, random_image(21, 168, 168), PruneConfig(36), 1).report
    assert (
        "the picture not encoded again" in again.summary() and f"{again.reused_tokens} tokens reused" in again.summary()
    )
    both = vlm.generate(COLOR, [refvlm.DEMO_IMAGE, random_image(21, 168, 168)], "balanced", 1).report.summary()
    assert "of 288 image tokens" in both and "in 2 pictures" in both and "from layer 4 on" in both
    assert vlm.generate(COLOR, refvlm.DEMO_IMAGE, None, 1).report.summary().startswith("read all 144 image tokens, ")
    text = vlm.generate("x", max_tokens=1).report
    assert text.summary().startswith(f"read {text.n_text_tokens} text tokens, ")
    noted = vlm.generate(COLOR, refvlm.DEMO_IMAGE, PruneConfig(1), 1).report
    assert noted.summary().splitlines()[1].startswith("note: vision_keep=1 keeps one token")


def keys(kind):
    return set(typing.get_type_hints(kind))


def test_dicts_are_json_and_have_the_fields_that_their_types_say(vlm):
    for prune in ("balanced", None, PruneConfig(0.5, encoder_keep=0.75)):
        made = vlm.generate(PLATE, refvlm.DEMO_IMAGE, prune, 4).report
        whole, figures = made.to_dict(), made.figures()
        assert json.loads(json.dumps(whole, allow_nan=False)) == whole
        assert json.loads(json.dumps(figures, allow_nan=False)) == figures
        assert set(whole) == keys(report_json.ReportDict) and set(figures) == keys(report_json.ReportFigures)
        assert set(whole["images"][0]) == keys(report_json.ImageDict) == set(vars(made.images[0]))
        assert set(figures["images"][0]) == keys(report_json.ImageFigures)
        assert set(made.pictures[0]) == keys(report_json.PictureFigures)
        assert set(vars(made)) - {"locate"} <= set(whole)  # which asks the encoder
        image = made.images[0]
        assert whole["images"][0]["vision_kept"] == image.vision_kept.tolist()
        assert whole["images"][0]["grid"] == [12, 12]
        assert {name: whole[name] for name in set(whole) & set(figures) - {"images"}} == {
            name: figures[name] for name in set(figures) - {"images"}
        }


def test_a_prompt_that_is_too_long(vlm):
    messages = [user(DEMO, COLOR)] + [m for _ in range(60) for m in (assistant("yes " * 5), user("and now?"))]
    with pytest.raises(ContextLengthError, match="of a context of 512"):
        vlm.chat(messages)
    assert usable(vlm)
