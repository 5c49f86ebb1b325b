"""Messages of a chat request, read into texts and images. Clients write the same thing in many forms.

Knows neither chat templates nor pixels.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import PromptError

# What question files and clients write where an image belongs. The first that occurs as often as there are images is
# taken. <|vision_start|> and <|vision_end|> go with it: libmtmd writes them itself.
_PLACEHOLDERS = (
    "<__media__>",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|image_pad|>",
    "<image>",
    "<start_of_image>",
    "<|image|>",
    "[IMG]",
)
# Tokens of vocabularies that stand for an image or its borders. In a text they are made plain text.
_IMAGE_TOKENS = (
    "<image>",
    "</image>",
    "<image_soft_token>",
    "<start_of_image>",
    "<end_of_image>",
    "<|image|>",
    "<|image>",
    "<image|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|image_split|>",
    "<|img_start|>",
    "<|img_end|>",
    "<|img_thumbnail|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<fake_token_around_image>",
    "<global-img>",
    "<slice>",
    "</slice>",
    "<unk_image>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|video|>",
    "<|IMAGE_START|>",
    "<|IMAGE_END|>",
    "<|IMAGE_PLACEHOLDER|>",
    "<|media_begin|>",
    "<|media_start|>",
    "<|media_content|>",
    "<|media_pad|>",
    "<|media_end|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<\uff5chy_place\u2581holder\u2581no\u2581100\uff5c>",
    "<\uff5chy_place\u2581holder\u2581no\u2581101\uff5c>",
    "<\uff5chy_place\u2581holder\u2581no\u2581102\uff5c>",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
)
VIDEO_KINDS = ("video_url", "input_video", "video")
_TEXT_KINDS = ("text", "input_text", "output_text")
_FORMS = '{"type": "text", "text": ...} and {"type": "image_url", "image_url": {"url": ...}}'


_UNNAMED = object()  # the source of an image that the caller gives beside the messages


@dataclass(frozen=True)
class Picture:
    """An image of a message. source: a URL or path, bytes, a PIL image or an array, as given."""

    source: Any


@dataclass(frozen=True)
class VideoPart(Picture):
    """A video of a message.

    Attributes:
        count: Most frames, or None.
        rate: Frames per second, or None.
    """

    count: Any = None
    rate: Any = None


@dataclass
class Message:
    """One message.

    Attributes:
        role: Its role.
        parts: Its texts and images, in order.
        is_list: Whether its content was a list.
        has_content: False for a message without content, such as an assistant's that only calls tools.
        rest: Its other fields.
    """

    role: str
    parts: list[str | Picture]
    is_list: bool = False
    has_content: bool = True
    rest: dict[str, Any] = field(default_factory=dict)

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]


def read_messages(messages: Any, images: Sequence[Any] = ()) -> list[Message]:
    """Reads messages in OpenAI's form, and in the forms of transformers and of the Responses API.

    Args:
        messages: The messages.
        images: Sources of images that the messages do not name: of parts {"type": "image"} without one, in order. If
            there is no such part, they stand first in the user's first message.

    Raises:
        PromptError: A message cannot be used. The error names the message and the part. Or the images are more or fewer
            than the places for them.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise PromptError(f"messages is a {type(messages).__name__}", "give a list of messages with role and content")
    images = list(images)
    read = [_read_message(message, f"message {i}", bool(images)) for i, message in enumerate(messages)]
    if not read:
        raise PromptError("there are no messages", "give a list of messages with role and content")
    _fill_in(read, images)
    return read


def _fill_in(messages: Sequence[Message], images: Sequence[Any]) -> None:
    """Puts images where the messages leave a place for them, otherwise first in the user's first message."""
    n_places = sum(part.source is _UNNAMED for message in messages for part in message.pictures)
    if n_places and n_places != len(images):
        raise PromptError(
            f'the messages have {n_places} parts {{"type": "image"}} without an image, and images has {len(images)}',
            "give an image for each of them, in the part or in images",
        )
    if n_places:
        sources = iter(images)
        for message in messages:
            message.parts = [
                Picture(next(sources)) if isinstance(part, Picture) and part.source is _UNNAMED else part
                for part in message.parts
            ]
    elif images:
        first = next((message for message in messages if message.role == "user"), None)
        if first is None:
            raise PromptError("images were given, and no message of the user", "add one")
        first.parts, first.is_list = [*map(Picture, images), *first.parts], True


