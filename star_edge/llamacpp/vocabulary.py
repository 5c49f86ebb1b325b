"""Texts of a model's tokens, and chat templates that llama.cpp knows by name."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import llama_cpp
from llama_cpp import Llama


def shown_text(llama: Llama, token: int) -> str:
    """What Llama.detokenize shows of a token: "" for a control token of most vocabularies, and if there is none.
    llama.cpp itself aborts for an unknown token.
    """
    known = 0 <= token < llama.n_vocab()
    return llama.detokenize([token]).decode("utf-8", "ignore") if known else ""


def template_names() -> list[str]:
    """Names of llama.cpp's own templates."""
    n = llama_cpp.llama_chat_builtin_templates(None, 0)
    names = (ctypes.c_char_p * n)()
    llama_cpp.llama_chat_builtin_templates(names, n)
    return [name.decode() for name in names]


def apply_template(name: str, messages: Sequence[tuple[str, str]]) -> str:
    """The text of (role, content) pairs in one of llama.cpp's own templates.

    Raises:
        ValueError: llama.cpp cannot apply it.
    """
    encoded = [(role.encode(), content.encode()) for role, content in messages]
    chat = (llama_cpp.llama_chat_message * len(encoded))(*(llama_cpp.llama_chat_message(*pair) for pair in encoded))
    size = 256 + 4 * sum(len(role) + len(content) + 64 for role, content in encoded)
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp.llama_chat_apply_template(name.encode(), chat, len(encoded), True, buffer, size)
        if n < 0:
            raise ValueError("llama.cpp cannot apply it")
        if n <= size:
            return buffer.raw[:n].decode("utf-8", "replace")
        size = n
