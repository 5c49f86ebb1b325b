"""What OpenAI's clients send to star-edge serve: roles, contents, nulls, tools, formats; and how the server says that
something is wrong.
"""

import asyncio
import json
from typing import Literal

import openai
import pydantic
import pytest
from helpers.odd_requests import TOOLS
from helpers.serving import COLOR, DEMO, Server, message

from star_edge.errors import PromptError
from star_edge.server.messages import read_messages
from star_edge.server.schema import read_request


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    assert server.stop() == (0, "")


def post(server, body):
    return server.request("POST", "/v1/chat/completions", {"max_tokens": 3, "temperature": 0, **body})


def text(part):
    return {"type": "text", "text": part}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def image(**fields):
    return fields or {"type": "image_url", "image_url": {"url": DEMO}}


# ---- messages ----


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"role": "system", "content": [text("a"), "b"]}, {"role": "system", "content": [text("a"), text("b")]}),
        ({"role": "developer", "content": "a", "name": None}, {"role": "developer", "content": "a"}),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "assistant", "content": [text("no")]},
        ),
        ({"role": "assistant", "content": None, "refusal": "no"}, {"role": "assistant", "content": "no"}),
        ({"role": "tool", "content": None, "tool_call_id": "1"}, {"role": "tool", "content": "", "tool_call_id": "1"}),
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
                "audio": None,
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
        ),
        (
            {"role": "assistant", "content": "a", "tool_calls": [], "annotations": []},
            {"role": "assistant", "content": "a"},
        ),
        ({"role": "user", "content": [text("a")], "name": None}, {"role": "user", "content": [text("a")]}),
        (
            {"role": "user", "content": [{**text("a"), "cache_control": {"type": "x"}}]},
            {"role": "user", "content": [text("a")]},
        ),
    ],
)
def test_messages_of_every_role(given, read):
    assert read_messages([given], 100) == ([read], [])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "U", "detail": "high"}},
        {"type": "image_url", "image_url": "U"},
        {"type": "image_url", "image_url": {"url": "U", "detail": None}, "text": None},
        {"type": "input_image", "image_url": "U", "detail": "auto"},
        {"type": "image", "url": "U"},
        {"type": "image", "image": "U"},
        {"type": "image", "source": {"type": "url", "url": "U"}},
    ],
)
def test_image_parts(part):
    messages, urls = read_messages([user(part, text("x"))], 100)
    assert urls == ["U"] and messages[0]["content"][0] == {"type": "image_url", "image_url": {"url": "image-0"}}


def test_images_as_base64_alone(server):
    for url in (f" {DEMO}\n", DEMO.partition(",")[2]):
        status, _, answer = post(server, {"messages": [message(COLOR, url)]})
        assert status == 200 and answer["choices"][0]["message"]["content"].strip() == "red", answer


def test_images_of_every_turn_are_taken_out():
    source = {"type": "image", "source": {"type": "base64", "media_type": "image/webp", "data": "A"}}
    messages, urls = read_messages(
        [{"role": "system", "content": [image(), text("x")]}, {"role": "tool", "content": [source]}], 100
    )
    assert urls == [DEMO, "data:image/webp;base64,A"]
    assert [m["content"][0]["image_url"]["url"] for m in messages] == ["image-0", "image-1"]


@pytest.mark.parametrize(
    ("messages", "field", "words"),
    [
        ([{"content": "x"}], "messages.0.role", "missing"),
        ([{"role": "bot", "content": "x"}], "messages.0.role", "'bot' is not a role: use one of system, developer"),
        ([{"role": "user"}], "messages.0.content", "missing"),
        ([{"role": "user", "content": None}], "messages.0.content", "missing"),
        ([{"role": "user", "content": []}], "messages.0.content", "an empty list"),
        ([{"role": "user", "content": {"type": "text"}}], "messages.0.content", "a dict"),
        ([{"role": "user", "contents": "x"}], "messages.0.contents", "did you mean content?"),
        ([{"role": "user", "content": "x"}, user(text("x"), {"type": "text"})], "messages.1.content.1.text", "missing"),
        ([user({"type": "text", "text": 5})], "messages.0.content.0.text", "not a string"),
        ([user({"type": "txt", "text": "x"})], "messages.0.content.0.type", "'txt' is not supported"),
        ([user({"text": "x"})], "messages.0.content.0.type", "missing"),
        ([user(5)], "messages.0.content.0", "a int: a part is an object"),
        ([user({"type": "input_audio", "input_audio": {}})], "messages.0.content.0.type", "not supported"),
        ([user({"type": "image_url"})], "messages.0.content.0.image_url", "missing"),
        ([user({"type": "image_url", "image_url": {"uri": "x"}})], "messages.0.content.0.image_url.uri", "unknown"),
        ([user({"type": "image_url", "image_url": {"url": 5}})], "messages.0.content.0.image_url.url", "not a string"),
        ([user({**text("x"), "image_url": {"url": "x"}})], "messages.0.content.0.image_url", "unknown"),
        ([user({"type": "image", "url": "x", "image": "y"})], "messages.0.content.0.image", "unknown"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "messages.0", "only an assistant"),
        ([{"role": "assistant", "tool_calls": [5]}], "messages.0.tool_calls.0.function", "not a function call"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}],
            "messages.0.tool_calls.0.function.arguments",
            "neither",
        ),
    ],
)
def test_wrong_messages_are_named(server, messages, field, words):
    for stream in (False, True):
        status, _, answer = post(server, {"messages": messages, "stream": stream})
        assert status == 400 and answer["error"]["param"] == field and words in answer["error"]["message"], answer
        assert answer["error"]["message"].startswith(field)


