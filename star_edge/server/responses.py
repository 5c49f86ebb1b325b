"""OpenAI's Responses API, as chat completions: requests are translated there, and results back.

Text, pictures, functions, JSON schemas and streams are. What needs something that this server does not keep or have
(earlier responses, files, other tools, reasoning) is refused, and the error names the field.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from .messages import FieldError, suggestion
from .schema import ChatRequest, as_chat_request, describe, read_json_object

# Fields that a chat completion takes by the same name
_SAME = {
    *("model", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stream", "min_tokens", "repeat_penalty"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "logit_bias_type", "grammar", "user", "metadata", "store"),
    *("safety_identifier", "prompt_cache_key", "service_tier", "parallel_tool_calls", "prune", "star_edge"),
    *("mirostat_mode", "mirostat_tau", "mirostat_eta"),
}
_TRANSLATED = {"input", "instructions", "max_output_tokens", "tools", "tool_choice", "text", "stream_options"}
# Fields whose value must be one of these: no other changes nothing here
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "include": ([],),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
}
_REFUSED = {
    "previous_response_id": "responses are not kept",
    "conversation": "conversations are not kept",
    "prompt": "prompts are not kept",
    "reasoning": "the model's reasoning is not told apart from its answer",
    "max_tool_calls": "tools are called by the client",
}
_OF_CHAT = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text",
}  # names that chat completions have for it
_INSTEAD = {
    "previous_response_id": "send the earlier input and output in input",
    "conversation": "send its items in input",
    "prompt": "send its text in input",
}


class ResponseRequest:
    """A request of the Responses API.

    Attributes:
        chat: The same as a chat completion.
        places: Where each of its messages comes from, for errors.
        echo: Fields that the response repeats.
    """

    def __init__(self, body: bytes | bytearray) -> None:
        """Raises FieldError for the first field that cannot be used, and PromptError if the body is not an object."""
        values = {name: value for name, value in read_json_object(body).items() if value is not None or name == "prune"}
        for name, value in values.items():
            if name in _REFUSED:
                raise FieldError(name, _REFUSED[name], _INSTEAD.get(name, "leave it out"))
            if name in _ALLOWED and value not in _ALLOWED[name]:
                raise FieldError(name, "not supported", f"use {_ALLOWED[name][0]!r}, or leave it out")
            if name not in _SAME | _TRANSLATED | set(_ALLOWED):
                near = f"write {_OF_CHAT[name]}" if name in _OF_CHAT else suggestion(name, _SAME | _TRANSLATED)
                raise FieldError(name[:60], "unknown field", near)
        if values.get("store"):
            raise FieldError("store", "responses are not kept", "use false, or leave it out")
        messages, self.places = _messages(values)
        chat = {name: value for name, value in values.items() if name in _SAME}
        if "max_output_tokens" in values:
            chat["max_completion_tokens"] = values["max_output_tokens"]
        if "tools" in values:
            chat["tools"] = _tools(values["tools"])
        if "tool_choice" in values:
            chat["tool_choice"] = _tool_choice(values["tool_choice"])
        response_format = _format(values.get("text", {}))
        if response_format is not None:
            chat["response_format"] = response_format
        _check_stream_options(values.get("stream_options", {}))
        chat["stream_options"] = {"include_usage": True}
        try:
            self.chat: ChatRequest = as_chat_request({**chat, "messages": messages})
        except FieldError as error:
            if error.field != "max_completion_tokens":
                raise
            cause = error.cause.removeprefix(f"{error.field}: ")
            raise FieldError("max_output_tokens", cause, error.remedy) from error
        self.echo = {
            "instructions": values.get("instructions"),
            "max_output_tokens": values.get("max_output_tokens"),
            "metadata": values.get("metadata", {}),
            "parallel_tool_calls": self.chat.parallel_tool_calls,
            "temperature": self.chat.temperature,
            "text": values.get("text", {"format": {"type": "text"}}),
            "tool_choice": values.get("tool_choice", "auto"),
            "tools": values.get("tools", []),
            "top_p": self.chat.top_p,
        }


def _messages(values: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages of a chat completion, and the place of each in the request."""
    messages: list[dict[str, Any]] = []
    places: list[str] = []
    instructions = values.get("instructions")
    if instructions is not None:
        if not isinstance(instructions, str):
            raise FieldError("instructions", "not a string", "send text")
        messages.append({"role": "system", "content": instructions})
        places.append("instructions")
    given = values.get("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise FieldError("input", "missing" if given is None else "neither text nor a list of items", "send text")
    for i, item in enumerate(given):
        at = f"input.{i}"
        if not isinstance(item, dict):
            raise FieldError(at, f"a {type(item).__name__}", 'send {"role": "user", "content": "..."}')
        kind = item.get("type", "message")
        if kind == "message":
            message = _message(item)
        elif kind == "function_call":
            call = _call(item, at)
            if messages and messages[-1].get("tool_calls") and places[-1].startswith("input."):
                messages[-1]["tool_calls"].append(call)  # calls of one turn
                continue
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        elif kind == "function_call_output":
            if not isinstance(item.get("call_id"), str):
                raise FieldError(f"{at}.call_id", "missing or not a string", "send that of the function call")
            if item.get("output") is None:
                raise FieldError(f"{at}.output", "missing", "send what the function gave")
            message = {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
        else:
            raise FieldError(
                f"{at}.type",
                f"{str(kind)[:60]!r} is not supported",
                "use message, function_call or function_call_output",
            )
        messages.append(message)
        places.append(at)
    return messages, places


def _message(item: dict[str, Any]) -> dict[str, Any]:
    """A message as a client sends it, or as a response had it."""
    message = {name: value for name, value in item.items() if name not in ("type", "id", "status", "phase")}
    if isinstance(message.get("content"), list):
        message["content"] = [
            {name: value for name, value in part.items() if name != "logprobs"} if isinstance(part, dict) else part
            for part in message["content"]
        ]
    return message


def _call(item: dict[str, Any], at: str) -> dict[str, Any]:
    for name in ("call_id", "name", "arguments"):
        if not isinstance(item.get(name), str):
            raise FieldError(f"{at}.{name}", "missing or not a string", "send the response's function_call as it is")
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}


def _tools(tools: Any) -> list[dict[str, Any]]:
    if not isinstance(tools, list):
        raise FieldError("tools", "not a list", 'send [{"type": "function", "name": "...", "parameters": {...}}]')
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            kind = tool.get("type") if isinstance(tool, dict) else None
            cause = f"{str(kind)[:60]!r} is not a function" if kind else "not a function"
            raise FieldError(f"tools.{i}.type", cause, "this server has no tools of its own: send functions")
    return [{"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} for tool in tools]


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function" and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


def _format(text: Any) -> dict[str, Any] | None:
    """The response_format that `text` stands for."""
    if not isinstance(text, dict):
        raise FieldError("text", "not an object", 'send {"format": {"type": "text"}}')
    for name in text:
        if name not in ("format", "verbosity"):
            raise FieldError(f"text.{name[:60]}", "unknown field", suggestion(name, ("format", "verbosity")))
    if text.get("verbosity") not in (None, "medium"):
        raise FieldError("text.verbosity", "not supported", "leave it out")
    given = text.get("format")
    if given is None:
        return None
    if not isinstance(given, dict) or given.get("type") not in ("text", "json_object", "json_schema"):
        raise FieldError("text.format", "its type is not text, json_object or json_schema", "change it")
    if given["type"] != "json_schema":
        return {"type": given["type"]}
    if not isinstance(given.get("schema"), (dict, bool)):
        raise FieldError("text.format.schema", "missing or not a schema", "send a JSON schema")
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}


def _check_stream_options(options: Any) -> None:
    if not isinstance(options, dict) or any(name != "include_obfuscation" or value for name, value in options.items()):
        raise FieldError("stream_options", "not supported", "leave it out")


class ResponseBuilder:
    """Makes the response, whole or as events, of the results of a chat completion."""

    def __init__(self, request: ResponseRequest) -> None:
        self._request = request
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._n_events = 0

    def whole(self, result: dict[str, Any]) -> dict[str, Any]:
        """The response that a chat completion stands for."""
        choice = result["choices"][0]
        message = choice["message"]
        output: list[dict[str, Any]] = []
        if message.get("content"):
            output.append(_text_item(message["content"]))
        output += [_call_item(call["function"], call["id"]) for call in message.get("tool_calls") or ()]
        response = self._response(result, output or [_text_item("")], choice["finish_reason"])
        return self._finished(response, result.get("usage"), result.get("star_edge"))

    def _response(
        self, result: dict[str, Any], output: list[dict[str, Any]], finish_reason: str | None
    ) -> dict[str, Any]:
        is_cut = finish_reason == "length"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress" if finish_reason is None else "incomplete" if is_cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": result["model"],
            "output": output,
            "previous_response_id": None,
            "reasoning": None,
            "store": False,
            "truncation": "disabled",
            "usage": None,
            **self._request.echo,
        }

    @staticmethod
    def _finished(response: dict[str, Any], usage: dict[str, int] | None, report: Any) -> dict[str, Any]:
        if usage is not None:
            reused = report["reused_tokens"] if report else 0
            response["usage"] = {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": reused},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            }
        if report is not None:
            response["star_edge"] = report
        return response

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        event = {"type": kind, **fields, "sequence_number": self._n_events}
        self._n_events += 1
        return event

    def error(self, error: Exception) -> dict[str, Any]:
        """The event of an error under way: of OpenAI's type error, with the object that its clients raise."""
        described = describe(error)[1]["error"]
        fields = {name: described[name] for name in ("code", "message", "param")}
        return self._event("error", **fields, error=described)

    async def events(
        self, first: dict[str, Any], results: AsyncIterator[dict[str, Any]]
    ) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream, from the chunks of a chat completion's."""
        started = self._response(first, [], None)
        yield self._event("response.created", response=started)
        yield self._event("response.in_progress", response=started)
        items = _Items(self._event)
        finish_reason, usage, report = "stop", None, None
        async for chunk in _chain(first, results):
            usage = chunk.get("usage") or usage
            report = chunk.get("star_edge") or report
            for choice in chunk["choices"]:
                finish_reason = choice["finish_reason"] or finish_reason
                for event in items.add(choice["delta"]):
                    yield event
        for event in items.end(finish_reason):
            yield event
        response = self._finished(self._response(first, items.done, finish_reason), usage, report)
        yield self._event(f"response.{response['status']}", response=response)


class _Items:
    """The output items of a stream: one message, and the calls of functions. event: makes an event."""

    def __init__(self, event: Any) -> None:
        self._event = event
        self.done: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._index: int | None = None  # of the function call that is open

    def add(self, delta: dict[str, Any]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        text = delta.get("content")
        if text:
            if self._open is None or self._open["type"] != "message":
                events += self._close() + self._begin(_text_item("", "in_progress"))
                at = {"item_id": self._item["id"], "output_index": len(self.done), "content_index": 0}
                events.append(self._event("response.content_part.added", **at, part=_text_part("")))
            self._item["content"][0]["text"] += text
            at = {"item_id": self._item["id"], "output_index": len(self.done), "content_index": 0}
            events.append(self._event("response.output_text.delta", **at, delta=text, logprobs=[]))
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            if self._open is None or self._open["type"] != "function_call" or self._index != call.get("index", 0):
                events += self._close()
                self._index = call.get("index", 0)
                named = {"name": function.get("name") or "", "arguments": ""}
                events += self._begin(_call_item(named, call.get("id") or f"call_{uuid.uuid4().hex}", "in_progress"))
            if function.get("arguments"):
                self._item["arguments"] += function["arguments"]
                at = {"item_id": self._item["id"], "output_index": len(self.done)}
                events.append(self._event("response.function_call_arguments.delta", **at, delta=function["arguments"]))
        return events

    def end(self, finish_reason: str) -> list[dict[str, Any]]:
        """Closes what is open. An answer of nothing is an empty message."""
        events = []
        if self._open is None and not self.done:
            events = self._begin(_text_item("", "in_progress"))
            at = {"item_id": self._item["id"], "output_index": 0, "content_index": 0}
            events.append(self._event("response.content_part.added", **at, part=_text_part("")))
        return events + self._close("incomplete" if finish_reason == "length" else "completed")

    @property
    def _item(self) -> dict[str, Any]:
        assert self._open is not None
        return self._open

    def _begin(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        self._open = item
        empty = {**item, "content": []} if item["type"] == "message" else dict(item)
        return [self._event("response.output_item.added", output_index=len(self.done), item=empty)]

    def _close(self, status: str = "completed") -> list[dict[str, Any]]:
        item, self._open = self._open, None
        if item is None:
            return []
        events = []
        at = {"item_id": item["id"], "output_index": len(self.done)}
        if item["type"] == "message":
            part = item["content"][0]
            at["content_index"] = 0
            events.append(self._event("response.output_text.done", **at, text=part["text"], logprobs=[]))
            events.append(self._event("response.content_part.done", **at, part=part))
        else:
            named = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self._event("response.function_call_arguments.done", **at, **named))
        item["status"] = status
        events.append(self._event("response.output_item.done", output_index=len(self.done), item=item))
        self.done.append(item)
        return events


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _text_item(text: str, status: str = "completed") -> dict[str, Any]:
    name = f"msg_{uuid.uuid4().hex}"
    return {"type": "message", "id": name, "status": status, "role": "assistant", "content": [_text_part(text)]}


def _call_item(function: dict[str, Any], call_id: str, status: str = "completed") -> dict[str, Any]:
    arguments = {"name": function["name"], "arguments": function["arguments"]}
    return {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": call_id, "status": status, **arguments}


async def _chain(first: dict[str, Any], rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    yield first
    async for item in rest:
        yield item
