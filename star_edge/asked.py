"""What a request asks, read from a caller's arguments: the whole prompt, its images and its options.

Knows chat templates and llama_cpp's options. Knows no pixels, and nothing of whose turn it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, cast

import numpy as np
from llama_cpp import Llama

from .chat import ChatFormat
from .chat_options import check_chat_options
from .errors import ConfigError
from .io.images import ImageLimits, ImageSource, load_image
from .io.video import Frames, Video, VideoFrame, read_video
from .llamacpp.chat_hook import template_options
from .llamacpp.guarded import check_length, check_options
from .messages import check_text
from .suggestions import nearest

Images = Sequence[ImageSource | Video] | ImageSource | Video

# Arguments of create_completion, without those that change the prompt or the form of the result, and those that
# `StarVLM.generate` names itself
SAMPLING = set(inspect.signature(Llama.create_completion).parameters) - {
    "self",
    "prompt",
    "suffix",
    "echo",
    "logprobs",
    "stream",
    "model",
    "max_tokens",
    "temperature",
}
# Options of a chat completion that change the form of the result
_NOT_OF_CHAT = ("llama", "model", "logprobs", "top_logprobs")


@dataclass
class Asked:
    """What a request asks.

    Attributes:
        images: Sources of the images, in the order of the prompt's markers. Frames of videos have been read.
        text: The prompt, with a marker for each image.
        options: Options of Llama.create_completion.
        tool: The function that the model has to call, or None.
    """

    images: list[ImageSource | VideoFrame]
    text: str
    options: dict[str, Any]
    tool: str | None = None


def check_sampling(sampling: Iterable[str], named: Iterable[str]) -> None:
    """Checks names of sampling options. named: arguments that the caller takes itself, for suggestions.

    Raises:
        ConfigError: One of them does not exist.
    """
    unknown = sorted(set(sampling) - SAMPLING)
    if unknown:
        names = [*named, *sorted(SAMPLING)]
        near = nearest(unknown[0], names)
        raise ConfigError(
            f"{', '.join(unknown)} is not an option of generate",
            f"did you mean {near}=?" if near is not None else f"use one of {', '.join(names)}",
        )


def ask_prompt(
    llama: Llama, template: ChatFormat, prompt: str, images: Images, chat: bool, limits: ImageLimits, **options: Any
) -> Asked:
    """What `StarVLM.generate` asks. limits: what frames of videos may cost.

    Raises:
        StarEdgeError: As `StarVLM.generate`.
    """
    checked = check_options(llama, options) if options else {}
    sources = [read_video(one, limits) if isinstance(one, Video) else one for one in image_list(images)]
    flat, videos, frames = frames_apart(sources)
    text = whole_prompt(llama, template, prompt, len(sources), chat, videos)
    asked: list[ImageSource | VideoFrame] = [
        cast(ImageSource, one) if frame is None else VideoFrame(cast(np.ndarray, one), *frame)
        for one, frame in zip(flat, frames)
    ]
    return Asked(asked, text, checked)


FrameOf = tuple[int, float | None]  # index of the video, and the frame's time there in seconds or None


def frames_apart(pictures: Sequence[Any]) -> tuple[list[Any], dict[int, Frames], list[FrameOf | None]]:
    """Pictures and frames of videos, side by side.

    Args:
        pictures: Pictures, or sources of them, and Frames.

    Returns:
        All of them, a picture for each frame; the videos, by their indices in `pictures`; and for each of the first
        which frame it is, with the index of its video in the prompt, or None.
    """
    videos = {i: picture for i, picture in enumerate(pictures) if isinstance(picture, Frames)}
    flat: list[Any] = []
    frames: list[FrameOf | None] = []
    for i, picture in enumerate(pictures):
        if i not in videos:
            flat.append(picture)
            frames.append(None)
            continue
        number = sum(j < i for j in videos)
        flat += videos[i].pictures
        frames += [(number, videos[i].second(k)) for k in range(len(videos[i].pictures))]
    return flat, videos, frames


def frame_of(source: object) -> FrameOf | None:
    """Which frame an image of a prompt is, or None."""
    return (source.video, source.second) if isinstance(source, VideoFrame) else None


def load_picture(source: ImageSource | Video, limits: ImageLimits) -> np.ndarray | Frames:
    """The pixels of an image, or the frames of a video."""
    return read_video(source, limits) if isinstance(source, Video) else load_image(source, limits)


def whole_prompt(
    llama: Llama, template: ChatFormat, prompt: str, n_images: int, chat: bool, videos: Mapping[int, Frames] = {}
) -> str:
    """A prompt with a marker for each image and each frame, in the chat template unless it is complete as it is."""
    check_text(prompt, "the prompt")
    check_length(llama, prompt)
    place = template.format if chat else template.mark
    return place(prompt, n_images, videos)


def ask_chat(
    llama: Llama,
    template: ChatFormat,
    messages: Iterable[Mapping[str, Any]],
    images: Images,
    limits: ImageLimits,
    named: Iterable[str],
    **options: Any,
) -> Asked:
    """What `StarVLM.chat` asks. limits: as for `ask_prompt`. named: arguments that it takes itself, for suggestions.

    Raises:
        StarEdgeError: As `StarVLM.chat`.
    """
    refused = sorted(set(options) & set(_NOT_OF_CHAT))
    if refused:
        raise ConfigError(f"{refused[0]} is not an option of chat", "leave it out")
    criteria = {name: options.pop(name) for name in ("stopping_criteria",) if name in options}
    options, chosen = check_chat_options(llama, options, lambda: template.source or "", named)
    for_template = template_options(options)
    prepared, sources = template.prepare(messages, for_template, image_list(images), limits)
    text = template.render(prepared, for_template)
    check_length(llama, text)
    taken = {name: value for name, value in options.items() if name in (*SAMPLING, "max_tokens", "temperature")}
    taken |= check_options(llama, criteria)
    if chosen is None:
        return Asked(sources, text, taken)
    call = options.get("function_call")
    tool = call if isinstance(call, Mapping) else options["tool_choice"]["function"]
    return Asked(sources, text, taken | {"grammar": chosen}, tool["name"])


def image_list(images: Images) -> list[ImageSource | Video]:
    """Sources of images: one image needs no list."""
    if images is None:
        return []
    is_one = isinstance(images, (str, bytes, bytearray, memoryview, np.ndarray, PathLike)) or hasattr(images, "read")
    if is_one or not isinstance(images, Iterable):
        return [cast(ImageSource | Video, images)]
    return list(cast(Iterable[ImageSource | Video], images))
