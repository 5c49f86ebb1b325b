"""Messages in a model's chat template, with a marker where each image belongs.

llama_cpp renders Jinja templates; llama.cpp renders those that it knows by name. Many templates print nothing of what
they do not expect, so each is tried out when it is loaded. Knows nothing of tokens or pixels.
"""

from __future__ import annotations

import json
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import jinja2
from llama_cpp import Llama
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from .errors import ConfigError, PromptError, UnsupportedModelError
from .frame_texts import frame_texts
from .io.image_limits import ImageLimits
from .io.video import Frames, Video, VideoFrame, read_video
from .llamacpp.mtmd import MEDIA_MARKER
from .llamacpp.vocabulary import apply_template, shown_text, template_names
from .messages import (
    Message,
    Picture,
    VideoPart,
    find_placeholder,
    parsed,
    place_images,
    read_messages,
    system_to_user,
    tools_to_text,
)
from .suggestions import use_one_of

# For files without a template: the name of llama.cpp's own, by projector type (the first two as in
# tools/mtmd/mtmd-cli.cpp)
_OF_FAMILY = {
    "mlp": "vicuna",
    "mlp_norm": "vicuna",
    "ldp": "deepseek",
    "ldpv2": "deepseek",
    "gemma3": "gemma",
    "idefics3": "smolvlm",
    "qwen2vl_merger": "chatml",
    "qwen2.5vl_merger": "chatml",
    "qwen3vl_merger": "chatml",
    "internvl": "chatml",
    "resampler": "chatml",
    "lfm2": "chatml",
    "pixtral": "mistral-v7",
}
_REMEDY = "give one as chat_template (--chat-template): a file, Jinja source, or a name such as vicuna"
_MOST_BYTES = 1 << 20  # of a template's file


def find_template(template: str | PathLike[str]) -> str:
    """Finds the template that a user means.

    Args:
        template: Jinja source, the path of a file with Jinja source, or a name that llama.cpp knows. A .json file is
            one of transformers' (chat_template.json, tokenizer_config.json).

    Returns:
        Jinja source, or the name.

    Raises:
        UnsupportedModelError: It is none of these.
    """
    if not isinstance(template, (str, PathLike)):
        raise UnsupportedModelError(
            f"chat_template is a {type(template).__name__}", "give a file, Jinja source, or a name such as vicuna"
        )
    text = os.fsdecode(template)
    if text in template_names() or "{{" in text or "{%" in text:
        return text
    path = os.path.expanduser(text)
    try:
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                source = file.read(_MOST_BYTES + 1)
            if path.endswith(".json"):
                source = json.loads(source)["chat_template"]
            if not isinstance(source, str) or len(source) > _MOST_BYTES:
                raise ValueError("too long, or not one text")
            return source
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UnsupportedModelError(
            f"the chat template {text[:200]!r} cannot be read ({error})", "give a file with Jinja source"
        ) from error
    raise UnsupportedModelError(
        f"the chat template {text[:60]!r} is neither a file, nor Jinja source, nor a known name",
        use_one_of(text, template_names(), ", or give a file"),
    )


