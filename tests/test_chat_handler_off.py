"""StarChatHandler without pruning in place of MTMDChatHandler: equal in every field."""

import json

import numpy as np
import pytest
from helpers.chatting import (
    COLOR,
    DEMO,
    OTHER,
    PLATE,
    TEXT,
    TOOL,
    TOOL_TEMPLATE,
    ask,
    assistant,
    bare,
    data_url,
    load,
    text_of,
    user,
)
from helpers.models import random_image
from helpers.presets import kept
from llama_cpp import LlamaGrammar
from llama_cpp.llama_chat_format import MTMDChatHandler
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from star_edge import PruneConfig, StarChatHandler, StarVLM, errors, refvlm


def _logprobs(response):
    return (response["choices"][0]["logprobs"] or {"content": []})["content"]


class Pair:
    """The same Llama with MTMDChatHandler and with StarChatHandler that prunes nothing."""

    def __init__(self, text, mmproj, **options):
        self.stock = load(MTMDChatHandler(str(mmproj), verbose=False), text, **options)
        self.handler = StarChatHandler(mmproj, prune="off", encoder="stock")
        self.star = load(self.handler, text, **options)

    def check(self, *messages, **options):
        """Asks both, at once and streamed; equal in every field. Returns the answer at once.

        Where the last bytes are no whole character, stock does not stop at max_tokens: its answer begins with ours
        then.
        """
        expected, got = (ask(llm, *messages, **options) for llm in (self.stock, self.star))
        most, n = options.get("max_tokens", 4), expected["usage"]["completion_tokens"]
        assert "star_edge" not in expected and got["star_edge"]["config"] is None
        if n > most:
            assert got["usage"]["completion_tokens"] == most and got["choices"][0]["finish_reason"] == "length"
            assert text_of(expected).startswith(text_of(got))
            assert [c["token"] for c in _logprobs(expected)[: len(_logprobs(got))]] == [
                c["token"] for c in _logprobs(got)
            ]
            return got
        assert bare(got) == bare(expected)
        a, b = (list(ask(llm, *messages, stream=True, **options)) for llm in (self.stock, self.star))
        assert bare(a) == bare(b)
        return got

    def close(self):
        self.stock.close()
        self.star.close()


@pytest.fixture(scope="module")
def pair():
    pair = Pair(refvlm.TEXT_MODEL, refvlm.MMPROJ, logits_all=True)
    yield pair
    pair.close()


SAMPLING = {
    "greedy": {},
    "hot": {"temperature": 8.0, "seed": 7, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 8},
    "unseeded": {"temperature": 4.0, "max_tokens": 8},
    "penalties": {
        "temperature": 2.0,
        "seed": 3,
        "repeat_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
        "max_tokens": 8,
    },
    "mirostat": {"temperature": 1.0, "seed": 5, "mirostat_mode": 2, "max_tokens": 6},
    "length": {"max_tokens": 1},
}


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_off_equals_mtmd(pair, sampling):
    plain = pair.check(user(DEMO, COLOR), **sampling)
    detailed = pair.check(user(DEMO, PLATE), logprobs=True, top_logprobs=3, **sampling)
    assert detailed["choices"][0]["logprobs"]["content"] and plain["usage"]["prompt_tokens"] > 144
    if not sampling:
        assert text_of(plain) == " red"


def test_off_equals_mtmd_for_other_options(pair):
    red = pair.star.tokenize(b" red", add_bos=False)[-1]
    assert text_of(pair.check(stop=" red")) == ""
    assert text_of(pair.check(user(DEMO, PLATE), stop=[" 7", "x"], max_tokens=8)) == " 0"
    assert text_of(pair.check(logit_bias={red: -100.0})) != " red"
    grammar = LlamaGrammar.from_string('root ::= " green" | " blue"', verbose=False)
    assert text_of(pair.check(grammar=grammar)) in (" green", " blue")
    assert pair.check(model="mine")["model"] == "mine"


def test_off_equals_mtmd_for_response_formats(pair):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"]}
    answer = pair.check(
        user(DEMO, PLATE),
        response_format={"type": "json_object", "schema": schema},
        max_tokens=48,
        logprobs=True,
        top_logprobs=1,
    )
    assert set(json.loads(text_of(answer))) == {"n"}
    assert text_of(pair.check(response_format={"type": "json_object"}, max_tokens=8)).lstrip()[0] == "{"
    assert text_of(pair.check(response_format={"type": "text"})) == " red"


