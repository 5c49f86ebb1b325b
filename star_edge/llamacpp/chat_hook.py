"""llama_cpp's MTMDChatHandler with its parts to be filled in: what it calls, and when, is known here alone.

A request goes: context, sources of images, template, messages, text, pixels, bitmaps, tokens; then the cache is cleared
and the chunks are counted, which is where they are read, and none is left for MTMDChatHandler to evaluate.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import llama_cpp.mtmd_cpp as mtmd
import numpy as np
from llama_cpp import Llama
from llama_cpp.llama_chat_format import MTMDChatHandler

from .mtmd import clear_log, make_bitmap, name_joined, unprepared

# Arguments of MTMDChatHandler, and those of them that the chat template gets; it gets all others too
_OPTIONS = set(inspect.signature(MTMDChatHandler.__call__).parameters)
_TEMPLATE_OPTIONS = {"functions", "function_call", "tools", "tool_choice"}


def template_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those options of a request that the chat template gets."""
    return {name: value for name, value in options.items() if name in _TEMPLATE_OPTIONS or name not in _OPTIONS}


class _Libmtmd:
    """libmtmd as MTMDChatHandler calls it: when it asks how many chunks it has to evaluate, they are read, and none is
    left.
    """

    def __init__(self, read: Callable[[object], None]) -> None:
        self._read = read

    def __getattr__(self, name: str) -> Any:
        return getattr(mtmd, name)

    def mtmd_tokenize(self, context: object, chunks: object, text: object, bitmaps: Any, n_bitmaps: int) -> int:
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
        libmtmd: Any = _Libmtmd(self.read_chunks)  # in place of the module
        self._mtmd_cpp = libmtmd

    def attach(self, llama: Llama) -> Any:
        """The mtmd_context for requests of a Llama, called at the beginning of each."""
        raise NotImplementedError

    def template_source(self) -> str:
        """Jinja source of the chat template."""
        raise NotImplementedError

    def check_text(self, text: str, n_images: int, marker: str) -> None:
        """Raises where the text of a prompt cannot be used."""
        raise NotImplementedError

    def bitmap_name(self, image: np.ndarray) -> str:
        """What the chunks of an image are to be called."""
        raise NotImplementedError

    def read_chunks(self, chunks: object) -> None:
        """Reads libmtmd's chunks, which MTMDChatHandler frees, into the cache, which it has emptied."""
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
        """MTMDChatHandler puts a marker wherever the text has an image's URL; here a question may name it."""
        self.check_text(text, len(image_urls), media_marker)
        return text

    def _create_bitmap_from_bytes(self, image: np.ndarray) -> Any:  # type: ignore[override]  # what load_image gives
        return make_bitmap(image, self.bitmap_name(image))
