"""StarVLM: a vision-language GGUF model with image-token pruning.

Loads the files. What it answers, and how requests take turns, is in answering.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from os import PathLike
from typing import Any, NoReturn

import numpy as np
from llama_cpp import Llama

from .answering import Answering
from .arguments import checked, parameters
from .asked import ask_prompt, frames_apart, image_list, load_picture, whole_prompt
from .chat import ChatFormat
from .decoder.prefill import Prefill
from .errors import ConfigError, EngineError
from .inspection import Inspection, read_decoder, read_encoder
from .io.images import ImageLimits, ImageSource, check_pixels
from .io.video import Frames, Video
from .llamacpp.gguf import read_gguf_info
from .llamacpp.gguf_check import read_lora, read_text_model
from .llamacpp.llama_options import check_llama_options, load_llama
from .llamacpp.mmproj_check import check_mmproj
from .llamacpp.native import open_standard_streams
from .options import CacheOptions, EncoderOptions, LoadOptions, describe_options, names_of
from .pruning.config import Keep, PruneConfig, Redundancy
from .pruning.presets import DEFAULT_PRESET
from .reader import PromptReader
from .report import PruneReport
from .request import Ending
from .stopwatch import Stopwatch
from .suggestions import did_you_mean
from .vision.chunks import Prompt
from .vision.places import Place, places_or_none
from .vision.profiles import METADATA_KEYS, find_profile
from .vision.stage import encode_images, run_vision_stage


@describe_options(LoadOptions, EncoderOptions, CacheOptions)
class StarVLM(Answering):
    """A text model and its vision projector, ready to answer questions about images.

    One request runs at a time; threads may share an engine. It is a context manager, and `close` frees its memory.

    Args:
        model: GGUF file of the text model.
        mmproj: GGUF file of the vision projector. Without it the model takes text only.
        n_ctx: As in LoadOptions.
        n_batch: As in LoadOptions.
        n_ubatch: As in LoadOptions.
        n_gpu_layers: As in LoadOptions.
        flash_attn: As in LoadOptions.
        type_k: As in LoadOptions.
        type_v: As in LoadOptions.
        n_threads: As in LoadOptions.
        verbose: As in LoadOptions.
        encoder_flash_attn: As in EncoderOptions.
        image_min_tokens: As in EncoderOptions.
        image_max_tokens: As in EncoderOptions.
        encoder: As in EncoderOptions.
        mmproj_type: As in EncoderOptions.
        image_cache_bytes: As in CacheOptions.
        image_cache_dir: As in CacheOptions.
        reuse: As in CacheOptions.
        prompt_cache_bytes: As in CacheOptions.
        chat_template: A file with Jinja source, the source, or a name that llama.cpp knows (vicuna, chatml, ...). None:
            the model file's own template, or that of its family.
        image_limits: What an image may be.
        **llama_options: Further arguments of llama_cpp.Llama.

    Raises:
        ModelFileError: A file is missing, damaged, or of another kind.
        ModelMismatchError: The mmproj file does not belong to the text model.
        UnsupportedModelError: A file cannot be used by this llama.cpp.
        ConfigError: An argument cannot be used, such as a KV type or a cache directory.
        EngineError: llama.cpp could not create a context.
    """

    @checked(skip=("model", "mmproj", *names_of(LoadOptions, EncoderOptions, CacheOptions)))
    def __init__(
        self,
        model: str | PathLike[str],
        mmproj: str | PathLike[str] | None = None,
        *,
        n_ctx: int = LoadOptions.n_ctx,
        n_batch: int = LoadOptions.n_batch,
        n_ubatch: int = LoadOptions.n_ubatch,
        n_gpu_layers: int = LoadOptions.n_gpu_layers,
        flash_attn: bool = LoadOptions.flash_attn,
        type_k: str = LoadOptions.type_k,
        type_v: str = LoadOptions.type_v,
        n_threads: int | None = LoadOptions.n_threads,
        verbose: bool = LoadOptions.verbose,
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
        **llama_options: Any,
    ) -> None:
        load = LoadOptions(n_ctx, n_batch, n_ubatch, n_gpu_layers, flash_attn, type_k, type_v, n_threads, verbose)
        of_encoder = EncoderOptions(encoder_flash_attn, image_min_tokens, image_max_tokens, encoder, mmproj_type)
        cache = CacheOptions(image_cache_bytes, image_cache_dir, reuse, prompt_cache_bytes)
        of_llama = parameters(Llama.__init__)
        unknown = sorted(set(llama_options) - set(of_llama))
        if unknown or llama_options.get("vocab_only"):
            remedy = "see help(StarVLM) and llama_cpp.Llama"
            raise ConfigError(
                f"{', '.join(unknown) or 'vocab_only'} is not an option of StarVLM",
                did_you_mean(unknown[0], [*parameters(StarVLM.__init__), *of_llama], remedy) if unknown else remedy,
            )
        for name in ("chat_format", "chat_handler"):  # for Llama.create_chat_completion, which nothing here calls
            if llama_options.get(name) is not None:
                raise ConfigError(
                    f"{name} changes nothing in a StarVLM",
                    "give chat_template: a file, Jinja source, or a name such as vicuna",
                )
        llama_options = check_llama_options(llama_options, taken=("model_path", "n_threads_batch"))
        open_standard_streams()
        info = read_text_model(model, llama_options.get("kv_overrides"))
        if llama_options.get("lora_path") is not None:
            llama_options["lora_path"] = read_lora(llama_options["lora_path"], info).path
        if mmproj is not None:
            check_mmproj(read_gguf_info(mmproj))  # first: to load the text model takes longer
        super().__init__()
        self.image_limits = image_limits
        self.llama = load_llama(info.path, **load.for_llama(), **llama_options)
        try:
            projector = None if mmproj is None else find_profile(read_gguf_info(mmproj, METADATA_KEYS).values)[0]
            self._chat = ChatFormat(self.llama, chat_template, projector)
            self._reader = PromptReader(self.llama, mmproj, of_encoder, cache, on_gpu=load.uses_gpu)
        except MemoryError as error:
            self.close()
            raise EngineError(
                "there is not enough memory for the vision encoder and its context", "lower n_ctx"
            ) from error
        except BaseException:
            self.close()
            raise
        self.decoder, self.encoder = self._reader.decoder, self._reader.encoder

    def close(self) -> None:
        """Frees the models, and ends asynchronous requests. Any later use raises EngineClosedError.

        Raises:
            EngineClosedError: A callback of a request called it.
        """
        for job in list(self._jobs):
            job.stopped.set()
        with self._lock:
            self.llama.close()
            self._closed = True

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            with contextlib.suppress(Exception):  # at interpreter exit parts of llama_cpp may be gone
                self.close()

    def __reduce__(self) -> NoReturn:
        raise ConfigError("a StarVLM can be neither copied nor pickled", "make another; threads may share one")

    def __enter__(self) -> StarVLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a chat template. Without one, `generate` needs chat=False."""
        return self._chat.exists

    @property
    def chat_template_origin(self) -> str | None:
        """Where the chat template comes from, as text for people. None without one."""
        return self._chat.origin if self._chat.exists else None

    @property
    def stages(self) -> dict[str, str]:
        """What each stage can do with this model: "yes", or what it does instead and why. By name: redundancy,
        encoder_stage, vision_stage, decoder_stage.

        Raises:
            EngineClosedError: The engine is closed.
        """
        with self._lock:
            self._check_open()
            return self._reader.stages

    # ---- prompts and pictures without an answer ----

    @checked(skip=("prompt", "images", "prune"))
    def read_prompt(
        self,
        prompt: str,
        images: Sequence[ImageSource | Video] | ImageSource | Video = (),
        prune: PruneConfig | str | None = DEFAULT_PRESET,
        *,
        chat: bool = True,
    ) -> tuple[Prefill, PruneReport]:
        """Reads a prompt, without generating an answer.

        Args:
            prompt: As for `generate`.
            images: As for `generate`.
            prune: As for `generate`.
            chat: As for `generate`.

        Returns:
            The state after the prompt, whose `logits`, (n_vocab,) float32, are those of the first answer token; and the
            report.

        Raises:
            StarEdgeError: As for `generate`.
        """
        with self._lock:
            self._check_open()
            self._check_takes(len(image_list(images)))
            asked = ask_prompt(self.llama, self._chat, prompt, images, chat, self.image_limits)
            request, state = self._read(asked, prune, Ending(), None)
        assert request.report is not None  # of a prompt that was read
        return state, request.report

    @checked(skip=("image",))
    def count_tokens(
        self, image: ImageSource | Video, image_max_tokens: Keep = 1.0, redundancy: Redundancy = "off"
    ) -> int:
        """Counts the image tokens of a picture, or of a video's frames, without encoding it. A stream that is under way
        goes on.

        Args:
            image: As for `generate`.
            image_max_tokens: As in PruneConfig: what the picture would be made smaller for.
            redundancy: As in PruneConfig: what image_max_tokens does not count. The picture is larger for it.

        Returns:
            Its tokens before any pruning, of all its crops, special tokens and redundant ones included.

        Raises:
            UnsupportedModelError: The model was loaded without a vision encoder.
            ConfigError: image_max_tokens or redundancy cannot be used.
            ImageError: The image cannot be read or used, or is over the limits.
            EngineClosedError: The engine is closed.
        """
        config = PruneConfig(image_max_tokens=image_max_tokens, redundancy=redundancy)
        with self._lock:
            self._check_open()
            n_tokens = 0
            for frame in frames_apart([load_picture(image, self.image_limits)])[0]:
                pixels = self._reader.fit(frame, config).pixels
                n_tokens += self._reader.count_tokens(pixels.shape[0], pixels.shape[1])
            return n_tokens

    @checked(skip=("prompt",))
    def tokenize(self, prompt: str, pictures: Sequence[np.ndarray | Frames], *, chat: bool = True) -> Prompt:
        """Splits a prompt into chunks.

        Args:
            prompt: As for `generate`.
            pictures: Pixels, (h, w, 3) uint8 each, or frames of a video.
            chat: As for `generate`.

        Returns:
            The chunks. They must be closed.

        Raises:
            StarEdgeError: As for `generate`.
        """
        self._check_open()
        pixels, videos, frames = frames_apart(pictures)
        self._check_takes(len(pictures))
        text = whole_prompt(self.llama, self._chat, prompt, len(pictures), chat, videos)
        return self._chunks(text, [check_pixels(one) for one in pixels], frames)

    @checked(skip=("prompt", "images"))
    def inspect(
        self,
        prompt: str,
        images: Sequence[ImageSource | Video] | ImageSource | Video = (),
        *,
        decoder_layers: Sequence[int] = (),
        encoder_layers: Sequence[int] = (),
        mean_heads: bool = False,
        chat: bool = True,
    ) -> Inspection:
        """Reads the attention of any layers, without pruning.

        Args:
            prompt: As for `generate`.
            images: As for `generate`.
            decoder_layers: Layers of the decoder, from 0.
            encoder_layers: Layers of the encoder, counted over those that run.
            mean_heads: Average over heads inside the C core, which saves memory.
            chat: As for `generate`.

        Returns:
            The attention of each layer, with the tokens that it is over.

        Raises:
            ConfigError: The model does not have such a layer.
            StarEdgeError: As for `generate`.
        """
        with self._turn():
            self.decoder.clear()
            pictures = [load_picture(source, self.image_limits) for source in image_list(images)]
            tokenized = self.tokenize(prompt, pictures, chat=chat)
            try:
                plan, _ = self._reader.plan(tokenized, None)
                if encoder_layers and not plan.images:
                    raise ConfigError("encoder layers were asked for without an image", "give an image")
                grids = [chunk.grid for chunk in plan.images]
                encoder_maps = (
                    [read_encoder(self.encoder, chunk, encoder_layers, mean_heads) for chunk in plan.images]
                    if encoder_layers and self.encoder is not None
                    else []
                )
                encoded = encode_images(plan.images, self.encoder, None, Stopwatch())
            finally:
                tokenized.close()
            segments, _, _ = run_vision_stage(plan, encoded, self.decoder.mrope, Stopwatch())
            decoder_maps = read_decoder(self.decoder, segments, decoder_layers, mean_heads)
            tokens, owner = [], []
            for segment in segments:
                n = len(segment.rows)
                owner += [-1 if segment.image is None else segment.image] * n
                if segment.image is None:
                    assert segment.rows.tokens is not None
                    tokens += [
                        self.llama.detokenize([int(t)], special=True).decode("utf-8", "replace")
                        for t in segment.rows.tokens
                    ]
                else:
                    tokens += [f"<image {segment.image}>"] * n
            places: list[Place | None] = []
            of_picture = [chunk.picture for chunk in plan.images]
            for i, pixels in enumerate(frames_apart(pictures)[0]):
                assert self._reader.places is not None  # of the encoder that has made the images
                places += places_or_none(self._reader.places, pixels.shape[0], pixels.shape[1], of_picture.count(i))
            return Inspection(
                tokens,
                np.array(owner),
                grids,
                decoder_maps,
                encoder_maps,
                of_picture,
                places,
                [image.special for image in encoded],
            )
