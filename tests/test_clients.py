"""The server with clients as people use them: OpenAI's, LangChain's ChatOpenAI, LiteLLM, and Open WebUI's requests.

LangChain and LiteLLM are in the extra `clients`; without them their tests are skipped. Requests of Open WebUI are
written down here as its router sends them (backend/open_webui/routers/openai.py: to an address that is not OpenAI's).
"""

import asyncio
import json
import os

import openai
import pytest
from helpers.serving import COLOR, DEMO, Server

PAINT = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "paint a shape",
        "parameters": {
            "type": "object",
            "properties": {"color": {"type": "string", "enum": ["red", "blue"]}},
            "required": ["color"],
        },
    },
}
SCHEMA = {
    "title": "Answer",
    "type": "object",
    "properties": {"color": {"type": "string", "enum": ["red", "blue"]}},
    "required": ["color"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "Answer", "schema": SCHEMA, "strict": True}}
pytestmark = pytest.mark.filterwarnings(  # LiteLLM's own
    "ignore:.*ReadOnly:UserWarning", "ignore::DeprecationWarning:litellm"
)
BROKEN = "data:image/png;base64,AAAA"


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    status, stderr = server.stop()
    assert status == 0 and "Traceback" not in stderr


def user(url=DEMO, question=COLOR):
    image = {"type": "image_url", "image_url": {"url": url}}
    return {"role": "user", "content": [{"type": "text", "text": question}, image]}


# ---- the openai package ----


@pytest.fixture(scope="module")
def plain(server):
    return server.client()


def asked(**options):
    return {"model": "any", "messages": [user()], "temperature": 0, "max_tokens": 8, **options}


