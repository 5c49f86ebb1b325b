"""llama_cpp's MTMDChatHandler as a base class. Only this module knows what it calls, and when.

A request runs in this order: context, sources of images, template, messages, text, pixels, bitmaps, tokens. Then the
cache is cleared and MTMDChatHandler asks for the chunk count. We evaluate the prompt there and report zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import llama_cpp.mtmd_cpp as mtmd
import numpy as np
from llama_cpp import Llama
from llama_cpp.llama_chat_format import MTMDChatHandler

from .mtmd import clear_log, make_bitmap, name_joined, unprepared

# Arguments of MTMDChatHandler, and those of them that the chat template gets too
_OPTIONS = set(inspect.signature(MTMDChatHandler.__call__).parameters)
_TEMPLATE_OPTIONS = {"functions", "function_call", "tools", "tool_choice"}


def template_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a request that the chat template gets: some of MTMDChatHandler's, and all unknown ones."""
    return {name: value for name, value in options.items() if name in _TEMPLATE_OPTIONS or name not in _OPTIONS}


class _Libmtmd:
    """Proxy for `mtmd_cpp`.

    MTMDChatHandler asks for the chunk count just before it evaluates. We evaluate the prompt there and report zero.
    """

    def __init__(self, read: Callable[[object], None], lock: Callable[[], AbstractContextManager[object]]) -> None:
        self._read, self._lock = read, lock

    def __getattr__(self, name: str) -> Any:
        return getattr(mtmd, name)

    def mtmd_tokenize(self, context: object, chunks: object, text: object, bitmaps: Any, n_bitmaps: int) -> int:
        with self._lock():
            clear_log()
            name_joined(list(bitmaps))
            status: int = mtmd.mtmd_tokenize(context, chunks, text, bitmaps, n_bitmaps)
            if status:
                raise unprepared(status)
            return status

    def mtmd_input_chunks_size(self, chunks: object) -> int:
        self._read(chunks)
        return 0


class ChatHook(MTMDChatHandler):
    """MTMDChatHandler whose prompt is read by `read_chunks`. Subclasses fill in the methods that raise here."""

    def __init__(self, clip_model_path: str, verbose: bool, use_gpu: bool) -> None:
        super().__init__(clip_model_path, verbose, use_gpu)
        libmtmd: Any = _Libmtmd(self.read_chunks, self.encoder_lock)  # in place of the module
        self._mtmd_cpp = libmtmd

    def attach(self, llama: Llama) -> Any:
        """The mtmd_context for requests of a Llama, called at the beginning of each."""
        raise NotImplementedError

    def encoder_lock(self) -> AbstractContextManager[object]:
        """Held by whoever uses the encoder."""
        raise NotImplementedError

    def template_source(self) -> str:
        """Jinja source of the chat template."""
        raise NotImplementedError

    def check_text(self, text: str, n_images: int, marker: str) -> None:
        """Raises PromptError if the text of a prompt cannot be used."""
        raise NotImplementedError

    def bitmap_name(self, image: np.ndarray) -> str:
        """Name for the chunks of an image."""
        raise NotImplementedError

    def read_chunks(self, chunks: object) -> None:
        """Reads libmtmd's chunks into the cache. MTMDChatHandler has emptied the cache, and frees the chunks."""
        raise NotImplementedError

    # ---- what MTMDChatHandler calls ----

    def _init_mtmd_context(self, llama_model: Llama) -> None:
        self.verbose = llama_model.verbose
        self.mtmd_ctx = self.attach(llama_model)

    def _get_chat_template(self, llama_model: Llama) -> str:
        return self.template_source()

    def _get_template_messages(self, messages: list[Any], media_marker: str) -> list[Any]:
        return messages

    def _postprocess_template_text(self, text: str, image_urls: list[str], media_marker: str) -> str:
        """MTMDChatHandler replaces every URL of an image by a marker. Here a question may contain the URL as text."""
        self.check_text(text, len(image_urls), media_marker)
        return text

    def _create_bitmap_from_bytes(self, image: np.ndarray) -> Any:  # type: ignore[override]  # pixels in place of bytes
        return make_bitmap(image, self.bitmap_name(image))
