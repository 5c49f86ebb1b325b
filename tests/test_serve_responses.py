"""OpenAI's Responses API: the same answers as chat completions, in the form that OpenAI's own client reads."""

import itertools
import json
from typing import Literal

import openai
import pytest
from helpers.serving import COLOR, DEMO, Server
from pydantic import BaseModel

from star_edge.errors import ConfigError, PromptError
from star_edge.server.messages import FieldError, read_messages
from star_edge.server.responses import ResponseRequest

PAINT = {
    "type": "function",
    "name": "paint",
    "description": "paint a shape",
    "parameters": {
        "type": "object",
        "properties": {"color": {"type": "string", "enum": ["red", "blue"]}},
        "required": ["color"],
    },
    "strict": True,
}


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    status, stderr = server.stop()
    assert status == 0 and "Traceback" not in stderr


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def asked(question=COLOR, *urls, **options):
    pictures = [{"type": "input_image", "image_url": url, "detail": "auto"} for url in urls or [DEMO]]
    content = [*pictures, {"type": "input_text", "text": question}]
    given = [{"role": "user", "content": content}]
    return {"model": "any", "input": given, "temperature": 0, "max_output_tokens": 4, **options}


def test_a_picture_by_data_url_is_answered_as_a_chat_completion(client):
    content = [{"type": "image_url", "image_url": {"url": DEMO}}, {"type": "text", "text": COLOR}]
    chat = client.chat.completions.create(
        model="any", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=4
    )
    response = client.responses.create(**asked(), extra_body={"prune": "balanced"})
    assert response.output_text == chat.choices[0].message.content and response.output_text.strip() == "red"
    assert response.status == "completed" and response.error is None and response.store is False
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert response.star_edge["average_tokens"] == chat.star_edge["average_tokens"]
    off = client.responses.create(**asked(), extra_body={"prune": None})
    assert off.star_edge["config"] is None and off.star_edge["average_tokens"] == 144


def test_text_alone_and_instructions(client):
    response = client.responses.create(
        model="any", input="hello", instructions="be brief", max_output_tokens=1, temperature=0
    )
    chat = client.chat.completions.create(
        model="any",
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        max_tokens=1,
        temperature=0,
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.instructions == "be brief"


def test_a_stream_tells_all_its_client_needs(client):
    events = list(client.responses.create(**asked(), stream=True))
    kinds = [kind for kind, _ in itertools.groupby(event.type for event in events)]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    response = events[-1].response
    assert text == response.output_text == client.responses.create(**asked()).output_text
    assert response.usage.output_tokens == 1 and response.star_edge["n_image_tokens"] == 144
    item = next(event.item for event in events if event.type == "response.output_item.done")
    assert item.id == response.output[0].id == events[4].item_id
    with client.responses.stream(**asked()) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == text
    cut = list(client.responses.create(**asked("hello", max_output_tokens=1), stream=True))[-1]
    assert cut.type == "response.incomplete" and cut.response.output[0].status == "incomplete"


def test_functions_whole_and_in_a_stream(client):
    options = asked(tools=[PAINT], tool_choice={"type": "function", "name": "paint"}, max_output_tokens=40)
    (call,) = client.responses.create(**options).output
    assert call.type == "function_call" and call.name == "paint"
    assert json.loads(call.arguments)["color"] in ("red", "blue")
    events = list(client.responses.create(**options, stream=True))
    parts = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(parts) > 1 and "".join(parts) == call.arguments == events[-1].response.output[0].arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    turns = [*options["input"], call.model_dump(), result]
    after = client.responses.create(model="any", input=turns, max_output_tokens=4, temperature=0)
    assert after.output[0].type == "message"


def test_a_json_schema(client):
    class Answer(BaseModel):
        color: Literal["red", "blue"]

    parsed = client.responses.parse(**asked(max_output_tokens=40), text_format=Answer)
    assert parsed.output_parsed.color in ("red", "blue")


def test_a_response_goes_back_as_it_came(client):
    first = client.responses.create(**asked())
    turns = [*asked()["input"], *[item.model_dump() for item in first.output], {"role": "user", "content": "and now?"}]
    second = client.responses.create(model="any", input=turns, max_output_tokens=4, temperature=0)
    assert second.star_edge["reused_tokens"] >= 43 and second.usage.input_tokens > first.usage.input_tokens


REFUSED = [
    ({"previous_response_id": "resp_1"}, "previous_response_id", "are not kept"),
    ({"conversation": "conv_1"}, "conversation", "are not kept"),
    ({"reasoning": {"effort": "low"}}, "reasoning", "not told apart"),
    ({"store": True}, "store", "are not kept"),
    ({"background": True}, "background", "not supported"),
    ({"truncation": "auto"}, "truncation", "not supported"),
    ({"include": ["file_search_call.results"]}, "include", "not supported"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type", "no tools of its own"),
    ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"max_output_tokens": 0}, "max_output_tokens", "0 asks for no answer"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format", "its type"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "not supported"),
    ({"max_tokens": 5}, "max_tokens", "write max_output_tokens"),
    ({"input": []}, "input", "neither text"),
    ({"input": None}, "input", "missing"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type", "'item_reference' is not supported"),
    ({"input": [{"role": "boss", "content": "x"}]}, "input.0.role", "is not a role"),
    (
        {"input": [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "input_file"}]}]},
        "input.1.content.0.type",
        "is not supported",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
        "input.0.content.0.file_id",
        "unknown field",
    ),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.0.call_id", "missing"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=[param for _, param, _ in REFUSED])