def test_openai_image_and_stream(plain):
    text = plain.chat.completions.create(**asked()).choices[0].message.content
    assert text.strip() == "red"
    chunks = list(plain.chat.completions.create(**asked(), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_openai_tools(plain):
    options = asked(tools=[PAINT], tool_choice={"type": "function", "function": {"name": "paint"}}, max_tokens=40)
    choice = plain.chat.completions.create(**options).choices[0]
    (call,) = choice.message.tool_calls
    assert call.function.name == "paint" and json.loads(call.function.arguments)["color"] in ("red", "blue")
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    turns = [user(), choice.message.model_dump(), result]
    assert plain.chat.completions.create(**asked(messages=turns)).choices[0].message.content is not None


def test_openai_json_schema(plain):
    answer = plain.chat.completions.create(**asked(response_format=JSON_SCHEMA, max_tokens=40))
    assert json.loads(answer.choices[0].message.content)["color"] in ("red", "blue")


def test_openai_errors(plain):
    with pytest.raises(openai.BadRequestError) as caught:
        plain.chat.completions.create(**asked(messages=[user(BROKEN)]))
    assert caught.value.code == "ImageError" and caught.value.request_id.startswith("req_")
    with pytest.raises(openai.BadRequestError) as caught:
        plain.chat.completions.create(**asked(messages=[user(question="word " * 1500)]))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        plain.models.retrieve("nothing")
    with pytest.raises(openai.NotFoundError):
        plain.embeddings.create(model="any", input="x")


# ---- LangChain ----


@pytest.fixture(scope="module")
def chain(server):
    langchain = pytest.importorskip("langchain_openai", reason="pip install 'star-edge[clients]'")
    return langchain.ChatOpenAI(
        model="any", base_url=server.url + "/v1", api_key="none", temperature=0, max_tokens=40, max_retries=0
    )


def human(url=DEMO):
    from langchain_core.messages import HumanMessage

    return HumanMessage(content=user(url)["content"])


def test_langchain_image_stream_and_async(chain):
    answer = chain.invoke([human()])
    assert answer.content.strip() == "red" and answer.usage_metadata["input_tokens"] > 144
    pieces = list(chain.stream([human()]))
    assert "".join(piece.content for piece in pieces) == answer.content
    assert pieces[-1].response_metadata or any(piece.response_metadata.get("finish_reason") for piece in pieces)
    assert asyncio.run(chain.ainvoke([human()])).content == answer.content
    system = [("system", "be brief"), human()]
    assert isinstance(chain.invoke(system).content, str)


def test_langchain_tools(chain):
    from langchain_core.messages import ToolMessage

    bound = chain.bind_tools([PAINT], tool_choice="paint")
    first = bound.invoke([human()])
    (call,) = first.tool_calls
    assert call["name"] == "paint" and call["args"]["color"] in ("red", "blue")
    streamed = None
    for piece in bound.stream([human()]):
        streamed = piece if streamed is None else streamed + piece
    assert streamed.tool_calls[0]["args"] == call["args"]
    assert isinstance(chain.invoke([human(), first, ToolMessage("done", tool_call_id=call["id"])]).content, str)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured_output(chain, method):
    answer = chain.with_structured_output(SCHEMA, method=method).invoke([human()])
    assert answer["color"] in ("red", "blue")


def test_langchain_responses_api(chain):
    import langchain_openai

    over = langchain_openai.ChatOpenAI(
        model="any",
        base_url=chain.openai_api_base,
        api_key="none",
        temperature=0,
        max_tokens=8,
        max_retries=0,
        use_responses_api=True,
    )
    assert over.invoke([human()]).text.strip() == "red"
    assert "".join(piece.text for piece in over.stream([human()])).strip() == "red"


def test_langchain_errors(chain):
    with pytest.raises(openai.BadRequestError, match="not an image"):
        chain.invoke([human(BROKEN)])
    with pytest.raises(openai.BadRequestError, match="not an image"):
        list(chain.stream([human(BROKEN)]))


# ---- LiteLLM ----


@pytest.fixture(scope="module")
def lite(server):
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise it asks the network for prices when imported
    litellm = pytest.importorskip("litellm", reason="pip install 'star-edge[clients]'")
    litellm.telemetry = False

    def complete(messages=None, **options):
        fields = {"max_tokens": 8, "temperature": 0, "api_base": server.url + "/v1", "api_key": "none", **options}
        return litellm.completion("openai/any", messages or [user()], max_retries=0, **fields)

    return complete


def test_litellm_image_and_stream(lite):
    answer = lite()
    assert answer.choices[0].message.content.strip() == "red" and answer.usage.prompt_tokens > 144
    chunks = list(lite(stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == answer.choices[0].message.content


def test_litellm_tools(lite):
    options = dict(tools=[PAINT], tool_choice={"type": "function", "function": {"name": "paint"}}, max_tokens=40)
    choice = lite(**options).choices[0]
    (call,) = choice.message.tool_calls
    assert json.loads(call.function.arguments)["color"] in ("red", "blue")
    deltas = [chunk.choices[0].delta.tool_calls for chunk in lite(stream=True, **options) if chunk.choices]
    parts = [part.function.arguments or "" for delta in deltas for part in delta or ()]
    assert json.loads("".join(parts)) == json.loads(call.function.arguments)
    turns = [user(), choice.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    assert lite(turns).choices[0].finish_reason in ("stop", "length")


def test_litellm_json_schema(lite):
    answer = lite(response_format=JSON_SCHEMA, max_tokens=40)
    assert json.loads(answer.choices[0].message.content)["color"] in ("red", "blue")


def test_litellm_errors(lite):
    import litellm

    with pytest.raises(litellm.BadRequestError, match="image"):
        lite([user(BROKEN)])
    with pytest.raises(litellm.BadRequestError, match="context of 1024"):
        lite([user(question="word " * 1500)])


# ---- Open WebUI ----

WEBUI_HEADERS = {
    "Authorization": "Bearer none",
    "X-OpenWebUI-User-Name": "A%20User",
    "X-OpenWebUI-User-Id": "1",
    "X-OpenWebUI-User-Email": "a@example.org",
    "X-OpenWebUI-User-Role": "user",
    "X-OpenWebUI-Chat-Id": "2",
}


def webui(server, body):
    """Status, and the body or the events of a stream."""
    status, headers, answer = server.request("POST", "/v1/chat/completions", body, WEBUI_HEADERS)
    if "event-stream" not in headers["Content-Type"]:
        return status, answer
    events = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return status, [json.loads(event) for event in events[:-1]]


def test_webui_lists_the_models(server):
    status, _, answer = server.request("GET", "/v1/models", headers=WEBUI_HEADERS)
    assert status == 200 and answer["object"] == "list" and answer["data"][0]["id"] == server.ready["model"]
    assert "pipeline" not in answer["data"][0]


def test_webui_chat_with_a_picture(server):
    body = {
        "stream": True,
        "model": server.ready["model"],
        "messages": [{"role": "system", "content": "User Context:\n\n"}, user()],
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0,
        "repeat_penalty": 1.1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "seed": 0,
        "stop": ["</s>"],
        "max_tokens": 8,
        "logit_bias": {},
    }
    status, events = webui(server, body)
    assert status == 200 and events[-1]["usage"]["prompt_tokens"] > 144
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
    assert (
        text == webui(server, {**body, "stream": False, "stream_options": None})[1]["choices"][0]["message"]["content"]
    )


def test_webui_goes_on(server):
    """Later turns have the answer as text, also an empty one of an answer that was stopped."""
    turns = [user(), {"role": "assistant", "content": "red"}, {"role": "user", "content": "are you sure?"}]
    for messages in (turns, [user(), {"role": "assistant", "content": ""}, user(question="again")]):
        body = {"stream": True, "model": "any", "messages": messages, "max_tokens": 8}
        status, events = webui(server, body)
        assert status == 200 and events[-1]["choices"][0]["finish_reason"]


def test_webui_makes_a_title_and_tags(server):
    """Its tasks: one message, not streamed, max_completion_tokens under the older name."""
    prompt = (
        "### Task:\nGenerate a concise, 3-5 word title.\n### Output:\nJSON format\n### Chat History:\nUSER: " + COLOR
    )
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": prompt}],
        "stream": False,
        "max_tokens": 8,
    }
    status, answer = webui(server, body)
    assert status == 200 and isinstance(answer["choices"][0]["message"]["content"], str)
    assert webui(server, {**body, "max_tokens": None, "max_completion_tokens": 8})[0] == 200


def test_webui_native_tools(server):
    body = {"stream": True, "model": "any", "messages": [user()], "tools": [PAINT], "max_tokens": 40}
    status, events = webui(server, body)
    assert status == 200 and events[-1]["choices"][0]["finish_reason"]
    call = {
        "index": 0,
        "id": "call_1",
        "type": "function",
        "function": {"name": "paint", "arguments": '{"color": "red"}'},
    }
    turns = [
        user(),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    assert webui(server, {**body, "messages": turns})[0] == 200


def test_webui_json_schema(server):
    body = {"stream": False, "model": "any", "messages": [user()], "response_format": JSON_SCHEMA, "max_tokens": 40}
    status, answer = webui(server, body)
    assert status == 200 and json.loads(answer["choices"][0]["message"]["content"])["color"] in ("red", "blue")


def test_webui_errors(server):
    for fields, words in (({"messages": [user(BROKEN)]}, "image"), ({"reasoning_effort": "low"}, "reasoning_effort")):
        status, answer = webui(server, {"stream": True, "model": "any", "messages": [user()], **fields})
        assert status == 400 and words in answer["error"]["message"]