def _read_message(message: Any, where: str, has_images: bool) -> Message:
    if not isinstance(message, Mapping):
        raise PromptError(f"{where} is a {type(message).__name__}", 'write {"role": "user", "content": "..."}')
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise PromptError(f"{where} has the role {role!r}", "use user, assistant, system, developer or tool")
    content = message.get("content")
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    calls = rest.get("tool_calls") or rest.get("function_call")
    if content is None and not (role == "assistant" and ("content" in message or calls)):
        raise PromptError(f"{where} ({role}) has no content", "give a string or a list of parts")
    if isinstance(content, str):
        return Message(role, [check_text(content, f"the text of {where}")], rest=rest)
    if content is None:
        return Message(role, [], has_content=False, rest=rest)
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Iterable):
        raise PromptError(f"the content of {where} is a {type(content).__name__}", "give a string or a list of parts")
    parts = [_read_part(part, f"part {i} of {where}", has_images) for i, part in enumerate(content)]
    return Message(role, parts, True, rest=rest)


def _read_part(part: Any, where: str, has_images: bool) -> str | Picture:
    if isinstance(part, str):
        return check_text(part, f"the text of {where}")
    if not isinstance(part, Mapping):
        raise PromptError(f"{where} is a {type(part).__name__}", f"use {_FORMS}")
    kind = part.get("type")
    if kind in _TEXT_KINDS:
        return check_text(part.get("text"), f"the text of {where}")
    if kind == "refusal":
        return check_text(part.get("refusal"), f"the text of {where}")
    if kind in VIDEO_KINDS:
        return _read_video_part(part, where)
    if kind not in ("image_url", "input_image", "image"):
        raise PromptError(
            f"{where} is of type {str(kind)[:60]!r}, which is neither text nor an image nor a video", f"use {_FORMS}"
        )
    if has_images and kind == "image" and set(part) == {"type"}:
        return Picture(_UNNAMED)
    found = [
        _source(part[name]) for name in ("image_url", "image", "url", "path", "source") if part.get(name) is not None
    ]
    if len(found) != 1 or found[0] is None:
        names = ", ".join(sorted(str(name)[:60] for name in part if name != "type")) or "nothing"
        cause = "names several images" if len(found) > 1 else "names no image that can be read"
        raise PromptError(f"{where} ({kind}) {cause} (it has {names})", f"use {_FORMS}")
    return Picture(found[0])


def _read_video_part(part: Mapping[str, Any], where: str) -> VideoPart:
    """A video, as vLLM (video_url) and Qwen's own tools (video, with fps and nframes) write it."""
    values = [part[name] for name in ("video_url", "video", "url", "path") if part.get(name) is not None]
    value = values[0] if len(values) == 1 else None
    if isinstance(value, Mapping):
        value = value.get("url")
    if value is None or isinstance(value, (bool, int, float)):
        raise PromptError(
            f"{where} ({part.get('type')}) names no video that can be read",
            'use {"type": "video_url", "video_url": {"url": ...}}, with nframes or fps beside it if you like',
        )
    return VideoPart(value, part.get("nframes"), part.get("fps"))


def _source(value: Any) -> Any:
    """The URL in an image part, or the image itself; None for anything else."""
    if isinstance(value, Mapping):
        if value.get("type") == "base64" and isinstance(value.get("data"), str):
            return f"data:{value.get('media_type', 'image/png')};base64,{value['data']}"
        value = value.get("url")
        return value if isinstance(value, str) else None
    return None if isinstance(value, (bool, int, float, list, tuple)) else value


