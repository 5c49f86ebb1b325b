"""StarChatHandler: image-token pruning for a `llama_cpp.Llama` that the user builds.

It stands where llama_cpp's MTMDChatHandler stands, and is one: chat template, tools, grammars, sampling options and the
form of the answer are that class's. Replaced are where pixels come from and how the prompt is evaluated, and the report
is added.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import itertools
import threading
import time
import urllib.parse
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import jinja2
import llama_cpp
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
from llama_cpp import Llama
from llama_cpp.llama_chat_format import MTMDChatHandler

from .arguments import checked
from .chat import ChatFormat, find_template
from .chat_options import check_chat_options
from .errors import ConfigError, EngineClosedError, EngineError, ImageError, PromptError, StarEdgeError
from .generation import Generation
from .io.images import ImageLimits, check_pixels, load_image
from .llamacpp.gguf import read_gguf_info
from .llamacpp.guarded import check_length, request_of
from .llamacpp.mmproj_check import check_mmproj
from .llamacpp.native import lib, open_standard_streams
from .messages import read_messages
from .pruning.config import DEFAULT_PRESET, PruneConfig, resolve_prune
from .reader import IMAGE_TOKENS, PromptReader, check_image_tokens
from .report import PruneReport
from .vision.cache import DEFAULT_BYTES, check_bytes, check_directory
from .vision.encoder import Prompt, unprepared
from .vision.profiles import METADATA_KEYS, find_profile
from .vision.repair import check_encoder

_REPORT_KEY = "star_edge"  # of a response
# Configs of `pruning` blocks by handler. A context variable: other threads and tasks do not see them.
_overrides: ContextVar[dict[StarChatHandler, PruneConfig | None] | None] = ContextVar("star_edge_prune", default=None)
# Arguments of MTMDChatHandler, and those of them that the chat template gets; it gets all others too
_OPTIONS = set(inspect.signature(MTMDChatHandler.__call__).parameters)
_TEMPLATE_OPTIONS = {"functions", "function_call", "tools", "tool_choice"}
# What a Llama without a handler says by itself (guess_chat_format_from_gguf_metadata), before it may get one
_GUESSED = ("llama-2", "llama-3", "chatml", "mistral-instruct")
_is_cancelled: ContextVar[Callable[[], bool] | None] = ContextVar(
    "star_edge_is_cancelled", default=None
)  # of `cancellable` blocks


class _Libmtmd:
    """libmtmd as MTMDChatHandler calls it: when it asks how many chunks it has to evaluate, they are read, and none is
    left.
    """

    def __init__(self, read: Callable[[object], None]) -> None:
        self._read = read

    def __getattr__(self, name: str) -> Any:
        return getattr(mtmd, name)

    def mtmd_tokenize(self, *arguments: Any) -> int:
        lib.se_log_clear()
        status = mtmd.mtmd_tokenize(*arguments)
        if status:
            raise unprepared(status)
        return status

    def mtmd_input_chunks_size(self, chunks: object) -> int:
        self._read(chunks)
        return 0


@dataclass
class _Request:
    """A request under way. number: PromptReader.request while it is in the cache; n_prompt: its prompt as
    MTMDChatHandler counts it.
    """

    config: PruneConfig | None
    start: float
    report: PruneReport | None = None
    number: int = -1
    n_prompt: int = 0
    generation: Generation | None = None
    images: list[Any] = field(default_factory=list)  # sources, in the order of the prompt's markers


class StarChatHandler(MTMDChatHandler):
    """Chat handler with image-token pruning: `Llama(model_path=...,
    chat_handler=StarChatHandler(clip_model_path=...))`.

    clip_model_path: the mmproj file that belongs to the text model. verbose, use_gpu: as in MTMDChatHandler.
    prune: a PruneConfig, a preset's name, or None for stock behaviour. The attribute `prune` may be set at any time,
        and `with handler.pruning("fast"):` holds for the requests made inside.
    encoder_flash_attn: flash attention in the vision encoder; None: as in the Llama.
    image_min_tokens, image_max_tokens: for encoders with dynamic resolution.
    encoder, image_cache_bytes, image_cache_dir, reuse, chat_template: as in StarVLM.
    image_limits: what an image may be. Sources are data:, http(s): and file: URLs and local paths: for requests of
        strangers give an image_loader.
    image_loader: makes (h, w, 3) uint8 of the URL of an image_url part, in place of that.

    A response has a key "star_edge" more than MTMDChatHandler's, in a stream the last chunk: PruneReport.summary().
    `last_report` is the whole report of the last prompt that was read. `usage` counts the prompt before pruning.

    On first use the context of the Llama is made anew: its cache is empty then. A handler serves one Llama. One request
        runs at a
    time: other threads wait, and a new request ends an unfinished stream, which then raises EngineClosedError.

    Raises:
        ModelFileError: clip_model_path cannot be read. ConfigError: prune is no config, or encoder unknown.
        UnsupportedModelError: chat_template is none.
    """

    @checked(IMAGE_TOKENS, skip=("clip_model_path", "prune", "encoder", "image_cache_bytes", "image_cache_dir"))
    def __init__(
        self,
        clip_model_path: str | PathLike,
        verbose: bool = True,
        use_gpu: bool = True,
        *,
        prune: PruneConfig | str | None = DEFAULT_PRESET,
        encoder_flash_attn: bool | None = None,
        image_min_tokens: int = -1,
        image_max_tokens: int = -1,
        encoder: str = "repaired",
        image_cache_bytes: int = DEFAULT_BYTES,
        image_cache_dir: str | PathLike | None = None,
        reuse: bool = True,
        chat_template: str | PathLike | None = None,
        image_limits: ImageLimits = ImageLimits(),
        image_loader: Callable[[str], np.ndarray] | None = None,
    ) -> None:
        open_standard_streams()
        check_directory(image_cache_dir)
        check_bytes(image_cache_bytes)
        check_image_tokens(image_min_tokens, image_max_tokens)
        info = read_gguf_info(clip_model_path)
        check_mmproj(info)
        check_encoder(encoder)
        super().__init__(info.path, verbose, use_gpu)
        self.prune = prune
        self.encoder_flash_attn = encoder_flash_attn
        self.image_min_tokens, self.image_max_tokens = image_min_tokens, image_max_tokens
        self.encoder = encoder
        self.image_cache_bytes, self.image_cache_dir = image_cache_bytes, image_cache_dir
        self.reuse = reuse
        self.chat_template = None if chat_template is None else find_template(chat_template)
        self.image_limits = image_limits
        self.image_loader = image_loader or self._load_source
        self.last_report: PruneReport | None = None
        self._mtmd_cpp = _Libmtmd(self._read)
        self._lock = threading.RLock()
        self._llama: Callable[[], Llama | None] = lambda: None
        self._reader: PromptReader | None = None
        self._chat: ChatFormat | None = None
        self._request: _Request | None = None
        self._bitmap_numbers = itertools.count()

    def __reduce__(self) -> object:
        raise ConfigError(
            "a StarChatHandler can be neither copied nor pickled", "make another, with a Llama of its own"
        )

    # ---- what to prune ----

    @property
    def prune(self) -> PruneConfig | None:
        """Config of requests outside `pruning` blocks."""
        return self._prune

    @prune.setter
    def prune(self, prune: PruneConfig | str | None) -> None:
        self._prune = resolve_prune(prune)

    @contextlib.contextmanager
    def pruning(self, prune: PruneConfig | str | None) -> Iterator[None]:
        """Another config for the requests that this thread or task makes inside the block; streams keep it to their
        end.

        Raises:
            ConfigError: prune is no config.
        """
        token = _overrides.set({**(_overrides.get() or {}), self: resolve_prune(prune)})
        try:
            yield
        finally:
            _overrides.reset(token)

    @contextlib.contextmanager
    def cancellable(self, is_cancelled: Callable[[], bool]) -> Iterator[None]:
        """Requests that this thread makes inside the block raise RequestCancelledError soon after is_cancelled()
        becomes true.

        It is asked before each decode, so an answer ends within a token. A stream is held to it to its end, wherever it
        is read.
        """
        if not callable(is_cancelled):
            raise ConfigError(f"is_cancelled is a {type(is_cancelled).__name__}", "give a function")
        token = _is_cancelled.set(is_cancelled)
        try:
            yield
        finally:
            _is_cancelled.reset(token)

    # ---- a request ----

    def __call__(self, *, llama: Llama, messages: list[Any], stream: bool = False, **options: Any) -> Any:
        """Arguments as in MTMDChatHandler, and all of them hold: response_format may be of OpenAI's type json_schema,
        tool_choice may be "required" where there is one tool, logprobs needs no top_logprobs. chat_template_kwargs, a
        dict, and further keyword arguments are variables of the chat template.

        Raises:
            PromptError, ImageError, ConfigError, ContextLengthError: the request cannot be served.
            UnsupportedModelError, ModelMismatchError: nor can the model.
            EngineError: llama.cpp failed. EngineClosedError: the Llama is closed. RequestCancelledError: see
            `cancellable`. The Llama can be used again after any of them.
        """
        with self._lock:
            request = _Request((_overrides.get() or {}).get(self, self.prune), time.perf_counter())
            self._init_mtmd_context(llama)
            reader = self._reader
            with request_of(llama):
                options, llama.grammar_instead = check_chat_options(
                    llama, {"stream": stream, **options}, lambda: self._get_chat_template(llama)
                )
                self._request = request
                reader.context.is_cancelled = _is_cancelled.get()
                reader.context.clears_to_stem = True  # MTMDChatHandler clears the cache before it has the prompt read
                try:
                    with self._typed_errors(request):
                        messages, request.images = self._prepare(messages, options)
                        result = super().__call__(llama=llama, messages=messages, **options)
                    request.generation.stop(request.report)
                    if options["stream"]:
                        return self._stream(result, reader, request, _is_cancelled.get())
                    self._finish(result, request)
                    usage = result["usage"]
                    usage["prompt_tokens"] = request.n_prompt
                    usage["total_tokens"] = request.n_prompt + usage["completion_tokens"]
                except BaseException:
                    reader.begin()
                    raise
                finally:
                    self._request = reader.context.is_cancelled = llama.grammar_instead = None
                reader.begin()
                return result

    def _stream(
        self,
        chunks: Iterator[dict[str, Any]],
        reader: PromptReader,
        request: _Request,
        is_cancelled: Callable[[], bool] | None,
    ) -> Iterator[dict[str, Any]]:
        finished = False
        try:
            while True:
                with self._lock, self._typed_errors(request):
                    if reader.context.ctx is None or reader.request != request.number:
                        if finished:
                            return
                        cause = (
                            "the Llama is closed"
                            if reader.context.ctx is None
                            else "a newer request has ended this stream"
                        )
                        raise EngineClosedError(cause, "read a stream to its end first")
                    reader.context.is_cancelled = is_cancelled
                    try:
                        with request.generation.running(request.report):
                            chunk = next(chunks, None)
                    finally:
                        reader.context.is_cancelled = None
                    if chunk is None:
                        return
                    if chunk["choices"][0]["finish_reason"] is not None:
                        finished = True
                        self._finish(chunk, request)
                yield chunk
        finally:
            # A stream that was dropped may be cleared away while another thread answers: that request begins afresh
            # anyway.
            if self._lock.acquire(blocking=False):
                try:
                    if reader.context.ctx is not None and reader.request == request.number:
                        reader.begin()
                finally:
                    self._lock.release()

    def _finish(self, response: dict[str, Any], request: _Request) -> None:
        response[_REPORT_KEY] = request.report.summary()

    @contextlib.contextmanager
    def _typed_errors(self, request: _Request) -> Iterator[None]:
        """MTMDChatHandler and Llama raise built-in errors, for bad messages also whatever a template runs into."""
        try:
            yield
        except StarEdgeError:
            raise
        except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if request.report is None:
                raise PromptError(
                    f"the messages cannot be used ({reason})", "check them against the model's chat template"
                ) from error
            raise ConfigError(
                f"llama_cpp refuses the request ({reason})", "see Llama.create_chat_completion"
            ) from error
        except RuntimeError as error:
            raise EngineError(f"llama.cpp failed ({error})", "make the request smaller, or n_ctx larger") from error

    # ---- what MTMDChatHandler calls ----

    def _init_mtmd_context(self, llama_model: Llama) -> None:
        self.verbose = llama_model.verbose
        if llama_model._model.model is None:
            raise EngineClosedError("the Llama is closed", "make a new one")
        owner = self._llama()
        if owner is llama_model:
            return
        if owner is not None and owner._model.model is not None:
            raise ConfigError("this StarChatHandler serves another Llama", "make a StarChatHandler for each Llama")
        chat_format = str(llama_model.chat_format)
        if (
            llama_model.chat_format is not None
            and chat_format not in _GUESSED
            and not chat_format.startswith("chat_template.")
        ):
            raise ConfigError(
                f"chat_format={chat_format[:60]!r} changes nothing beside a chat handler",
                "give StarChatHandler a chat_template",
            )
        projector = find_profile(read_gguf_info(self.clip_model_path, METADATA_KEYS).values)[0]
        chat = ChatFormat(llama_model, self.chat_template, projector)
        use_flash = llama_model.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._reader = PromptReader(
            llama_model,
            self.clip_model_path,
            encoder_flash_attn=use_flash if self.encoder_flash_attn is None else self.encoder_flash_attn,
            encoder_on_gpu=self.use_gpu,
            image_min_tokens=self.image_min_tokens,
            image_max_tokens=self.image_max_tokens,
            encoder=self.encoder,
            image_cache_bytes=self.image_cache_bytes,
            image_cache_dir=self.image_cache_dir,
            reuse=self.reuse,
        )
        self._llama, self._chat = (
            weakref.ref(llama_model),
            chat,
        )  # a strong reference would keep the model in memory until the next gc
        self.mtmd_ctx = self._reader.encoder.context

    def check_template(self) -> None:
        """Raises UnsupportedModelError where a Llama that is in use has no chat template, and none was given: every
        request would fail.
        """
        if self._chat is not None:
            self._chat.check_exists()

    def _prepare(self, messages: list[Any], options: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        """Messages for the template, and the images' sources."""
        of_template = {
            name: value for name, value in options.items() if name in _TEMPLATE_OPTIONS or name not in _OPTIONS
        }
        prepared, images = self._chat.prepare(messages, of_template)
        if self._chat.source is None:  # rendered by llama.cpp: the template that MTMDChatHandler gets prints it
            prepared = [{"role": "user", "content": self._chat.render(prepared)}]
        return prepared, images

    def _get_chat_template(self, llama_model: Llama) -> str:
        return self._chat.source or "{{ messages[0]['content'] }}"

    def _get_template_messages(self, messages: list[Any], media_marker: str) -> list[Any]:
        return messages  # from `_prepare`

    def get_image_urls(self, messages: list[Any]) -> list[Any]:
        """Of the request under way, or where there is none of messages as they are given."""
        if self._request is not None:
            return self._request.images
        return [picture.source for message in read_messages(messages) for picture in message.pictures]

    def _postprocess_template_text(self, text: str, image_urls: list[str], media_marker: str) -> str:
        """MTMDChatHandler puts a marker wherever the text has an image's URL; here a question may name it."""
        check_length(self._llama(), text)
        n_markers = text.count(media_marker)
        if n_markers != len(image_urls):
            raise PromptError(
                f"the prompt has {n_markers} image markers for {len(image_urls)} images",
                f"give images in messages of the user, leave out {media_marker}, and use a model whose chat template shows every message",
            )
        return text

    def load_image(self, image_url: str) -> np.ndarray:
        """(h, w, 3) uint8, C-contiguous.

        Raises:
            ImageError: no image, or not one that the limits allow.
        """
        return check_pixels(self.image_loader(image_url), "what the image_loader returned")

    def _create_bitmap_from_bytes(self, image: np.ndarray) -> object:
        bitmap = mtmd.mtmd_bitmap_init(
            image.shape[1], image.shape[0], image.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        )
        self._reader.encoder.name_bitmap(bitmap, image, next(self._bitmap_numbers))
        return bitmap

    def _load_source(self, url: str) -> np.ndarray:
        if isinstance(url, str) and url[:5].lower() == "file:":  # MTMDChatHandler reads them through urllib
            parts = urllib.parse.urlsplit(url)
            if parts.netloc not in ("", "localhost"):
                raise ImageError(f"{url[:200]} is on another host", "write file:///path, or give the path itself")
            url = urllib.request.url2pathname(parts.path)
        return load_image(url, self.image_limits)

    def _read(self, chunks: object) -> None:
        """Reads libmtmd's chunks, which MTMDChatHandler frees, into the cache, which it has emptied."""
        request, reader = self._request, self._reader
        state, request.report = reader.read(Prompt(reader.encoder.chunks(chunks)), request.config, request.start)
        reader.hand_over(state)
        self.last_report = request.report
        request.number, request.n_prompt, request.generation = reader.request, state.next_position, reader.generation
        request.generation.start()