def test_more_messages_than_the_context_has_tokens():
    with pytest.raises(PromptError, match="6 messages and parts"):
        read_messages([user(text("x"), text("x"))] * 2, 5)


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({}, "messages", "field required: send one or more"),
        ({"messages": None}, "messages", "field required"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"pruning": "off"}, "pruning", "unknown field: did you mean prune?"),
        ({"message": []}, "message", "unknown field: did you mean messages?"),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs", "unknown field"),
        ({"n": 2}, "n", "ask again for another answer"),
        ({"max_tokens": 0}, "max_tokens", "asks for no answer"),
        ({"max_tokens": -2}, "max_tokens", "greater than or equal to -1"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 1e400}, None, "cannot be read as JSON"),
        ({"repeat_penalty": 0}, "repeat_penalty", "greater than 0"),
        ({"seed": 2**70}, "seed", "less than"),
        ({"stop": ["x"] * 65}, "stop", "at most 64"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"store": True}, "store", "False"),
        ({"modalities": ["audio"]}, "modalities.0", "'text'"),
        ({"stream_options": {"include_use": True}}, "stream_options.include_use", "did you mean include_usage?"),
        ({"star_edge": {"keep": True}}, "star_edge.keep", "did you mean kept?"),
        ({"response_format": {"type": "xml"}}, "response_format", "not text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema has no schema"),
        ({"tools": [{"function": {}}]}, "tools.0.function.name", "missing"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools.0", "not a function"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "'g' is not a tool",
        ),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", 'use "none"'),
        ({"functions": [{}]}, "functions.0.name", "missing"),
        ({"prune": {"vision_keep": 1}}, None, "may be one token or all of them"),
        ({"logit_bias": {"x": 1}}, None, "'x' is not a token"),
        ({"logit_bias": {"512000": 1}}, None, "token 512000"),
        ({"logit_bias": {"-1": 1}}, None, "'-1' is not a token"),
    ],
)
def test_wrong_fields_are_named(server, body, field, words):
    body = body if set(body) & {"messages"} or not body else {"messages": [message(COLOR, DEMO)], **body}
    data = json.dumps(body).replace("Infinity", "1e400")
    status, _, answer = server.request("POST", "/v1/chat/completions", data)
    assert status == 400 and answer["error"]["param"] == field and words in answer["error"]["message"], answer


@pytest.mark.parametrize(
    "body",
    ["{", "[]", "null", "[" * 200, '{"a": NaN}', '"x"', "9" * 5000, '{"model": "\\ud800"}', '{"\\udc00": 1}', b"\xff"],
)
def test_what_is_no_json_object(server, body):
    status, _, answer = server.request("POST", "/v1/chat/completions", body)
    assert status == 400 and answer["error"]["message"].startswith("the request "), answer


def test_many_small_values_are_refused_before_they_are_read():
    with pytest.raises(PromptError, match="JSON values"):
        read_request(b"[" + b"0," * 600_000 + b"0]")


def test_text_that_no_context_holds(server):
    """To tokenize it takes minutes, in which nobody else would be served."""
    for content in ("a b" * 400_000, [text("x" * 1_000_000), image()]):
        status, _, answer = post(server, {"messages": [{"role": "user", "content": content}]})
        assert (
            status == 400
            and answer["error"]["code"] == "context_length_exceeded"
            and "bytes" in answer["error"]["message"]
        ), answer
    assert post(server, {"messages": [message(COLOR, DEMO)]})[2]["choices"][0]["message"]["content"].strip() == "red"


# ---- options ----


def test_nulls_are_defaults():
    names = [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repeat_penalty",
        "seed",
        "stop",
        "n",
        "stream",
        "max_tokens",
        "tools",
        "tool_choice",
        "response_format",
        "logit_bias",
        "logprobs",
        "user",
        "stream_options",
        "star_edge",
        "min_tokens",
    ]
    messages = [{"role": "user", "content": "x"}]
    assert read_request(json.dumps({"messages": messages, **dict.fromkeys(names)}).encode()) == read_request(
        json.dumps({"messages": messages}).encode()
    )
    nested = read_request(
        json.dumps(
            {"messages": messages, "star_edge": {"kept": None}, "stream_options": {"include_usage": None}}
        ).encode()
    )
    assert not nested.star_edge.kept and not nested.stream_options.include_usage


