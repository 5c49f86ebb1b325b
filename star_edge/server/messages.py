"""The messages and tools of a request, as OpenAI's clients send them. Checks them field by field, and takes out images.

What is unambiguous is put into OpenAI's form. Anything else is refused, and the error names the place. The handler
deals with what a chat template makes of roles and lists. Knows neither models nor pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import ConfigError, PromptError
from ..io.video import Video
from ..messages import VIDEO_KINDS
from ..suggestions import did_you_mean

_KEYS = {
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "function_call",
    "refusal",
    "reasoning_content",
    "annotations",
}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_WITHOUT_EFFECT = {"cache_control", "annotations"}  # in a part: hints, and annotations of an answer
_IMAGES = {
    "image_url": ("image_url",),
    "input_image": ("image_url",),
    "image": ("url", "image", "image_url", "source"),
}  # type of a part -> the fields that may hold its image


_MAX_VIDEOS = 4  # of a request


class FieldError(PromptError):
    """A field of a request cannot be used. field: its place, such as messages.0.content.1."""

    def __init__(self, field: str, cause: str, remedy: str) -> None:
        self.field = field
        super().__init__(f"{field}: {cause}", remedy)


def suggestion(name: str, known: Iterable[str]) -> str:
    return did_you_mean(name, known, "leave it out")


def read_messages(
    messages: list[dict[str, Any]], max_parts: int, places: Sequence[str] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Reads messages.

    Args:
        messages: As the client sent them.
        max_parts: Messages and parts at most. Each takes at least one token.
        places: Where in the request each of them is, for errors. None: messages.0, messages.1, ...

    Returns:
        The messages in one form, with `image_name` in place of each image's URL, a Video for each video, and without
        nulls (but for an assistant's content); and the URLs of the images, in order.

    Raises:
        FieldError: The first field that cannot be used.
    """
    urls: list[str] = []
    n_parts = len(messages) + sum(len(m["content"]) for m in messages if isinstance(m.get("content"), list))
    if n_parts > max_parts:
        raise FieldError(
            "messages",
            f"{n_parts} messages and parts are more than the context has tokens",
            f"send at most {max_parts}",
        )
    places = places or [f"messages.{i}" for i in range(len(messages))]
    read = [_message(message, place, urls) for message, place in zip(messages, places)]
    if len(videos_in(read)) > _MAX_VIDEOS:
        raise FieldError("messages", f"more than {_MAX_VIDEOS} videos", "send fewer")
    return read, urls


def videos_in(messages: list[dict[str, Any]]) -> list[Video]:
    """The videos of messages that `read_messages` has read."""
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    return [part["video"] for part in parts if part["type"] == "video"]


