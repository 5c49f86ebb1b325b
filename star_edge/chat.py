"""Messages in a model's chat template, with a marker where each image belongs.

Rendering is llama_cpp's, or for templates that llama.cpp knows by name its own. What a template takes is tried when it
is loaded: many print nothing of what they do not expect. Knows nothing of tokens or pixels.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import jinja2
import llama_cpp
from llama_cpp import Llama
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from .errors import PromptError, UnsupportedModelError
from .messages import (
    Message,
    Picture,
    find_placeholder,
    parsed,
    place_images,
    read_messages,
    system_to_user,
    tools_to_text,
)
from .vision.encoder import MEDIA_MARKER

# Templates that llama.cpp knows by name, for files without one, by projector type (tools/mtmd/mtmd-cli.cpp names the
# first two)
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


def template_names() -> list[str]:
    """Names of llama.cpp's own templates."""
    n = llama_cpp.llama_chat_builtin_templates(None, 0)
    names = (ctypes.c_char_p * n)()
    llama_cpp.llama_chat_builtin_templates(names, n)
    return [name.decode() for name in names]


def find_template(template: str | PathLike) -> str:
    """Jinja source, or one of llama.cpp's names, from what a user gives: either of them, or the path of a file with
    Jinja source.

    A .json file is one of transformers' (chat_template.json, tokenizer_config.json).

    Raises:
        UnsupportedModelError: it is none of them.
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
        f"the chat template {text[:60]!r} is no file, no Jinja source and no name",
        f"give a file, or one of {', '.join(template_names())}",
    )


class ChatFormat:
    """The chat template of a text model, or another.

    template: Jinja source, a file with it, or one of llama.cpp's names. None: the model's own, or where it has none,
    what its family has, which the projector type tells.

    exists: False when there is none; rendering then raises.
    source: Jinja source, or None for a template of llama.cpp's. name: of that one, or None.

    Raises:
        UnsupportedModelError: the template is none.
    """

    def __init__(self, llama: Llama, template: str | PathLike | None = None, projector: str | None = None) -> None:
        self._llama = weakref.ref(llama)  # which owns the handler that owns this
        own = llama.metadata.get("tokenizer.chat_template")
        found = find_template(template) if template is not None else own or _OF_FAMILY.get(projector or "")
        self.exists = bool(found)
        self.name = found if found in template_names() else None
        self.source = found if self.exists and self.name is None else None
        self.is_given, self.is_default = template is not None, template is None and not own  # else by its family
        self._is_token: dict[str, bool] = {}
        if not self.exists:
            return
        if self.source is not None:
            eos = llama.token_eos()  # llama.cpp ends the process where a file names none, or one past the vocabulary
            text = llama_cpp.llama_vocab_get_text(llama._model.vocab, eos) if 0 <= eos < llama.n_vocab() else None
            try:
                # the tokenizer adds BOS itself, as it does for llama_cpp's MTMDChatHandler
                self._formatter = Jinja2ChatFormatter(
                    template=self.source, eos_token=(text or b"").decode("utf-8", "replace"), bos_token=""
                )
            except (jinja2.TemplateError, RecursionError) as error:
                reason = " ".join(str(error).split())
                raise UnsupportedModelError(
                    f"the chat template cannot be used ({reason})", "give another as chat_template"
                ) from error
        self._probe()

    @property
    def origin(self) -> str:
        """For people: whose template it is."""
        if self.is_default:
            return f"{self.name}, which files of this family without one are used with"
        return f"llama.cpp's {self.name}" if self.name else "given" if self.is_given else "the model's own"

    # ---- what the template takes ----

    def _probe(self) -> None:
        """Finds out what the template prints: content as a string or as a list of parts for each role, system messages,
        calls of tools.

        forms: role -> those of "string", "part" (a list of one) and "parts" that it prints. takes_calls: whether calls
            of tools are printed.
        """
        self.forms: dict[str, set[str]] = {}
        user = {"role": "user", "content": "question"}
        self.forms["user"] = self._forms(lambda content: [{"role": "user", "content": content}])
        if "string" not in self.forms["user"]:
            user = {"role": "user", "content": [{"type": "text", "text": "question"}]}
        self.forms["system"] = self._forms(lambda content: [{"role": "system", "content": content}, user])
        self.forms["assistant"] = self._forms(lambda content: [user, {"role": "assistant", "content": content}, user])
        # A template that prints any role takes "developer" too, and its model has never seen it
        self._knows_developer = self.source is not None and re.search(r"""["']developer["']""", self.source) is not None
        if self._knows_developer:
            self.forms["developer"] = self._forms(lambda content: [{"role": "developer", "content": content}, user])
        self._probe_tools(user)

    def _probe_tools(self, user: dict[str, Any]) -> None:
        """Both on their own: many templates print results, and of calls only what the content says."""
        self.takes_calls, self.forms["tool"] = False, set()
        for as_object in (False, True):
            for no_content in (None, ""):
                arguments = {"qzname": "qzvalue"}
                call = {"name": "qzcall", "arguments": arguments if as_object else json.dumps(arguments)}
                calls = [
                    {"id": "abcdefgh1", "type": "function", "function": call}
                ]  # Mistral's take ids of 9 characters only
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
        """Which forms of a content are printed whole: a string, a list of one part, a list of several parts."""
        found = set()
        text = self._try(conversation("qzone qztwo"))
        if text is not None and "qzone qztwo" in text:
            found.add("string")
        text = self._try(conversation([{"type": "text", "text": "qzone qztwo"}]))
        if text is not None and re.search(r"qzone qztwo(?!['\"\\])", text):
            found.add("part")
        text = self._try(conversation([{"type": "text", "text": "qzone"}, {"type": "text", "text": "qztwo"}]))
        # A Python list, printed or put into JSON, has both too
        if text is not None and re.search(r"qzone(?!['\"\\]).*qztwo(?!['\"\\])", text, re.DOTALL):
            found.add("parts")
        return found

    def _try(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self._render(messages, {})
        except Exception:  # a template may fail in any way on what it does not expect
            return None

    def is_token(self, text: str) -> bool:
        """Whether the vocabulary has one token of its own for it."""
        if text not in self._is_token:
            special, plain = (self._llama().tokenize(text.encode(), add_bos=False, special=s) for s in (True, False))
            self._is_token[text] = (
                len(special) < len(plain) and len(special) <= 2
            )  # 2: some tokenizers put a space before
        return self._is_token[text]

    # ---- messages ----

    def check_exists(self) -> None:
        """Raises UnsupportedModelError where there is no template."""
        if not self.exists:
            raise UnsupportedModelError("the model has no chat template", _REMEDY)

    def prepare(self, messages: Any, options: Mapping[str, Any] = {}) -> tuple[list[dict[str, Any]], list[Any]]:
        """Messages in the form that the template takes, with markers for images, and the images in their order.

        options: what else the template gets (tools, ...). System messages go to the user's where the template has none,
        `developer` is system where it knows no other, calls of tools and their results are JSON text where it knows
        none.

        Raises:
            UnsupportedModelError: there is no template.
            PromptError: a message that cannot be read, or a text or an image that the template would not show.
        """
        self.check_exists()
        read = read_messages(messages)
        for message in read:
            if message.role == "developer" and not self._knows_developer:
                message.role = "system"
            _modern(message)
            place_images(message, self.is_token)
        if not self.forms["system"] and any(message.role == "system" for message in read):
            read = system_to_user(read)
        read = tools_to_text(read, calls=not self.takes_calls, results=not self.forms["tool"])
        self._check(read, options)
        return [self._message(message, message.parts) for message in read], [p.source for m in read for p in m.pictures]

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
        """Renders the same messages with a name in place of each text, and looks for every name and every marker."""
        named, owners = [], {}
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

    def format(self, prompt: str, n_images: int) -> str:
        """The prompt as one user message. Its images stand where it has markers or other placeholders for all of them,
        else first.

        Raises:
            UnsupportedModelError: there is no template. PromptError: markers and images differ in number, or the
                template refuses the message.
        """
        parts: list[Any] = [{"type": "image", "image": i} for i in map(str, range(n_images))]
        if MEDIA_MARKER in prompt and prompt.count(MEDIA_MARKER) != n_images:
            raise PromptError(
                f"the prompt has {prompt.count(MEDIA_MARKER)} image markers for {n_images} images",
                f"write {MEDIA_MARKER} once for each image, or none at all",
            )
        if prompt:
            parts.append({"type": "text", "text": prompt})
        messages, _ = self.prepare([{"role": "user", "content": parts if n_images else prompt}])
        return self.render(messages)

    def one_turn(self) -> str:
        """Jinja source: the template's own, or for one of llama.cpp's what it makes of one message of the user."""
        if self.source is not None:
            return self.source
        before, after = self.render([{"role": "user", "content": "qzone"}]).split("qzone")
        parts = (
            "{% set content = messages[0]['content'] %}{% if content is string %}{{ content }}{% else %}"
            "{% for part in content %}{{ part['text'] }}{% endfor %}{% endif %}"
        )
        return f"{{{{ {json.dumps(before)} }}}}{parts}{{{{ {json.dumps(after)} }}}}"

    def render(self, messages: list[dict[str, Any]], options: Mapping[str, Any] = {}) -> str:
        """The text of messages from `prepare`.

        Raises:
            PromptError: the template refuses them.
        """
        try:
            return self._render(messages, options)
        except Exception as error:
            raise PromptError(
                f"the chat template refuses the prompt ({error})", "give another as chat_template"
            ) from error

    def _render(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        if self.source is not None:
            return self._formatter(messages=messages, **options).prompt
        encoded = [(m["role"].encode(), m["content"].encode()) for m in messages]
        chat = (llama_cpp.llama_chat_message * len(encoded))(*(llama_cpp.llama_chat_message(*pair) for pair in encoded))
        size = 256 + 4 * sum(len(role) + len(content) + 64 for role, content in encoded)
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_chat_apply_template(self.name.encode(), chat, len(encoded), True, buffer, size)
            if n < 0:
                raise ValueError("llama.cpp cannot apply it")
            if n <= size:
                return buffer.raw[:n].decode("utf-8", "replace")
            size = n


def mark_raw(prompt: str, n_images: int) -> str:
    """A whole prompt without markers gets them where it has another placeholder for each image."""
    name = None if MEDIA_MARKER in prompt else find_placeholder([prompt], n_images)
    return prompt if name is None else prompt.replace(name, MEDIA_MARKER)


def _modern(message: Message) -> None:
    """OpenAI's older fields for calls of functions, in the newer form."""
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
            f"tool_calls of a message ({message.role}) are no list of objects",
            "send them as the model's answer had them",
        )