class ChatFormat:
    """The chat template of a text model, or another one in its place.

    Args:
        llama: The text model.
        template: As in `find_template`. None: the model's own template. If it has none, that of its family.
        projector: Projector type, which tells the family.

    Attributes:
        exists: Whether there is a template. Without one, rendering raises.
        source: Jinja source. None for a template that llama.cpp knows by name.
        name: That name, or None.

    Raises:
        UnsupportedModelError: The template cannot be used.
    """

    def __init__(self, llama: Llama, template: str | PathLike[str] | None = None, projector: str | None = None) -> None:
        self._llama = weakref.ref(llama)  # it owns the handler, which owns this
        self._projector = projector
        own = llama.metadata.get("tokenizer.chat_template")
        found = find_template(template) if template is not None else own or _OF_FAMILY.get(projector or "")
        self.exists = bool(found)
        self.name = found if found in template_names() else None
        self.source = found if self.exists and self.name is None else None
        self.is_given, self.is_default = template is not None, template is None and not own  # neither: the model's own
        self._is_token: dict[str, bool] = {}
        if not self.exists:
            return
        if self.source is not None:
            try:
                # Both as in llama_cpp's MTMDChatHandler, so that StarVLM and StarChatHandler read the same prompt. The
                # tokenizer adds BOS itself.
                self._formatter = Jinja2ChatFormatter(
                    template=self.source, eos_token=shown_text(llama, llama.token_eos()), bos_token=""
                )
            except (jinja2.TemplateError, RecursionError) as error:
                reason = " ".join(str(error).split())
                raise UnsupportedModelError(
                    f"the chat template cannot be used ({reason})", "give another as chat_template"
                ) from error
        self._probe()

    @property
    def origin(self) -> str:
        """Whose template it is, as text for people."""
        if self.is_default:
            return f"{self.name}, which files of this family without one are used with"
        return f"llama.cpp's {self.name}" if self.name else "given" if self.is_given else "the model's own"

    # ---- what the template takes ----

    def _probe(self) -> None:
        """Finds out what the template prints.

        Sets `forms`: for each role, which forms of content it prints: "string", "part" (a list of one), "parts". Sets
        `takes_calls`: whether it prints tool calls.
        """
        self.forms: dict[str, set[str]] = {}
        user: dict[str, Any] = {"role": "user", "content": "question"}
        self.forms["user"] = self._forms(lambda content: [{"role": "user", "content": content}])
        if "string" not in self.forms["user"]:
            user = {"role": "user", "content": [{"type": "text", "text": "question"}]}
        self.forms["system"] = self._forms(lambda content: [{"role": "system", "content": content}, user])
        self.forms["assistant"] = self._forms(lambda content: [user, {"role": "assistant", "content": content}, user])
        # A template that prints any role prints "developer" too, but its model has never seen that role.
        self._knows_developer = self.source is not None and re.search(r"""["']developer["']""", self.source) is not None
        if self._knows_developer:
            self.forms["developer"] = self._forms(lambda content: [{"role": "developer", "content": content}, user])
        self._probe_tools(user)

    def _probe_tools(self, user: dict[str, Any]) -> None:
        """Tries results and calls apart: many templates print results, but of a call only its content."""
        self.takes_calls, self.forms["tool"] = False, set()
        for as_object in (False, True):
            for no_content in (None, ""):
                arguments = {"qzname": "qzvalue"}
                call = {"name": "qzcall", "arguments": arguments if as_object else json.dumps(arguments)}
                calls = [
                    {"id": "abcdefgh1", "type": "function", "function": call}
                ]  # Mistral's templates take only ids of 9 characters
                caller = {"role": "assistant", "content": no_content, "tool_calls": calls}
                result = {"role": "tool", "tool_call_id": "abcdefgh1", "name": "qzcall"}
                forms = self._forms(lambda content: [user, caller, {**result, "content": content}])  # noqa: B023
                self.forms["tool"] = self.forms["tool"] or forms
                text = self._try([user, caller, user]) or self._try([user, caller, {**result, "content": "qz"}]) or ""
                if "qzcall" in text and "qzvalue" in text and '\\"qzname' not in text and "None" not in text:
                    self.takes_calls, self._arguments_are_objects, self._no_content = True, as_object, no_content
                    self.forms["tool"] = forms
                    return

    def _forms(self, conversation: Any) -> set[str]:
        """Which forms of content are printed whole: a string, a list of one part, a list of several parts."""
        found = set()
        text = self._try(conversation("qzone qztwo"))
        if text is not None and "qzone qztwo" in text:
            found.add("string")
        text = self._try(conversation([{"type": "text", "text": "qzone qztwo"}]))
        if text is not None and re.search(r"qzone qztwo(?!['\"\\])", text):
            found.add("part")
        text = self._try(conversation([{"type": "text", "text": "qzone"}, {"type": "text", "text": "qztwo"}]))
        # A list that is printed as Python or JSON contains both texts too, but in quotes.
        if text is not None and re.search(r"qzone(?!['\"\\]).*qztwo(?!['\"\\])", text, re.DOTALL):
            found.add("parts")
        return found

    def _try(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self._render(messages, {})
        except Exception:  # a template may fail in any way on input that it does not expect
            return None

    def is_token(self, text: str) -> bool:
        """Whether the vocabulary has a token of its own for the text."""
        if text not in self._is_token:
            llama = self._llama()
            assert llama is not None  # a request of it is under way
            special, plain = (llama.tokenize(text.encode(), add_bos=False, special=s) for s in (True, False))
            self._is_token[text] = (
                len(special) < len(plain) and len(special) <= 2
            )  # 2: some tokenizers put a space before
        return self._is_token[text]

    # ---- messages ----

    def check_exists(self) -> None:
        """Raises UnsupportedModelError if there is no template."""
        if not self.exists:
            raise UnsupportedModelError("the model has no chat template", _REMEDY)

    def prepare(
        self,
        messages: Any,
        options: Mapping[str, Any] = {},
        images: Sequence[Any] = (),
        limits: ImageLimits = ImageLimits(),
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        """Brings messages into the form that the template takes.

        If the template has no system messages, their text joins the user's. If it has no role `developer`, such
        messages are system messages. If it has no tool calls or results, these become JSON text.

        Args:
            messages: As in Llama.create_chat_completion.
            options: What else the template gets (tools, ...).
            limits: What frames of videos may cost.
            images: As in `read_messages`.

        Returns:
            The messages, with a marker for each image; and the images' sources, in the order of the markers. A video
            becomes its frames, each a `VideoFrame`, with the texts that the family writes around them.

        Raises:
            UnsupportedModelError: There is no template.
            PromptError: A message cannot be read, or the template would not show a text or an image.
            ImageError: A video cannot be read, or is over the limits.
        """
        self.check_exists()
        read = read_messages(messages, images)
        for message in read:
            if message.role == "developer" and not self._knows_developer:
                message.role = "system"
            _modern(message)
            place_images(message, self.is_token)
        self._place_frames(read, limits)
        if not self.forms["system"] and any(message.role == "system" for message in read):
            read = system_to_user(read)
        read = tools_to_text(read, calls=not self.takes_calls, results=not self.forms["tool"])
        self._check(read, options)
        return [self._message(message, message.parts) for message in read], [p.source for m in read for p in m.pictures]

    def _place_frames(self, messages: Sequence[Message], limits: ImageLimits) -> None:
        """Puts the frames of each video in its place."""
        n_videos = 0
        for message in messages:
            parts: list[str | Picture] = []
            for part in message.parts:
                if not isinstance(part, Picture) or not (
                    isinstance(part, VideoPart) or isinstance(part.source, (Frames, Video))
                ):
                    parts.append(part)
                    continue
                frames = _frames(part, limits)
                before, after = self._frame_texts(frames)
                for i, (text, pixels) in enumerate(zip(before, frames.pictures)):
                    parts += [*([text] if text else []), Picture(VideoFrame(pixels, n_videos, frames.second(i)))]
                parts += [after] if after else []
                n_videos += 1
            message.parts = parts

    def _frame_texts(self, frames: Frames) -> tuple[list[str], str]:
        return frame_texts(self._projector, len(frames.pictures), frames.seconds, frames.duration)

    def _message(self, message: Message, parts: Sequence[str | Picture]) -> dict[str, Any]:
        texts = [MEDIA_MARKER if isinstance(part, Picture) else part for part in parts]
        forms = self.forms.get(message.role, self.forms["user"])
        content: Any = "".join(texts)
        if message.is_list and ("parts" in forms or not forms):
            content = [{"type": "text", "text": text} for text in texts]
        elif "string" not in forms and "part" in forms:
            content = [{"type": "text", "text": content}]
        result = {"role": message.role, "content": content, **message.rest}
        if message.role == "assistant" and not message.has_content:
            result["content"] = self._no_content if self.takes_calls and message.rest.get("tool_calls") else ""
        if message.rest.get("tool_calls") and self.takes_calls and self._arguments_are_objects:
            result["tool_calls"] = [parsed(call) for call in message.rest["tool_calls"]]
        return result

    def _check(self, messages: Sequence[Message], options: Mapping[str, Any]) -> None:
        """Checks that the template shows every text and every image: renders with a name in place of each text."""
        named: list[dict[str, Any]] = []
        owners: dict[str, int] = {}
        for i, message in enumerate(messages):
            parts: list[str | Picture] = []
            for part in message.parts:
                if isinstance(part, str) and part.strip():
                    part = f"qz{len(owners)}zq"
                    owners[part] = i
                parts.append(part)
            if message.pictures and i not in owners.values():
                parts.append(name := f"qz{len(owners)}zq")
                owners[name] = i
            named.append(self._message(message, parts))
        try:
            text = self._render(named, options)
        except Exception as error:
            reason = " ".join(f"{error}".split())[:300] or type(error).__name__
            raise PromptError(
                f"the chat template refuses the messages ({reason})",
                "send roles and content that it takes, or another chat_template",
            ) from error
        shown = re.findall("|".join([re.escape(MEDIA_MARKER), "qz[0-9]+zq"]), text)
        for name, i in owners.items():
            if name not in shown:
                raise PromptError(
                    f"the chat template does not show what message {i} ({messages[i].role}) says",
                    "put it elsewhere, or give another chat_template",
                )
        n_markers, n_images = shown.count(MEDIA_MARKER), sum(len(m.pictures) for m in messages)
        if n_markers != n_images:
            raise PromptError(
                f"the chat template shows {n_markers} image markers for {n_images} images",
                "give images in messages of the user, or another chat_template",
            )
        order = [owners[name] for name in dict.fromkeys(shown) if name in owners and messages[owners[name]].pictures]
        if order != sorted(order):
            raise PromptError(
                "the chat template puts images in another order than the messages",
                "give images in messages of the user",
            )

    # ---- text ----

    def format(self, prompt: str, n_images: int, videos: Mapping[int, Frames] = {}) -> str:
        """The prompt as one user message, with a marker for each image and for each frame of a video.

        Images stand where the prompt has markers or placeholders for all of them, otherwise first. videos: those of the
        n_images that are videos, by index.

        Raises:
            UnsupportedModelError: There is no template.
            PromptError: The numbers of markers and images differ, or the template refuses the message.
        """
        parts: list[Any] = [
            {"type": "video", "video": videos[i]} if i in videos else {"type": "image", "image": str(i)}
            for i in range(n_images)
        ]
        if MEDIA_MARKER in prompt and prompt.count(MEDIA_MARKER) != n_images:
            raise PromptError(
                f"the prompt has {prompt.count(MEDIA_MARKER)} image markers for {n_images} images",
                f"write {MEDIA_MARKER} once for each image, or none at all",
            )
        if prompt:
            parts.append({"type": "text", "text": prompt})
        messages, _ = self.prepare([{"role": "user", "content": parts if n_images else prompt}])
        return self.render(messages)

    def mark(self, prompt: str, n_images: int, videos: Mapping[int, Frames] = {}) -> str:
        """A whole prompt, in no template, with a marker for each image and for each frame of a video.

        Placeholders are taken for images if there is one for each and no marker.
        """
        name = None if MEDIA_MARKER in prompt else find_placeholder([prompt], n_images)
        if name is not None:
            prompt = prompt.replace(name, MEDIA_MARKER)
        pieces = prompt.split(MEDIA_MARKER)
        if not videos or len(pieces) != n_images + 1:  # whoever counts the markers says so
            return prompt
        text = pieces[0]
        for i, piece in enumerate(pieces[1:]):
            if i in videos:
                before, after = self._frame_texts(videos[i])
                text += "".join(one + MEDIA_MARKER for one in before) + after + piece
            else:
                text += MEDIA_MARKER + piece
        return text

    def one_turn(self) -> str:
        """Jinja source for one message of the user. Written anew for a template that llama.cpp knows by name."""
        if self.source is not None:
            return self.source
        before, after = self.render([{"role": "user", "content": "qzone"}]).split("qzone")
        parts = (
            "{% set content = messages[0]['content'] %}{% if content is string %}{{ content }}{% else %}"
            "{% for part in content %}{{ part['text'] }}{% endfor %}{% endif %}"
        )
        return f"{{{{ {json.dumps(before)} }}}}{parts}{{{{ {json.dumps(after)} }}}}"

    def render(self, messages: list[dict[str, Any]], options: Mapping[str, Any] = {}) -> str:
        """The text of messages that `prepare` has returned.

        Raises:
            PromptError: The template refuses them.
        """
        try:
            return self._render(messages, options)
        except Exception as error:
            raise PromptError(
                f"the chat template refuses the prompt ({error})", "give another as chat_template"
            ) from error

    def _render(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        if self.source is not None:
            given: Any = messages  # templates take more than llama_cpp's types allow
            return self._formatter(messages=given, **options).prompt
        assert self.name is not None  # the template is llama.cpp's
        return apply_template(self.name, [(m["role"], m["content"]) for m in messages])


def _frames(part: Picture, limits: ImageLimits) -> Frames:
    if isinstance(part.source, Frames):
        return part.source
    video = part.source if isinstance(part.source, Video) else None
    try:
        if video is None:
            assert isinstance(part, VideoPart)  # the caller has looked
            video = Video(part.source, part.count, part.rate)
    except ConfigError as error:
        raise PromptError(f"a video of the messages: {error.cause}", error.remedy) from error
    return read_video(video, limits)


def _modern(message: Message) -> None:
    """Brings OpenAI's older fields for function calls into the newer form."""
    if message.role == "function":
        message.role = "tool"
    call = message.rest.pop("function_call", None) if message.role == "assistant" else None
    if call and not message.rest.get("tool_calls"):
        message.rest["tool_calls"] = [{"id": "call_function", "type": "function", "function": call}]
    calls = message.rest.get("tool_calls")
    if calls is None:
        message.rest.pop("tool_calls", None)
    elif not isinstance(calls, list) or not all(isinstance(c, Mapping) for c in calls):
        raise PromptError(
            f"tool_calls of a message ({message.role}) are not a list of objects",
            "send them as they were in the model's answer",
        )