def without_videos(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as JSON values: a video's part without the video."""

    def part(one: dict[str, Any]) -> dict[str, Any]:
        video = one.get("video")
        return {"type": "video", "nframes": video.count, "fps": video.rate} if isinstance(video, Video) else one

    return [
        {**m, "content": [part(one) for one in m["content"]] if isinstance(m["content"], list) else m["content"]}
        for m in messages
    ]


def image_name(number: int) -> str:
    return f"image-{number}"


def _message(message: dict[str, Any], at: str, urls: list[str]) -> dict[str, Any]:
    message = {name: value for name, value in message.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise FieldError(
            f"{at}.role",
            "missing" if role is None else f"{str(role)[:60]!r} is not a role",
            f"use one of {', '.join(_ROLES)}",
        )
    for name in message:
        if name not in _KEYS:
            raise FieldError(f"{at}.{name[:60]}", "unknown field", suggestion(name, _KEYS))
    for name in ("name", "tool_call_id", "refusal", "reasoning_content"):
        if name in message and not isinstance(message[name], str):
            raise FieldError(f"{at}.{name}", "not a string", "send text")
    message.pop("annotations", None)
    refusal = message.pop("refusal", None)
    content = message.get("content")
    if content is None and role in ("system", "developer", "user"):
        raise FieldError(f"{at}.content", "missing", "send text, or a list of parts")
    if content is None:  # an assistant that only called tools, or a tool without a result
        content = refusal if refusal is not None else None if role == "assistant" else ""
    elif not isinstance(content, (str, list)):
        raise FieldError(f"{at}.content", f"a {type(content).__name__}", "send text, or a list of parts")
    elif content == [] and role == "user":
        raise FieldError(f"{at}.content", "an empty list", "send text, or a list of parts")
    if isinstance(content, list):
        content = [_part(part, f"{at}.content.{i}", urls) for i, part in enumerate(content)]
    message["content"] = content
    if "tool_calls" in message or "function_call" in message:
        if role != "assistant":
            raise FieldError(at, f"a {role} message calls tools", "only an assistant does")
        _check_calls(message, at)
    return message


def _part(part: Any, at: str, urls: list[str]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise FieldError(at, f"a {type(part).__name__}", 'a part is an object such as {"type": "text", "text": "..."}')
    part = {name: value for name, value in part.items() if value is not None and name not in _WITHOUT_EFFECT}
    kind = part.pop("type", None)
    if kind in ("text", "input_text", "output_text", "refusal"):
        name = "refusal" if kind == "refusal" else "text"
        text = part.pop(name, None)
        _refuse_more(part, at)
        if not isinstance(text, str):
            raise FieldError(f"{at}.{name}", "missing" if text is None else "not a string", "send text")
        return {"type": "text", "text": text}
    if kind in VIDEO_KINDS:
        return {"type": "video", "video": _video(part, kind, at)}
    if not isinstance(kind, str) or kind not in _IMAGES:
        cause = "missing" if kind is None else f"{str(kind)[:60]!r} is not supported"
        raise FieldError(f"{at}.type", cause, "use text, image_url or video_url")
    urls.append(_url(part, kind, at))
    return {"type": "image_url", "image_url": {"url": image_name(len(urls) - 1)}}


def _video(part: dict[str, Any], kind: str, at: str) -> Video:
    """A video part: {"video_url": {"url": U}}, or U alone, with Qwen's nframes and fps beside it.

    U is a data: URL of a video or an animated image, or as in Qwen's form a list of data: URLs of pictures, its frames.
    """
    key = "video_url" if kind == "input_video" and "video_url" in part else kind.removeprefix("input_")
    value, count, rate = part.pop(key, None), part.pop("nframes", None), part.pop("fps", None)
    _refuse_more(part, at)
    if isinstance(value, dict):
        at, key, value = f"{at}.{key}", "url", dict(value)
        url = value.pop("url", None)
        _refuse_more(value, at)
        value = url
    if isinstance(value, list):
        if rate is not None:
            raise FieldError(f"{at}.fps", "pictures have no times", "leave it out, and send nframes if you like")
        for i, url in enumerate(value):
            if not _is_data_url(url):
                raise FieldError(f"{at}.{key}.{i}", "not a data: URL", 'send "data:image/jpeg;base64,..."')
    elif not _is_data_url(value):
        cause = "missing" if value is None else "not a data: URL"
        raise FieldError(f"{at}.{key}", cause, 'send {"url": "data:video/mp4;base64,..."}')
    try:
        return Video(value, count, rate)
    except ConfigError as error:
        cause = error.cause.replace("count=", "nframes=").replace("rate=", "fps=")
        raise FieldError(at, cause, error.remedy) from error


def _is_data_url(value: Any) -> bool:
    return isinstance(value, str) and value[:5].lower() == "data:"


def _url(part: dict[str, Any], kind: str, at: str) -> str:
    """The URL of an image part: OpenAI's {"image_url": {"url": U}}, U alone, or the forms of other APIs."""
    key = next((name for name in _IMAGES[kind] if name in part), _IMAGES[kind][0])
    image = part.pop(key, None)
    part.pop("detail", None)  # whether OpenAI's encoder cuts the picture up
    _refuse_more(part, at)
    if isinstance(image, dict):
        at, key, image = f"{at}.{key}", "url", {name: value for name, value in image.items() if value is not None}
        if image.get("type") == "base64":  # Anthropic's source
            kind, image["url"] = image.pop("media_type", "image/png"), image.pop("data", None)
            if isinstance(kind, str) and isinstance(image["url"], str):
                image["url"] = f"data:{kind};base64,{image['url']}"
        image.pop("type", None)
        url = image.pop("url", None)
        image.pop("detail", None)
        _refuse_more(image, at)
        image = url
    if not isinstance(image, str):
        raise FieldError(
            f"{at}.{key}", "missing" if image is None else "not a string", 'send {"url": "data:image/png;base64,..."}'
        )
    return image


def _refuse_more(rest: dict[str, Any], at: str) -> None:
    for name in rest:
        raise FieldError(f"{at}.{name[:60]}", "unknown field", "leave it out")


def _check_calls(message: dict[str, Any], at: str) -> None:
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list):
        raise FieldError(f"{at}.tool_calls", "not a list", "send the answer's tool_calls as they are")
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        _check_call(function, f"{at}.tool_calls.{i}.function")
        call.setdefault("type", "function")
    if not calls:
        message.pop("tool_calls", None)
    if "function_call" in message:
        _check_call(message["function_call"], f"{at}.function_call")


def _check_call(function: Any, at: str) -> None:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FieldError(at, "not a function call", 'send {"name": "...", "arguments": "..."}')
    if not isinstance(function.setdefault("arguments", "{}"), (str, dict)):
        raise FieldError(f"{at}.arguments", "neither text nor an object", "send JSON as text")


def read_functions(functions: list[Any], at: str) -> list[dict[str, Any]]:
    """Checks function objects. A function without parameters gets a schema that takes none.

    Raises:
        FieldError: An entry is not a function.
    """
    return [_function(function, f"{at}.{i}") for i, function in enumerate(functions)]


def read_tools(tools: list[Any]) -> list[dict[str, Any]]:
    """Checks tools, all of which must be functions, as `read_functions` does.

    Raises:
        FieldError: An entry is not such a tool.
    """
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type", "function") != "function":
            raise FieldError(
                f"tools.{i}", "not a function", 'a tool is {"type": "function", "function": {"name": "..."}}'
            )
    return [
        {"type": "function", "function": _function(tool.get("function"), f"tools.{i}.function")}
        for i, tool in enumerate(tools)
    ]


def _function(function: Any, at: str) -> dict[str, Any]:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FieldError(f"{at}.name", "missing or not a string", 'a function is {"name": "...", "parameters": {...}}')
    known: dict[str, Any] = {name: value for name, value in function.items() if value is not None}
    if not isinstance(known.setdefault("parameters", {"type": "object", "properties": {}}), dict):
        raise FieldError(f"{at}.parameters", "not a JSON schema", "send an object")
    return known


def check_tool_choice(choice: Any, names: list[str]) -> None:
    """Raises FieldError unless the choice is none, auto, required, or one of the tools."""
    if choice in (None, "none", "auto"):
        return
    if not names:
        raise FieldError("tool_choice", "there are no tools", "send tools, or leave it out")
    if choice == "required":
        return
    function = (
        choice.get("function") if isinstance(choice, dict) and choice.get("type", "function") == "function" else None
    )
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise FieldError(
            "tool_choice",
            "unknown",
            'use "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}',
        )
    if name not in names:
        raise FieldError(
            "tool_choice", f"{name[:60]!r} is not a tool of this request", f"use one of {', '.join(names[:10])}"
        )
