"""StarChatHandler: image-token pruning for a `llama_cpp.Llama` that the user builds.

It is a subclass of llama_cpp's MTMDChatHandler, and takes its place. Chat template, tools, grammars, sampling options
and the form of the answer come from that class. Pixels are loaded and the prompt is evaluated here, and the response
gets a report.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from os import PathLike
from typing import Any, NoReturn, cast

import jinja2
import numpy as np
from llama_cpp import Llama

from .arguments import checked
from .asked import frame_of
from .chat import ChatFormat, find_template
from .chat_options import check_chat_options
from .errors import ConfigError, EngineClosedError, EngineError, PromptError, StarEdgeError
from .io.configs import resolve_prune
from .io.images import ImageLimits, check_pixels, load_message_image
from .io.video import VideoFrame
from .llamacpp.chat_hook import ChatHook, template_options
from .llamacpp.gguf import read_gguf_info
from .llamacpp.guarded import GuardedLlama, check_length, request_of
from .llamacpp.handover import has_given_format, is_open
from .llamacpp.mmproj_check import check_mmproj
from .llamacpp.native import open_standard_streams
from .messages import read_messages
from .options import CacheOptions, EncoderOptions, describe_options, names_of
from .pruning.config import Keep, PruneConfig, Redundancy
from .pruning.presets import DEFAULT_PRESET
from .reader import PromptReader
from .report import PruneReport
from .request import Request, cancellable, cancellation
from .vision.chunks import Prompt
from .vision.encoder import VisionEncoder
from .vision.profiles import METADATA_KEYS, find_profile

_REPORT_KEY = "star_edge"  # of a response
# Configs of `pruning` blocks, by handler. Other threads and tasks do not see them: it is a context variable.
_overrides: ContextVar[dict[StarChatHandler, PruneConfig | None] | None] = ContextVar("star_edge_prune", default=None)


@describe_options(EncoderOptions, CacheOptions)
class StarChatHandler(ChatHook):
    """Chat handler with image-token pruning: `Llama(model_path=..., chat_handler=StarChatHandler(...))`.

    A response has one key more than MTMDChatHandler's, "star_edge", with PruneReport.figures(). In a stream the last
    chunk has it. `usage` counts the prompt before pruning.

    On first use the Llama gets a new context, so its cache is empty. A handler serves one Llama. One request runs at a
    time: other threads wait, and a new request ends an unfinished stream, which then raises EngineClosedError.

    Args:
        clip_model_path: The mmproj file that belongs to the text model.
        verbose: As in MTMDChatHandler.
        use_gpu: As in MTMDChatHandler.
        prune: A PruneConfig, a preset's name, or None for stock behaviour. It may be changed at any time through the
            attribute of that name, or for some requests with `pruning`.
        encoder_flash_attn: As in EncoderOptions.
        image_min_tokens: As in EncoderOptions.
        image_max_tokens: As in EncoderOptions.
        encoder: As in EncoderOptions.
        mmproj_type: As in EncoderOptions.
        image_cache_bytes: As in CacheOptions.
        image_cache_dir: As in CacheOptions.
        reuse: As in CacheOptions.
        prompt_cache_bytes: As in CacheOptions.
        chat_template: As in StarVLM.
        image_limits: What an image may be. Sources are data:, http(s): and file: URLs and local paths. For requests
            from strangers, give an image_loader.
        image_loader: Turns the URL of an image_url part into pixels, (h, w, 3) uint8, in place of `load_image`.

    Attributes:
        last_report: The report of the last prompt that was read, with kept indices and scores.

    Raises:
        ModelFileError: clip_model_path cannot be read.
        ConfigError: `prune` or another argument cannot be used.
        UnsupportedModelError: `chat_template` cannot be used.
    """

    @checked(skip=("clip_model_path", "prune", *names_of(EncoderOptions, CacheOptions)))
    def __init__(
        self,
        clip_model_path: str | PathLike[str],
        verbose: bool = True,
        use_gpu: bool = True,
        *,
        prune: PruneConfig | str | None = DEFAULT_PRESET,
        encoder_flash_attn: bool | None = EncoderOptions.encoder_flash_attn,
        image_min_tokens: int = EncoderOptions.image_min_tokens,
        image_max_tokens: int = EncoderOptions.image_max_tokens,
        encoder: str = EncoderOptions.encoder,
        mmproj_type: str = EncoderOptions.mmproj_type,
        image_cache_bytes: int = CacheOptions.image_cache_bytes,
        image_cache_dir: str | PathLike[str] | None = CacheOptions.image_cache_dir,
        reuse: bool = CacheOptions.reuse,
        prompt_cache_bytes: int = CacheOptions.prompt_cache_bytes,
        chat_template: str | PathLike[str] | None = None,
        image_limits: ImageLimits = ImageLimits(),
        image_loader: Callable[[str], np.ndarray] | None = None,
    ) -> None:
        open_standard_streams()
        self._of_encoder = EncoderOptions(encoder_flash_attn, image_min_tokens, image_max_tokens, encoder, mmproj_type)
        self._cache = CacheOptions(image_cache_bytes, image_cache_dir, reuse, prompt_cache_bytes)
        info = read_gguf_info(clip_model_path)
        check_mmproj(info)
        super().__init__(info.path, verbose, use_gpu)
        self.prune = prune
        self.chat_template = None if chat_template is None else find_template(chat_template)
        self.image_limits = image_limits
        self.image_loader = image_loader or self._load_source
        self.last_report: PruneReport | None = None
        self._lock = threading.RLock()
        self._llama: Callable[[], Llama | None] = lambda: None
        self._reader: PromptReader | None = None
        self._chat: ChatFormat | None = None
        self.last_request: Request | None = None  # whose prompt was read
        self._request: Request | None = None  # under way in __call__
        self._images: list[Any] = []  # its images' sources, in the order of the prompt's markers
        self._bitmap_numbers = itertools.count()

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "a StarChatHandler can be neither copied nor pickled", "make another, with a Llama of its own"
        )

    @property
    def reader(self) -> PromptReader:
        """What reads prompts, once the handler serves a Llama."""
        assert self._reader is not None  # since `attach`
        return self._reader

    # ---- what to prune ----

    @property
    def prune(self) -> PruneConfig | None:
        """Config of requests outside `pruning` blocks. A preset's name may be assigned too."""
        return self._prune

    @prune.setter
    def prune(self, prune: PruneConfig | str | None) -> None:
        self._prune = resolve_prune(prune)

    @contextlib.contextmanager
    def pruning(self, prune: PruneConfig | str | None) -> Iterator[None]:
        """Another config for the requests that this thread or task makes inside the block. Streams keep it to the end.

        Args:
            prune: As in the constructor.

        Raises:
            ConfigError: `prune` cannot be used.
        """
        token = _overrides.set({**(_overrides.get() or {}), self: resolve_prune(prune)})
        try:
            yield
        finally:
            _overrides.reset(token)

    @contextlib.contextmanager
    def cancellable(self, is_cancelled: Callable[[], bool]) -> Iterator[None]:
        """Requests that this thread makes inside the block can be cancelled.

        They raise RequestCancelledError within a token after `is_cancelled()` becomes true: it is called before each
        decode. It holds for a stream to its end, wherever the stream is read.

        Args:
            is_cancelled: A function without arguments.
        """
        with cancellable(is_cancelled):
            yield

    # ---- a request ----

    def __call__(self, *, llama: Llama, messages: list[Any], stream: bool = False, **options: Any) -> Any:
        """Answers a chat request; `Llama.create_chat_completion` calls it. The Llama can be used again after any error.

        Args:
            llama: The Llama.
            messages: As in MTMDChatHandler.
            stream: Return an iterator over chunks.
            **options: As in MTMDChatHandler, and all of them hold. response_format may be of OpenAI's type json_schema,
                tool_choice may be "required" if there is one tool, and logprobs needs no top_logprobs. The dict
                chat_template_kwargs, and further arguments, are variables of the chat template.

        Returns:
            The response, or with `stream` an iterator over chunks.

        Raises:
            PromptError: The messages cannot be used.
            ImageError: An image cannot be read, or is over the limits.
            ConfigError: An option cannot be used.
            ContextLengthError: The prompt does not fit the context.
            UnsupportedModelError: The model lacks what the request needs.
            ModelMismatchError: The mmproj file does not belong to the text model.
            EngineError: llama.cpp failed.
            EngineClosedError: The Llama is closed.
            RequestCancelledError: See `cancellable`.
        """
        with self._lock:
            start = time.perf_counter()
            self.attach(llama)
            reader = self.reader
            config = (_overrides.get() or {}).get(self, self.prune)
            request = Request(reader, self._lock, config, start, cancellation())
            guards = cast(GuardedLlama, llama)  # the reader has made it one
            with request_of(llama):
                options, guards.grammar_instead = check_chat_options(
                    llama, {"stream": stream, **options}, self.template_source
                )
                self._request = request
                reader.context.clears_to_stem = True  # MTMDChatHandler clears the cache before the prompt is read
                try:
                    with request.running(), self._typed_errors(request):
                        messages, self._images = self._prepare(messages, options)
                        result: Any = super().__call__(llama=llama, messages=messages, **options)
                    generation, report = request.answered
                    generation.stop(report)
                    if options["stream"]:
                        return self._stream(result, request)
                    self._add_report(result, request)
                    usage = result["usage"]
                    usage["prompt_tokens"] = request.n_prompt
                    usage["total_tokens"] = request.n_prompt + usage["completion_tokens"]
                except BaseException:
                    reader.begin()
                    raise
                finally:
                    self._request, self._images, guards.grammar_instead = None, [], None
                request.finish()
                return result

    def _stream(self, chunks: Iterator[dict[str, Any]], request: Request) -> Iterator[dict[str, Any]]:
        try:
            while True:
                with self._typed_errors(request):
                    chunk = request.next_chunk(chunks)
                if chunk is None:
                    return
                if request.finish_reason is not None:
                    self._add_report(chunk, request)
                yield chunk
        finally:
            request.drop()

    def _add_report(self, response: dict[str, Any], request: Request) -> None:
        response[_REPORT_KEY] = request.answered[1].figures()

    @contextlib.contextmanager
    def _typed_errors(self, request: Request) -> Iterator[None]:
        """Turns built-in errors of MTMDChatHandler, Llama and chat templates into typed ones."""
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

    @property
    def _vision(self) -> VisionEncoder:
        """The encoder, once the handler serves a Llama."""
        assert self.reader.encoder is not None  # a handler has an mmproj file
        return self.reader.encoder

    def attach(self, llama_model: Llama) -> Any:
        """The context of the encoder. On first use of a Llama it is loaded, and the Llama gets a new context.

        Raises:
            EngineClosedError: The Llama is closed.
            ConfigError: The handler serves another Llama.
            StarEdgeError: As PromptReader.
        """
        if not is_open(llama_model):
            raise EngineClosedError("the Llama is closed", "make a new one")
        owner = self._llama()
        if owner is llama_model:
            return self._vision.context
        if owner is not None and is_open(owner):
            raise ConfigError("this StarChatHandler serves another Llama", "make a StarChatHandler for each Llama")
        if has_given_format(llama_model):
            raise ConfigError(
                f"chat_format={str(llama_model.chat_format)[:60]!r} changes nothing beside a chat handler",
                "give StarChatHandler a chat_template",
            )
        projector = find_profile(read_gguf_info(self.clip_model_path, METADATA_KEYS).values)[0]
        chat = ChatFormat(llama_model, self.chat_template, projector)
        self._reader = PromptReader(
            llama_model, self.clip_model_path, self._of_encoder, self._cache, on_gpu=self.use_gpu
        )
        self._llama, self._chat = (
            weakref.ref(llama_model),
            chat,
        )  # a strong reference would keep the model in memory until the next collection
        return self._vision.context

    def check_template(self) -> None:
        """Checks that there is a chat template, once the handler serves a Llama. Without one, every request fails.

        Raises:
            UnsupportedModelError: The model has no chat template, and none was given.
        """
        if self._chat is not None:
            self._chat.check_exists()

    def _prepare(self, messages: list[Any], options: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        """Messages for the template, and the sources of the images."""
        assert self._chat is not None  # since `attach`
        prepared, images = self._chat.prepare(messages, template_options(options), limits=self.image_limits)
        if self._chat.source is None:  # llama.cpp renders it: MTMDChatHandler's template prints the result as it is
            prepared = [{"role": "user", "content": self._chat.render(prepared)}]
        return prepared, images

    def encoder_lock(self) -> contextlib.AbstractContextManager[object]:
        return self._vision.lock

    def template_source(self) -> str:
        assert self._chat is not None  # since `attach`
        return self._chat.source or "{{ messages[0]['content'] }}"

    def get_image_urls(self, messages: list[Any]) -> list[Any]:  # type: ignore[override]  # a static method there
        """Sources of the images: of the request under way, otherwise of the messages as they are given."""
        if self._request is not None:
            return self._images
        return [picture.source for message in read_messages(messages) for picture in message.pictures]

    def check_text(self, text: str, n_images: int, marker: str) -> None:
        llama = self._llama()
        assert llama is not None  # a request of it is under way
        check_length(llama, text)
        n_markers = text.count(marker)
        if n_markers != n_images:
            raise PromptError(
                f"the prompt has {n_markers} image markers for {n_images} images",
                f"give images in messages of the user, leave out {marker}, and use a model whose chat template "
                "shows every message",
            )

    def load_image(self, image_url: str) -> np.ndarray:  # type: ignore[override]  # pixels in place of a file's bytes
        """The pixels of an image.

        Args:
            image_url: URL of an image_url part.

        Returns:
            (h, w, 3) uint8, C-contiguous.

        Raises:
            ImageError: The image cannot be read, or is over the limits.
        """
        frame: Any = image_url  # of a video, which `_prepare` has read
        if isinstance(frame, VideoFrame):
            pixels = frame.pixels
        else:
            pixels = check_pixels(self.image_loader(image_url), "what the image_loader returned")
        return pixels if self._request is None else self._request.fit(pixels)

    def count_tokens(self, image_url: str, image_max_tokens: Keep = 1.0, redundancy: Redundancy = "off") -> int:
        """Counts the image tokens of a picture, without encoding it, once the handler serves a Llama.

        Args:
            image_url: URL of an image_url part.
            image_max_tokens: As in PruneConfig: what the picture would be made smaller for.
            redundancy: As in PruneConfig: what image_max_tokens does not count. The picture is larger for it.

        Returns:
            Its tokens before any pruning, of all its crops, special tokens and redundant ones included.

        Raises:
            ConfigError: The handler serves no Llama yet, or image_max_tokens or redundancy cannot be used.
            ImageError: The image cannot be read or used, or is over the limits.
        """
        config = PruneConfig(image_max_tokens=image_max_tokens, redundancy=redundancy)
        with self._lock:
            if self._reader is None:
                raise ConfigError("this StarChatHandler serves no Llama yet", "call attach with the Llama first")
            pixels = check_pixels(self.image_loader(image_url), "what the image_loader returned")
            pixels = self._reader.fit(pixels, config).pixels
            return self._reader.count_tokens(pixels.shape[0], pixels.shape[1])

    def bitmap_name(self, image: np.ndarray) -> str:
        return self._vision.bitmap_name(image, next(self._bitmap_numbers))

    def _load_source(self, url: str) -> np.ndarray:
        return load_message_image(url, self.image_limits)  # MTMDChatHandler reads file: URLs

    def read_chunks(self, chunks: object) -> None:
        request = self._request
        assert request is not None
        prompt = Prompt(self._vision.chunks(chunks))
        prompt.join_frames([frame_of(source) for source in self._images])
        state = request.read(prompt)
        request.hand_over(state)
        self.last_request, self.last_report = request, request.report
        request.answered[0].start()