def test_legitimate_options_are_answered(server):
    talk = [
        {"role": "developer", "content": [text("Be short.")]},
        user(image(), text(COLOR)),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": [text("red")]},
        user(text("again?")),
    ]
    options = {
        "top_k": -1,
        "presence_penalty": None,
        "temperature": None,
        "max_tokens": 2,
        "parallel_tool_calls": False,
        "store": False,
        "metadata": {"a": "b"},
        "tools": [{"type": "function", "function": {"name": "look"}}],
        "service_tier": "auto",
    }
    status, _, answer = post(server, {"messages": talk, **options})
    assert status == 200, answer
    # what was answered can be sent again, with all of its nulls
    status, _, answer = post(
        server, {"messages": [*talk, answer["choices"][0]["message"], user(text("and?"))], **options}
    )
    assert status == 200, answer


def test_a_tool_of_which_one_is_chosen(server):
    body = {
        "messages": [message(COLOR, DEMO)],
        "tools": [{"type": "function", "function": {"name": "look"}}],
        "max_tokens": 30,
    }
    status, _, answer = post(server, {**body, "tool_choice": {"type": "function", "function": {"name": "look"}}})
    assert status == 200 and answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "look", answer


def test_bias_and_least_tokens_hold_together(server):
    """llama_cpp drops both where both are given."""
    client = server.client()
    ask = lambda **extra: client.chat.completions.create(
        model="m",
        messages=[message(COLOR, DEMO)],
        temperature=0,
        max_tokens=6,
        extra_body={"repeat_penalty": 1, **extra},
    )
    plain = ask()
    assert plain.usage.completion_tokens < 6
    answer = ask(logit_bias={"65": 100.0}, min_tokens=6)
    assert answer.choices[0].finish_reason == "length" and len(set(answer.choices[0].message.content.strip())) == 1


def test_stream_usage(server):
    client = server.client()
    options = {
        "model": "m",
        "messages": [message(COLOR, DEMO)],
        "temperature": 0,
        "max_tokens": 4,
        "extra_body": {"min_tokens": 4},
    }
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    plain = list(client.chat.completions.create(**options, stream=True))
    assert len(plain) == len(chunks) - 1 and all("usage" not in chunk.model_fields_set for chunk in plain)


def test_afresh_uses_and_leaves_nothing(server):
    ask = lambda **extra: post(server, {"messages": [message(COLOR, DEMO)], **extra})[2]["star_edge"]
    ask()
    used = ask()
    assert used["images"][0]["cached"] and used["reused_tokens"]
    fresh = [ask(star_edge={"afresh": True}) for _ in range(2)]
    assert not any(report["images"][0]["cached"] or report["reused_tokens"] for report in fresh)
    after = ask()
    assert after["images"][0]["cached"] and after["reused_tokens"] == used["reused_tokens"]  # of before: it waited
    assert {key: fresh[0][key] for key in ("average_tokens", "n_vision_kept")} == {
        key: used[key] for key in ("average_tokens", "n_vision_kept")
    }


# ---- OpenAI's client ----


class Answer(pydantic.BaseModel):
    color: Literal["red", "blue"]


def test_openai_stream_helper(server):
    with server.client().chat.completions.stream(
        model="m", messages=[message(COLOR, DEMO)], temperature=0, max_tokens=4
    ) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert final.choices[0].message.content.strip() == "red" and "content.delta" in events


def test_openai_parse(server):
    """`parse` sends a JSON schema, and the answer holds to it."""
    options = {"model": "m", "messages": [message(COLOR, DEMO)], "temperature": 0, "max_tokens": 100}
    parsed = server.client().chat.completions.parse(response_format=Answer, **options)
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_openai_async_client(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="m", messages=[message(COLOR, DEMO)], temperature=0, max_tokens=4, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()).strip() == "red"


def test_models_by_name(server):
    client = server.client()
    assert client.models.retrieve(server.ready["model"]).id == server.ready["model"]
    with pytest.raises(openai.NotFoundError, match="no model of that name"):
        client.models.retrieve("gpt")


# ---- what is not there ----


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("POST", "/health", 405),
        ("POST", "/extras/detokenize", 404),
        ("POST", "/extras/tokenize", 404),
        ("POST", "/v1/embeddings", 404),
        ("POST", "/v1/completions", 404),
        ("POST", "/v1/engines/copilot-codex/completions", 404),
        ("GET", "/page/x", 404),
        ("DELETE", "/", 405),
        ("GET", "/docs", 404),
        ("GET", "/v1/models/", 404),
        ("POST", "/v1/chat/completions/", 404),
    ],
)
def test_other_routes(server, method, path, status):
    got, headers, answer = server.request(method, path, '{"tokens": [-1], "prompt": "x"}')
    assert (
        got == status and set(answer["error"]) == {"message", "type", "param", "code"} and "location" not in headers
    ), answer


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "null", "://", "http://localhost:x"])
def test_malformed_origins(server, origin):
    status, _, answer = server.request("POST", "/v1/chat/completions", {"messages": []}, {"Origin": origin})
    assert status == 403 and answer["error"]["code"] == "wrong_origin"