def test_off_equals_mtmd_for_several_turns_and_texts_alone(pair):
    first = [user(DEMO, COLOR), assistant(" red")]
    for messages in (
        [*first, user(OTHER, PLATE)],
        [*first, user("and", OTHER, "or", DEMO, "?")],
        [*first, {"role": "user", "content": PLATE}],
        [{"role": "user", "content": "is there a red star?"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": DEMO}, {"type": "text", "text": COLOR}]}],
    ):
        pair.check(*messages, logprobs=True, top_logprobs=2)
    assert pair.star.create_chat_completion([*first, user(OTHER, PLATE)])["star_edge"]["n_image_tokens"] == 288


@pytest.mark.parametrize("flash_attn", [False, True], ids=["no-fa", "fa"])
@pytest.mark.parametrize("family", ["llama", "qwen2vl"])
def test_off_equals_mtmd_on_random_models(families, family, flash_attn):
    models = families[family]
    options = {"type_k": 8, "type_v": 8} if flash_attn else {}
    pair = Pair(models.text, models.mmproj, logits_all=True, flash_attn=flash_attn, **options)
    images = [data_url(random_image(seed, 112, 140)) for seed in (1, 2)]
    for sampling in ({}, {"temperature": 1.5, "seed": 11}):
        pair.check(user("see", images[0], "what?"), max_tokens=12, logprobs=True, top_logprobs=2, **sampling)
        turns = [user(images[0], "a?"), assistant("b"), user("c", images[1], "d?")]
        answer = pair.check(*turns, max_tokens=12, **sampling)
    assert answer["star_edge"]["n_layers"] == 8 and answer["usage"]["completion_tokens"] >= 12
    assert pair.star._ctx.params.type_k == options.get("type_k", 1) == pair.stock._ctx.params.type_k
    pair.close()


def test_off_equals_mtmd_with_tools_and_functions():
    pair = Pair(refvlm.TEXT_MODEL, refvlm.MMPROJ, template=TOOL_TEMPLATE, n_ctx=1024, logits_all=True)
    tools = [{"type": "function", "function": TOOL}]
    choice = {"type": "function", "function": {"name": "report"}}
    answer = pair.check(tools=tools, tool_choice=choice, max_tokens=64)
    call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "report" and set(json.loads(call["arguments"])) == {"color", "n"}
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    pair.check(tools=tools, tool_choice="auto", logprobs=True, top_logprobs=1)
    old = pair.check(functions=[TOOL], function_call={"name": "report"}, max_tokens=64)
    assert json.loads(old["choices"][0]["message"]["function_call"]["arguments"])
    # the template has them: the prompt is longer
    assert pair.check(tools=tools)["usage"]["prompt_tokens"] > pair.check()["usage"]["prompt_tokens"] + 50

    pair.handler.prune = "fast"
    pruned = ask(pair.star, tools=tools, tool_choice=choice, max_tokens=64, stream=True)
    chunks = list(pruned)
    pieces = [
        c["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"]
        for c in chunks
        if c["choices"][0]["delta"].get("tool_calls")
    ]
    assert (
        set(json.loads("".join(pieces))) == {"color", "n"}
        and chunks[-1]["star_edge"]["average_tokens"] == kept("fast").average
    )
    pair.close()


@pytest.mark.parametrize(
    "options",
    [{"embedding": True}, {"draft_model": LlamaPromptLookupDecoding()}, {"n_batch": 40}],
    ids=lambda o: next(iter(o)),
)
def test_off_equals_mtmd_on_other_llamas(options):
    pair = Pair(refvlm.TEXT_MODEL, refvlm.MMPROJ, **options)
    if "embedding" in options:
        before = pair.star.embed(TEXT)
    assert text_of(pair.check(user(DEMO, PLATE), max_tokens=8)).split() == ["0", "7"]
    if "embedding" in options:
        assert np.array_equal(pair.star.embed(TEXT), before)
    pair.handler.prune = PruneConfig(0.5, 0.125, 2, vision_share=0.5)
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, flash_attn=False, n_threads=1) as vlm:
        expected = vlm.generate(PLATE, refvlm.DEMO_IMAGE, pair.handler.prune, max_tokens=8)
    assert text_of(ask(pair.star, user(DEMO, PLATE), max_tokens=8)) == expected.text
    if "embedding" in options:
        stream = ask(pair.star, stream=True)
        next(stream)
        assert np.array_equal(pair.star.embed(TEXT), before)  # in the middle of a stream whose tokens have masses
    pair.close()


def test_a_draft_model_with_a_prompt_over_n_batch():
    """llama_cpp keeps n_batch rows of logits then, and fails when it writes the next: a typed error here."""
    llm = load(StarChatHandler(refvlm.MMPROJ, prune="off"), draft_model=LlamaPromptLookupDecoding(), n_batch=64)
    with pytest.raises(errors.ConfigError, match="refuses"):
        ask(llm)
    llm.chat_handler.prune = "fast"
    assert ask(llm)["star_edge"]["n_kv_cells"] < 64
    llm.close()