def test_what_it_does_not_have_is_refused_by_name(server, fields, param, words):
    body = {name: value for name, value in {"input": "hi", **fields}.items() if value is not None}
    status, _, answer = server.request("POST", "/v1/responses", body)
    assert status == 400 and answer["error"]["param"] == param and words in answer["error"]["message"]


def test_defaults_that_clients_send_are_taken():
    fields = {"store": False, "background": False, "include": [], "truncation": "disabled", "reasoning": None}
    fields |= {"tool_choice": "auto", "text": {"format": {"type": "text"}}, "top_logprobs": 0, "tools": []}
    assert ResponseRequest(json.dumps({"input": "hi", **fields}).encode()).chat.messages[0]["content"] == "hi"
    with pytest.raises(FieldError):
        ResponseRequest(json.dumps({"input": "hi", "store": True}).encode())


def test_calls_of_one_turn_are_one_message():
    calls = [{"type": "function_call", "call_id": str(i), "name": "f", "arguments": "{}"} for i in range(2)]
    results = [{"type": "function_call_output", "call_id": str(i), "output": "x"} for i in range(2)]
    body = {"instructions": "be brief", "input": [{"role": "user", "content": "hi"}, *calls, *results]}
    request = ResponseRequest(json.dumps(body).encode())
    assert [m["role"] for m in request.chat.messages] == ["system", "user", "assistant", "tool", "tool"]
    assert [call["id"] for call in request.chat.messages[2]["tool_calls"]] == ["0", "1"]
    assert request.places == ["instructions", "input.0", "input.1", "input.3", "input.4"]


def test_errors_of_the_picture(client):
    for url in ("data:image/png;base64,AAAA", "https://example.org/a.png"):
        with pytest.raises(openai.BadRequestError, match="image"):
            client.responses.create(**asked(COLOR, url))


ODD = (
    None,
    True,
    0,
    -1,
    1.5,
    "",
    "x",
    [],
    [[]],
    [5],
    {},
    {"type": 5},
    {"type": []},
    [{"type": "function"}],
    [{"a": 1}],
)
FIELDS = (
    *(
        "input",
        "instructions",
        "max_output_tokens",
        "tools",
        "tool_choice",
        "text",
        "stream_options",
        "stream",
        "store",
    ),
    *("include", "truncation", "background", "metadata", "temperature", "model", "prune", "star_edge", "top_logprobs"),
)


def test_odd_values_have_typed_errors():
    n_refused = 0
    items = [{"role": "user", "content": value} for value in ODD] + [
        {"type": kind, **fields}
        for kind in ("function_call", "function_call_output", "message")
        for fields in ({"call_id": 5}, {"call_id": "a", "output": 5}, {"call_id": "a", "name": [], "arguments": 5})
    ]
    bodies = [{"input": "hi", name: value} for name in FIELDS for value in ODD]
    bodies += [{"input": [item]} for item in items]
    bodies += [{"input": "hi", "text": {"format": value}} for value in ODD]
    bodies += [{"input": "hi", "tool_choice": {"type": "function", "name": value}} for value in ODD]
    for body in bodies:
        try:
            request = ResponseRequest(json.dumps(body).encode())
            read_messages(request.chat.messages, 1000, request.places)
        except (PromptError, ConfigError):
            n_refused += 1
    assert len(bodies) > n_refused > len(bodies) / 3