def check_text(text: Any, name: str) -> str:
    """The text.

    Raises:
        PromptError: It is not a str, or has characters that UTF-8 cannot hold.
    """
    if not isinstance(text, str):
        raise PromptError(f"{name} is a {type(text).__name__}", "give a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{name} has characters that are not text (surrogates)", "decode its bytes as UTF-8 first"
        ) from error
    return text


# ---- placeholders ----


def find_placeholder(texts: Sequence[str], n_images: int) -> str | None:
    """The placeholder of images in the texts: the first that occurs as often as there are images, or None."""
    if not n_images:
        return None
    return next((name for name in _PLACEHOLDERS if sum(text.count(name) for text in texts) == n_images), None)


def place_images(message: Message, is_token: Callable[[str], bool]) -> None:
    """Puts images where the placeholders are, if there are as many, and turns all other placeholders into plain text.

    is_token: whether the vocabulary has a single token for a name. Such a name gets a space, as in `< image>`, so that
        it is read as text.
    """
    texts = [part for part in message.parts if isinstance(part, str)]
    name = find_placeholder(texts, len(message.pictures))
    if name is not None:
        pictures = iter(message.pictures)
        parts: list[str | Picture] = []
        for text in texts:
            for i, piece in enumerate(text.split(name)):
                if i:
                    parts.append(next(pictures))
                if piece:
                    parts.append(piece)
        message.parts = parts
    message.parts = [_plain(part, is_token) if isinstance(part, str) else part for part in message.parts]


def _plain(text: str, is_token: Callable[[str], bool]) -> str:
    for name in ("<__media__>", *_IMAGE_TOKENS):
        if name in text and (name == "<__media__>" or is_token(name)):
            text = text.replace(name, f"{name[0]} {name[1:]}")
    return text


# ---- what a template does not know ----


def system_to_user(messages: Sequence[Message]) -> list[Message]:
    """Puts system messages at the beginning of the user's next message, with a blank line after them."""
    result: list[Message] = []
    waiting: list[str | Picture] = []
    for message in messages:
        if message.role == "system":
            waiting += [*message.parts, "\n\n"]
        elif message.role == "user" and waiting:
            result.append(Message("user", [*waiting, *message.parts], message.is_list, rest=message.rest))
            waiting = []
        else:
            result.append(message)
    return result if not waiting else [*result, Message("user", waiting[:-1])]


def tools_to_text(messages: Sequence[Message], calls: bool, results: bool) -> list[Message]:
    """Writes tool calls, their results, or both as JSON into messages of the assistant and the user."""
    result: list[Message] = []
    in_results = False
    for message in messages:
        if results and message.role == "tool":
            about = {name: message.rest[name] for name in ("name", "tool_call_id") if message.rest.get(name)}
            text = "".join(part for part in message.parts if isinstance(part, str))
            parts: list[str | Picture] = [
                json.dumps({"tool_response": {**about, "content": text}}, ensure_ascii=False),
                *message.pictures,
            ]
            if in_results:  # templates want user and assistant in turn
                result[-1].parts += ["\n", *parts]
            else:
                result.append(Message("user", parts))
            in_results = True
            continue
        in_results = False
        if calls and message.role == "assistant" and message.rest.get("tool_calls"):
            called = [parsed(call).get("function", call) for call in message.rest["tool_calls"]]
            text = json.dumps({"tool_calls": called}, ensure_ascii=False)
            result.append(Message("assistant", [*message.parts, *(["\n"] if message.parts else []), text]))
        else:
            result.append(message)
    return result


def parsed(call: Any) -> dict[str, Any]:
    """A tool call with its arguments as an object, if they are JSON text, as in OpenAI's form."""
    result: dict[str, Any] = dict(call)
    function = dict(result.get("function") or {})
    if isinstance(function.get("arguments"), str):
        with contextlib.suppress(ValueError, RecursionError):  # a model wrote it: it stays the text that it is
            function["arguments"] = json.loads(function["arguments"])
    return result | ({"function": function} if function else {})
