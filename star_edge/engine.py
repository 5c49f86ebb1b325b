"""StarVLM: a vision-language GGUF model with image-token pruning.

    image -> vision stage -> probe -> decoder stage -> resume -> text

Joins the stages and hands the prompt's state to `llama_cpp.Llama`, which samples. Knows no details of any stage.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from llama_cpp import Llama

from .chat import ChatFormat
from .config import DEFAULT_PRESET, PruneConfig, choose_layer, resolve_prune
from .decoder.context import DecoderContext, attach_tap
from .decoder.prefill import DecoderStage, Prefill, prefill
from .errors import (
    ConfigError,
    ContextLengthError,
    EngineClosedError,
    EngineError,
    LayerWindowError,
    ModelFileError,
    PromptError,
    UnsupportedModelError,
)
from .gguf_info import read_gguf_info
from .images import ImageLimits, ImageSource, load_image
from .inspection import Inspection, read_decoder, read_encoder
from .report import PruneReport
from .selection import keep_by_score
from .tap import Tap
from .vision.encoder import Prompt, TextChunk, VisionEncoder
from .vision.stage import PromptPlan, plan_prompt, run_vision_stage

KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2}
# What create_completion takes, less what would change the prompt or the form of the result, and what generate names itself
_SAMPLING = set(inspect.signature(Llama.create_completion).parameters) - {
    "self", "prompt", "suffix", "echo", "logprobs", "stream", "model", "max_tokens", "temperature",
}  # fmt: skip
_IMAGE_TOKEN = 0  # stands for an image token where llama_cpp wants an id: nothing is decoded from it


@dataclass
class Answer:
    """text: the answer. finish_reason: "stop" or "length". report: what was pruned and where the time went."""

    text: str
    finish_reason: str
    report: PruneReport


class AnswerStream(Iterator[str]):
    """Pieces of an answer as they are generated. `report` is there from the start; `text` and `finish_reason` grow with it.

    A stream that is dropped, closed or left by an exception needs no care: the engine starts the next request afresh. A stream
    of an earlier request raises EngineClosedError.
    """

    def __init__(self, engine: StarVLM, chunks: Iterator[Any], report: PruneReport) -> None:
        self._engine, self._chunks = engine, chunks
        self._request = engine._request
        self._start = time.perf_counter()
        self.report = report
        self.text = ""
        self.finish_reason: str | None = None

    def __next__(self) -> str:
        with self._engine._lock:
            if self._engine._closed:
                raise EngineClosedError("the engine is closed", "make a new StarVLM")
            if self._engine._request != self._request and self.finish_reason is None:
                raise EngineClosedError("a newer request has ended this stream", "read a stream to its end before the next request")
            try:
                for chunk in self._chunks:
                    choice = chunk["choices"][0]
                    self.finish_reason = choice["finish_reason"] or self.finish_reason
                    self.report.n_generated = self._engine.llama.n_tokens - self.report.n_kv_cells + 1
                    self.report.milliseconds["generate"] = 1e3 * (time.perf_counter() - self._start)
                    if choice["text"]:
                        self.text += choice["text"]
                        return choice["text"]
            except BaseException:
                self.close()
                raise
            self.close()
            raise StopIteration

    def close(self) -> None:
        """Ends the answer here, and leaves `llama_cpp.Llama` as if nothing had been asked."""
        with self._engine._lock:
            self._chunks.close()
            if self._engine._request == self._request and not self._engine._closed:
                self._engine._begin()


class StarVLM:
    """A text model and its vision projector, ready to answer questions about images.

    model, mmproj: GGUF files; without mmproj the model takes text only.
    n_ctx: context in tokens, 0 for the model's own. n_batch, n_ubatch: rows of one decode.
    n_gpu_layers: layers on the GPU, -1 for all. flash_attn: in the decoder and, unless encoder_flash_attn says otherwise, in
    the encoder. type_k, type_v: type of the KV cache ("f16", "q8_0", ...); a quantized V needs flash attention.
    n_threads: default, the physical cores as far as they can be told. chat_template: Jinja source, default the file's own.
    image_limits: what an image may be. image_min_tokens, image_max_tokens: for encoders with dynamic resolution.
    Further keyword arguments go to llama_cpp.Llama.

    Raises:
        ModelFileError, ModelMismatchError, UnsupportedModelError: the files cannot be used.
        ConfigError: an unknown KV type.
        EngineError: llama.cpp could not create a context.
    """

    def __init__(
        self,
        model: str | PathLike,
        mmproj: str | PathLike | None = None,
        *,
        n_ctx: int = 4096,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        n_gpu_layers: int = 0,
        flash_attn: bool = True,
        encoder_flash_attn: bool | None = None,
        type_k: str = "f16",
        type_v: str = "f16",
        n_threads: int | None = None,
        chat_template: str | None = None,
        image_limits: ImageLimits = ImageLimits(),
        image_min_tokens: int = -1,
        image_max_tokens: int = -1,
        verbose: bool = False,
        **llama_options: Any,
    ) -> None:
        unknown = set(llama_options) - set(inspect.signature(Llama.__init__).parameters)
        if unknown or llama_options.get("vocab_only"):
            raise ConfigError(
                f"{', '.join(sorted(unknown)) or 'vocab_only'} is no option of StarVLM", "see help(StarVLM) and llama_cpp.Llama"
            )
        for name, value, least in (
            ("n_ctx", n_ctx, 0),
            ("n_batch", n_batch, 2),
            ("n_ubatch", n_ubatch, 1),
            ("n_gpu_layers", n_gpu_layers, -1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least or (name == "n_ctx" and 0 < value < 2):
                raise ConfigError(
                    f"{name}={value!r} is too small or no whole number", f"use {max(least, 2) if name == 'n_ctx' else least} or more"
                )
        info = read_gguf_info(model)
        if info.architecture == "clip":
            raise ModelFileError(f"{info.path} is an mmproj file, not a text model", "give it as mmproj, and the text model first")
        for name, kind in (("type_k", type_k), ("type_v", type_v)):
            if kind not in KV_TYPES:
                raise ConfigError(f"{name}={kind!r} is no KV cache type", f"use one of {', '.join(KV_TYPES)}")
        if type_v not in ("f32", "f16", "bf16") and not flash_attn:
            raise ConfigError(f"type_v={type_v!r} needs flash attention", "use flash_attn=True or an unquantized type_v")
        n_threads = n_threads if n_threads and n_threads > 0 else _physical_cores()
        self._lock = threading.RLock()  # one request at a time; other threads wait
        self._request = 0
        self._closed = False
        self.image_limits = image_limits
        self.encoder: VisionEncoder | None = None
        self._tap = Tap()
        try:
            self.llama = Llama(
                info.path, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_ubatch, n_gpu_layers=n_gpu_layers, flash_attn=flash_attn,
                type_k=KV_TYPES[type_k], type_v=KV_TYPES[type_v], n_threads=n_threads, n_threads_batch=n_threads, verbose=verbose, **llama_options,
            )  # fmt: skip
        except ValueError as error:
            self._tap.close()
            if "context" in str(error):
                raise EngineError(
                    f"llama.cpp could not create a context of {n_ctx} tokens", "lower n_ctx, or quantize the KV cache (type_k, type_v)"
                ) from error
            raise ModelFileError(
                f"{info.path} cannot be loaded ({error})", "check that this llama.cpp supports the model, or lower n_ctx"
            ) from error
        try:
            self._chat = ChatFormat(self.llama, chat_template)
            attach_tap(self.llama, self._tap)
            self.decoder = DecoderContext(self.llama, self._tap)
            if mmproj is not None:
                use_flash = flash_attn if encoder_flash_attn is None else encoder_flash_attn
                self.encoder = VisionEncoder(
                    mmproj,
                    self.llama,
                    flash_attn=use_flash,
                    use_gpu=n_gpu_layers != 0,
                    image_min_tokens=image_min_tokens,
                    image_max_tokens=image_max_tokens,
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Frees the models. Any use after it raises EngineClosedError."""
        with self._lock:
            self._closed = True
            self._request += 1
            if self.encoder is not None:
                self.encoder.close()
            self.llama.close()
            self._tap.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            with contextlib.suppress(Exception):  # at interpreter exit parts of llama_cpp may be gone
                self.close()

    def __enter__(self) -> StarVLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def has_chat_template(self) -> bool:
        return self._chat.exists

    # ---- answers ----

    def generate(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        prune: PruneConfig | str | None = DEFAULT_PRESET,
        max_tokens: int | None = 256,
        *,
        stream: bool = False,
        chat: bool = True,
        temperature: float = 0.0,
        **sampling: Any,
    ) -> Answer | AnswerStream:
        """Answers a prompt about images.

        images: paths, bytes, PIL images, NumPy arrays, data: or http(s): URLs. They stand before the text, or where the prompt
            has markers (star_edge.MEDIA_MARKER), one for each.
        prune: a PruneConfig, a preset's name, or None for stock behaviour on the same code path.
        chat: put the prompt into the model's chat template; False: it is the whole prompt as it is.
        stream: return an AnswerStream at once when the prompt has been read.
        max_tokens: at most so many tokens of answer; None: until the context is full.
        sampling: further arguments of llama_cpp.Llama.create_completion: top_p, seed, stop, grammar, logit_bias, ...

        One request runs at a time: other threads wait, and a new request ends an unfinished stream.

        Raises:
            ConfigError, PromptError, ImageError, ContextLengthError, UnsupportedModelError: before anything is computed.
            EngineError: llama.cpp failed. The engine can be used again after any of them.
        """
        unknown = set(sampling) - _SAMPLING
        if unknown:
            raise ConfigError(f"{', '.join(sorted(unknown))} is no sampling option", f"use one of {', '.join(sorted(_SAMPLING))}")
        if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1):
            raise ConfigError(f"max_tokens={max_tokens!r} asks for no answer", "use 1 or more, or None for as many as fit the context")
        if not isinstance(temperature, (int, float)) or not 0 <= temperature < float("inf"):
            raise ConfigError(f"temperature={temperature!r} is no temperature", "use 0 (greedy) or more")
        with self._lock:
            state, report = self.read_prompt(prompt, images, prune, chat=chat)
            return self._answer(state, report, stream, max_tokens=max_tokens, temperature=temperature, **sampling)

    def read_prompt(
        self, prompt: str, images: Sequence[ImageSource] = (), prune: PruneConfig | str | None = DEFAULT_PRESET, *, chat: bool = True
    ) -> tuple[Prefill, PruneReport]:
        """Everything before the first answer token: `Prefill.logits` are its logits, (n_vocab,) float32.

        Arguments and errors as for `generate`.
        """
        with self._lock:
            start = time.perf_counter()
            config = resolve_prune(prune)
            self._begin()
            pictures = [load_image(source, self.image_limits) for source in self._image_list(images)]
            tokenized = self.tokenize(prompt, pictures, chat=chat)
            try:
                seconds = {"preprocess": time.perf_counter() - start}
                plan, layer, notes = self._plan(tokenized, config)
                mass_share = config.mass_share if config is not None else 0.0
                if mass_share and 0 < self.decoder.n_swa < plan.n_cells:
                    mass_share = 0.0  # a sliding-window cache has other cells than the bias is made for
                    notes.append("no representatives: the prompt is longer than the model's sliding window")
                segments, image_reports, next_position = run_vision_stage(
                    plan, self.encoder, self.decoder.mrope, config is not None, seconds, mass_share
                )
            finally:
                tokenized.close()
            stage = None
            if layer is not None:
                choose = lambda scores, n, mass: keep_by_score(scores, n, mass_share, mass)
                stage = DecoderStage(layer, plan.n_decoder, choose, last_row_only=config.text_rows == "last")
            try:
                state = prefill(self.decoder, segments, next_position, stage)
            except LayerWindowError as error:
                self.decoder.layer_problems[layer] = error.cause
                notes.append(f"no decoder stage: {error.cause}")
                layer = None
                self._tap.set_cell_bias(None)
                self.decoder.clear()
                state = prefill(self.decoder, segments, next_position)
            for image, scores, selection in zip(image_reports, state.scores, state.selections):
                image.decoder_scores = scores
                image.decoder_kept = image.vision_kept[selection.kept]
                image.decoder_mass = selection.mass
            if not state.in_place:
                notes.append("kept rows did not return to their KV cells: the kept rows were decoded again")
            seconds.update(state.seconds)
            seconds["first_token"] = time.perf_counter() - start
            milliseconds = {name: 1e3 * value for name, value in seconds.items()}
            report = PruneReport(
                config,
                image_reports,
                self.decoder.n_layers,
                layer,
                plan.n_text,
                state.n_cells,
                milliseconds,
                in_place=state.in_place,
                notes=notes,
            )
            return state, report

    def tokenize(self, prompt: str, pictures: Sequence[np.ndarray], *, chat: bool = True) -> Prompt:
        """Chunks of the prompt; pictures are (h, w, 3) uint8. The result must be closed."""
        if self._closed:
            raise EngineClosedError("the engine is closed", "make a new StarVLM")
        if not isinstance(prompt, str):
            raise PromptError(f"the prompt is a {type(prompt).__name__}", "give a str")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise PromptError("the prompt holds characters that are no text (surrogates)", "decode its bytes as UTF-8 first") from error
        if pictures and self.encoder is None:
            raise UnsupportedModelError("this model was loaded without a vision encoder", "give its mmproj file")
        text = self._chat.format(prompt, len(pictures)) if chat else prompt
        if self.encoder is None:
            return Prompt([TextChunk(np.array(self.llama.tokenize(text.encode(), add_bos=True, special=True), np.int32))])
        return self.encoder.tokenize(text, pictures)

    def inspect(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        decoder_layers: Sequence[int] = (),
        encoder_layers: Sequence[int] = (),
        mean_heads: bool = False,
        chat: bool = True,
    ) -> Inspection:
        """Attention of any layers, unpruned. encoder_layers are counted over the layers that run.

        mean_heads: average over heads inside the C core, which saves memory.

        Raises:
            ConfigError: a layer that the model does not have; otherwise as for `generate`.
        """
        with self._lock:
            self._begin()
            pictures = [load_image(source, self.image_limits) for source in self._image_list(images)]
            tokenized = self.tokenize(prompt, pictures, chat=chat)
            try:
                plan, _, _ = self._plan(tokenized, None)
                if encoder_layers and not plan.images:
                    raise ConfigError("encoder layers were asked for without an image", "give an image")
                grids = [chunk.grid for chunk in plan.images]
                encoder_maps = (
                    [read_encoder(self.encoder, chunk, encoder_layers, mean_heads) for chunk in plan.images] if encoder_layers else []
                )
                segments, _, _ = run_vision_stage(plan, self.encoder, self.decoder.mrope, False, {})
            finally:
                tokenized.close()
            decoder_maps = read_decoder(self.decoder, segments, decoder_layers, mean_heads)
            tokens, owner = [], []
            for segment in segments:
                n = len(segment.rows)
                owner += [-1 if segment.image is None else segment.image] * n
                if segment.image is None:
                    tokens += [self.llama.detokenize([int(t)], special=True).decode("utf-8", "replace") for t in segment.rows.tokens]
                else:
                    tokens += [f"<image {segment.image}>"] * n
            return Inspection(tokens, np.array(owner), grids, decoder_maps, encoder_maps)

    # ---- inside ----

    def _begin(self) -> None:
        """Ends whatever was going on and empties the cache."""
        if self._closed:
            raise EngineClosedError("the engine is closed", "make a new StarVLM")
        self._request += 1
        self._tap.set_position_shift(0, 0)
        self._tap.set_cell_bias(None)
        self.decoder.clear()
        self.llama.reset()

    def _plan(self, prompt: Prompt, config: PruneConfig | None) -> tuple[PromptPlan, int | None, list[str]]:
        """Counts, layer K (None: no decoder stage) and notes; every limit is checked here, before anything is computed."""
        notes: list[str] = []
        has_images = any(not isinstance(c, TextChunk) for c in prompt.chunks)
        prune = config if has_images else None
        can_score = self.encoder is not None and self.encoder.profile is not None
        if prune is not None and prune.prunes_in_vision and not can_score:
            notes.append(f"no vision stage: the token layout of projector type {self.encoder.projector!r} is not known")
        layer = None
        if prune is not None and prune.prunes_in_decoder:
            layer = choose_layer(prune.decoder_layer, self.decoder.n_layers)
            problem = self.decoder.stage_problem or self.decoder.layer_problems.get(layer)
            if problem:
                layer, reason = None, problem
            elif not isinstance(prompt.chunks[-1], TextChunk) or not len(prompt.chunks[-1].tokens):
                layer, reason = None, "there is no text after the last image to score with"
            if layer is None:
                notes.append(f"no decoder stage: {reason}")
        plan = plan_prompt(prompt.chunks, prune, can_score, layer is not None)
        if layer is not None and 0 < self.decoder.n_swa < plan.n_cells:
            # llama_kv_cache::find_slot hands out parked cells that have left the sliding window: rows would not come back to theirs
            layer = None
            notes.append(f"no decoder stage: the prompt is longer than the model's sliding window of {self.decoder.n_swa}")
            plan = plan_prompt(prompt.chunks, prune, can_score, False)
        if plan.n_cells + 1 > self.decoder.n_ctx:
            raise ContextLengthError(
                f"the prompt takes {plan.n_cells} tokens ({plan.n_text} text, {sum(plan.n_vision)} image) of a context of {self.decoder.n_ctx}",
                "raise n_ctx, lower vision_keep, or give fewer or smaller images" if plan.images else "raise n_ctx, or shorten the prompt",
            )
        for chunk, n in zip(plan.images, plan.n_vision):
            if not chunk.causal and n > self.decoder.n_ubatch:
                raise ContextLengthError(
                    f"an image of {n} tokens must be processed at once (its rows attend to each other), n_ubatch is {self.decoder.n_ubatch}",
                    f"use n_ubatch={n} or more",
                )
        if not plan.n_cells:
            raise ConfigError("the prompt is empty", "give some text")
        return plan, layer, notes

    def _answer(self, state: Prefill, report: PruneReport, stream: bool, **options: Any) -> Answer | AnswerStream:
        """Lets `llama_cpp.Llama` go on from the prompt's state."""
        llama = self.llama
        n = state.n_cells
        tokens = np.where(state.tokens < 0, _IMAGE_TOKEN, state.tokens)
        llama.input_ids[:n] = tokens  # for logits processors, and so that create_completion finds the prompt read already
        llama.n_tokens = n
        llama._requires_eval = False  # the logits of the last row are there
        self._tap.set_position_shift(n, state.next_position - n)
        chunks = llama.create_completion(prompt=tokens.tolist(), stream=True, **options)
        answer = AnswerStream(self, chunks, report)
        if stream:
            return answer
        for _ in answer:
            pass
        return Answer(answer.text, answer.finish_reason or "length", report)

    @staticmethod
    def _image_list(images: Sequence[ImageSource] | ImageSource) -> list[ImageSource]:
        if images is None:
            return []
        if isinstance(images, (str, bytes, bytearray, memoryview, np.ndarray, PathLike)) or not isinstance(images, Iterable):
            return [images]  # one image needs no list
        return list(images)


def _physical_cores() -> int:
    """llama.cpp is fastest with one thread for each physical core; small machines rarely have two threads on one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return usable if usable <= 4 else max(4, usable // 2)
