"""Reads a prompt: from its chunks to the logits of the first answer token.

    image -> vision stage -> probe -> decoder stage -> resume -> text

Joins the stages, and hands the prompt's state to a `llama_cpp.Llama`, no matter who made it. Knows the details of no
stage, no chat templates, and not where images come from.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from os import PathLike
from typing import cast

import numpy as np
from llama_cpp import Llama

from .decoder.cells import possible_in_cells
from .decoder.hybrid import at_attention
from .decoder.prefill import Prefill, prefill
from .decoder.saved import SavedStems
from .decoder_stage import adapt, decoder_stage, ranking_layers
from .errors import ConfigError, ContextLengthError, EngineError, LayerWindowError, UnsupportedModelError
from .llamacpp.context import DecoderContext, check_takes_images, tapped_context
from .llamacpp.guarded import guard
from .llamacpp.handover import free_with, hand_over, uses_flash_attention
from .llamacpp.mtmd import MEDIA_MARKER
from .options import CacheOptions, EncoderOptions
from .progress import Meter
from .pruning.choose import vision_scorer
from .pruning.config import Keep, PruneConfig, one_token_notes, tolerance_notes
from .report import ImageReport, PruneReport
from .stopwatch import Stopwatch
from .vision.chunks import Encoded, ImageChunk, Prompt, TextChunk
from .vision.encode import ImageEncoding
from .vision.encoder import VisionEncoder
from .vision.places import Places
from .vision.resolution import Fitted, Resolution
from .vision.stage import Ahead, PromptPlan, Room, StagedImage, plan_prompt, run_vision_stage

_ANSWER_TOKENS = 256  # that a vision stage which adapts to the picture leaves room for
_PROBE_SIDE = 224  # pixels of a picture that any encoder takes
_IMAGE_TOKEN = 0  # stands for an image token where llama_cpp wants an id: nothing is decoded from it


class PromptReader:
    """Reads pruned prompts into a `Llama`. Gives it a context with a tap, and loads the vision encoder.

    A Llama whose context has no tap gets a new context, and its cache is lost. The Llama owns all that is made here:
    `Llama.close` frees it. The reader does not keep the Llama alive.

    Args:
        llama: The Llama.
        mmproj: File of the vision encoder. None: the prompts are text alone.
        encoder: How the encoder works.
        cache: What is kept from request to request.
        on_gpu: Whether the encoder may use the GPU.

    Raises:
        ModelFileError: The mmproj file cannot be read.
        ModelMismatchError: The mmproj file does not belong to the text model.
        UnsupportedModelError: The mmproj file cannot be used, or the text model cannot take images.
        ConfigError: The cache's directory cannot be used.
        EngineError: llama.cpp could not create the context. After any error the Llama works as before.
    """

    def __init__(
        self,
        llama: Llama,
        mmproj: str | PathLike[str] | None,
        encoder: EncoderOptions = EncoderOptions(),
        cache: CacheOptions = CacheOptions(),
        *,
        on_gpu: bool = False,
    ) -> None:
        self.reuse = cache.reuse
        self.llama = cast(Llama, weakref.proxy(llama))  # acts as the Llama
        self.encoder: VisionEncoder | None = None
        self.places: Places | None = None
        if mmproj is not None:
            check_takes_images(llama)
            flash_attn = encoder.encoder_flash_attn
            self.encoder = VisionEncoder(
                mmproj,
                self.llama,
                flash_attn=uses_flash_attention(llama) if flash_attn is None else flash_attn,
                use_gpu=on_gpu,
                image_min_tokens=encoder.image_min_tokens,
                image_max_tokens=encoder.image_max_tokens,
                repaired=encoder.encoder == "repaired",
                mmproj_type=encoder.mmproj_type,
                cache_bytes=cache.image_cache_bytes,
                cache_dir=cache.image_cache_dir,
            )
            free_with(llama, self.encoder.close)  # before the model that it points to
            self._resolution = Resolution(self.encoder)
            self.places = Places(self.encoder)
            self.encoding = ImageEncoding(self.encoder)
        try:
            self.context = tapped_context(llama)
        except EngineError:
            if self.encoder is not None:
                self.encoder.close()
            raise
        guard(llama)
        self.decoder = DecoderContext(self.llama, self.context.tap)
        self.saved = self.context.saved = SavedStems(cache.prompt_cache_bytes)
        me = weakref.proxy(self)  # the context must not keep its reader, which holds the encoder
        self.context.save_stem = lambda: me.saved.save(me.decoder, answering=True)

    @property
    def request(self) -> int:
        """A number that changes whenever the prompt in the cache goes. A stream whose number is another one is over."""
        return self.context.request

    @property
    def stages(self) -> dict[str, str]:
        """What each stage can do with this model: "yes", or what it does instead and why. By name: redundancy,
        encoder_stage, vision_stage, decoder_stage.
        """
        encoder, in_decoder = self.encoder, self.decoder.stage_problem
        found = {"decoder_stage": f"no: {in_decoder}" if in_decoder else "yes"}
        if encoder is None:
            return dict.fromkeys(("redundancy", "encoder_stage", "vision_stage"), "no: there is no encoder") | found
        kind = f"projector type {encoder.projector!r}"
        whole = f"no: the encoder of {kind} encodes whole pictures only"
        problem = self._encoder_problem()
        by_embeddings = f"by embeddings alone: {kind} {encoder.profile.why_embeddings}"
        return {
            "redundancy": whole if self.encoding.composer is None else "yes",
            "encoder_stage": f"no: {problem}" if problem else "yes",
            "vision_stage": "yes" if encoder.profile.reads_attention else by_embeddings,
        } | found

    def _encoder_problem(self) -> str:
        """Why the encoder can have no stage, or "". Known from the graph of a gray picture, which is not computed."""
        encoder = self.encoder
        assert encoder is not None  # the caller has looked
        with self._with_encoder():
            prompt = encoder.tokenize(MEDIA_MARKER, [np.full((_PROBE_SIDE, _PROBE_SIDE, 3), 128, np.uint8)])
            try:
                return self.encoding.problem(next(c for c in prompt.chunks if isinstance(c, ImageChunk)))
            finally:
                prompt.close()

    def begin(self) -> None:
        """Ends an unfinished request. Empties the cache, except for what the next prompt may use."""
        self.context.clears_to_stem = False
        self.context.end_prompt()
        self.llama.reset()

    @contextmanager
    def afresh(self) -> Iterator[None]:
        """A prompt that is read inside the block uses nothing of earlier prompts, and leaves nothing for later ones."""
        encoder, reuse = self.encoder, self.reuse
        with self._with_encoder():  # nothing is encoded ahead meanwhile, which would cost time
            cache = None if encoder is None else encoder.cache
            self.reuse = False
            if encoder is not None:
                encoder.cache = None
            try:
                yield
            finally:
                self.reuse = reuse
                if encoder is not None:
                    encoder.cache = cache

    def _with_encoder(self) -> AbstractContextManager[object]:
        return nullcontext() if self.encoder is None else self.encoder.lock

    def encode_ahead(self, pictures: Sequence[np.ndarray], config: PruneConfig | None) -> None:
        """Puts what the encoder makes of pictures into its cache, for a prompt that will be read with that config.

        Another thread may generate an answer meanwhile, or read a prompt. Without a cache nothing is done.

        Args:
            pictures: The prompt's pictures in order, (h, w, 3) uint8 each.
            config: What that prompt prunes, or None.

        Raises:
            StarEdgeError: As `read` would for these pictures alone.
        """
        with self._with_encoder():
            encoder = self.encoder
            if encoder is None or encoder.cache is None or not pictures:
                return
            fitted = [self.fit(pixels, config).pixels for pixels in pictures]
            prompt = encoder.tokenize("\n".join([MEDIA_MARKER] * len(fitted)) + "\n", fitted)
            encoder.cache.ahead = True
            try:
                plan, _ = self.plan(prompt, config)
                self.encoding.encode(plan, Stopwatch(), [])
            finally:
                encoder.cache.ahead = False
                prompt.close()

    def count_tokens(self, height: int, width: int) -> int:
        """Counts the image tokens of a picture of that size, in pixels. Nothing is encoded.

        Raises:
            UnsupportedModelError: There is no vision encoder.
            ImageError: The encoder cannot take that shape.
        """
        if self.encoder is None:
            raise UnsupportedModelError("this model was loaded without a vision encoder", "give its mmproj file")
        with self._with_encoder():
            return self._resolution.count(height, width)

    def fit(self, pixels: np.ndarray, config: PruneConfig | None) -> Fitted:
        """A picture, (h, w, 3) uint8, as a request gets it: smaller, if the config says so."""
        if self.encoder is None or config is None or not config.limits_images:
            return Fitted(pixels)
        with self._with_encoder():
            return self._resolution.fit(pixels, config.image_max_tokens, self.encoding.entering(config))

    def read(
        self, prompt: Prompt, config: PruneConfig | None, start: float, meter: Meter | None = None
    ) -> tuple[Prefill, PruneReport]:
        """Computes everything before the first answer token, and closes the prompt. `begin` must come first.

        Args:
            prompt: The prompt.
            config: What to prune, or None.
            start: When the request began, in seconds of time.perf_counter.
            meter: Is told how far the reading is.

        Returns:
            The state after the prompt, and the report.

        Raises:
            ConfigError: The config does not fit the prompt or the model. Nothing has been computed.
            ContextLengthError: The prompt does not fit the context. Nothing has been computed.
            EngineError: llama.cpp failed. `begin` makes the Llama usable again.
            RequestCancelledError: The context's is_cancelled says so, before an image or a decode.
        """
        with self._watched(prompt, meter):
            return self._read(prompt, config, start, meter)

    @contextmanager
    def _watched(self, prompt: Prompt, meter: Meter | None) -> Iterator[None]:
        """Inside the block the encoder and the decoder tell the meter, and the encoder can be interrupted as well."""
        pictures = [chunk.picture for chunk in prompt.chunks if isinstance(chunk, ImageChunk)]
        reads = threading.get_ident()

        def before_image() -> None:
            if threading.get_ident() != reads:  # an image of another request
                return
            self.context.check_cancelled()
            if meter is not None:
                meter.encode(self.encoding.image, pictures)

        self.decoder.meter = meter
        if self.encoder is not None:
            self.encoder.before_run = before_image
        try:
            yield
        finally:
            self.decoder.meter = None
            if self.encoder is not None:
                self.encoder.before_run = None

    def _ahead(self, plan: PromptPlan) -> AbstractContextManager[Ahead | None]:
        """What works on an image while the next one is encoded. Where the processor encodes, that has its threads."""
        if self.encoder is None or not self.encoder.on_gpu or len(plan.images) < 2:
            return nullcontext()
        return Ahead(plan, max(1, self.decoder.n_threads - 1))  # one waits for the GPU

    def _read(
        self, prompt: Prompt, config: PruneConfig | None, start: float, meter: Meter | None
    ) -> tuple[Prefill, PruneReport]:
        with ExitStack() as meanwhile:
            try:
                watch = Stopwatch()
                watch.seconds["preprocess"] = time.perf_counter() - start
                undone: list[str] = []
                with watch.step("preprocess"), self._with_encoder():  # which may be at work for the next request
                    plan, notes = self.plan(prompt, config)
                    ahead = meanwhile.enter_context(self._ahead(plan))
                    tell = None if ahead is None else ahead.begin
                    encoded = self.encoding.encode(plan, watch, undone, tell) if plan.images else []
            finally:
                prompt.close()
            if any(
                e.special is not chunk.special or e.kept is not None or len(e.tokens) != n
                for e, chunk, n in zip(encoded, plan.images, plan.n_encoder)
            ):
                plan, notes = self.plan(prompt, config, encoded)
            notes += undone
            if meter is not None and plan.config is not None and plan.config.prunes_in_vision:
                meter.choose()
            segments, images, next_position = run_vision_stage(
                plan, encoded, self.decoder.mrope, watch, self.decoder.n_threads, ahead
            )
        if config is not None and config.adapts_to_picture:
            notes += adapt(plan, images)
        self._check_images((image.chunk, len(image.selection.kept)) for image in images)
        windows = plan.windows
        stage = decoder_stage(plan, images, self.decoder.n_threads) if windows else None
        # A sliding-window cache hands out parked cells (llama_kv_cache::find_slot). Llama.set_cache stores every
        # sequence, the parked ones too.
        keep = self.reuse and not self.decoder.n_swa and self.decoder.stage_problem is None and self.llama.cache is None
        if not keep:
            self.saved.save(self.decoder)
            self.decoder.clear()
        try:
            state = prefill(self.decoder, segments, next_position, stage, keep=keep)
        except LayerWindowError as error:
            self.decoder.layer_problems[tuple(layer for layer, _ in windows)] = error.cause
            notes.append(f"no decoder stage: {error.cause}")
            windows = []
            self.decoder.tap.set_cell_bias(None)
            self.decoder.clear()
            state = prefill(self.decoder, segments, next_position, keep=keep)
        if not state.in_place:
            notes.append("kept rows did not return to their KV cells: the kept rows were decoded again")
        seconds = {**watch.seconds, **state.seconds, "first_token": time.perf_counter() - start}
        milliseconds = {name: 1e3 * value for name, value in seconds.items()}
        report = PruneReport(
            config,
            _image_reports(images, state),
            self.decoder.n_layers,
            [
                (layer, sum(len(s.kept) for s in selections))
                for (layer, _), selections in zip(windows, state.selections)
            ],
            plan.n_text,
            state.n_cells,
            milliseconds,
            in_place=state.in_place,
            reused_tokens=state.n_reused,
            repairs=self.encoder.repairs if images and self.encoder is not None else [],
            notes=notes,
        )
        return state, report

    def plan(
        self, prompt: Prompt, config: PruneConfig | None, encoded: Sequence[Encoded] | None = None
    ) -> tuple[PromptPlan, list[str]]:
        """Counts tokens, and checks every limit before anything is computed.

        Args:
            prompt: The prompt.
            config: What to prune, or None.
            encoded: The images, once they are encoded. Only then are special tokens known if no profile names them,
                so counts may change.

        Returns:
            The plan, and notes for the report.

        Raises:
            ConfigError: The prompt is empty, or the config does not fit.
            ContextLengthError: The prompt does not fit the context.
        """
        notes: list[str] = []
        has_images = any(not isinstance(c, TextChunk) for c in prompt.chunks)
        prune = config if has_images else None
        if has_images:
            assert self.encoder is not None  # which made the images
            notes += self.encoder.notes
            notes += one_token_notes(config) + tolerance_notes(config)
        encoder = self.encoder
        if prune is not None:
            prune, impossible = self.encoding.possible(prune, [c for c in prompt.chunks if isinstance(c, ImageChunk)])
            notes += impossible
        if prune is not None and prune.prunes_in_vision and encoder is not None and not encoder.profile.reads_attention:
            scorer = vision_scorer(prune, has_attention=False)
            instead = (
                f", by {scorer} in place of {prune.vision_scorer}"
                if scorer != prune.vision_scorer and prune.encoder_attention
                else ""
            )
            notes.append(
                f"projector type {encoder.projector!r} {encoder.profile.why_embeddings}: the vision stage goes by "
                f"embeddings alone{instead}"
            )
        windows: list[tuple[int, Keep]] = []
        if prune is not None and prune.prunes_in_decoder:
            windows = prune.decoder_windows(self.decoder.n_layers)
            if not self.decoder.stage_problem:
                windows, moved = at_attention(self.decoder, windows)
                notes += moved
            problem = self.decoder.stage_problem or self.decoder.layer_problems.get(
                tuple(layer for layer, _ in windows)
            )
            if not problem and (not isinstance(prompt.chunks[-1], TextChunk) or not len(prompt.chunks[-1].tokens)):
                problem = "there is no text after the last image to score with"
            if problem:
                windows = []
                notes.append(f"no decoder stage: {problem}")
        decoder = self.decoder
        answer = min(_ANSWER_TOKENS, decoder.n_ctx // 4)
        sizes = [n for n in (decoder.n_swa, decoder.n_ctx - answer) if n > 0]
        room = Room(sizes, decoder.n_ubatch)
        plan = plan_prompt(prompt.chunks, prune, windows, encoded, room)
        if windows and 0 < self.decoder.n_swa < plan.n_cells:
            # llama_kv_cache::find_slot hands out parked cells that have left the sliding window. Rows would not
            # come back to their own.
            notes.append(
                f"no decoder stage: the prompt is longer than the model's sliding window of {self.decoder.n_swa}"
            )
            plan = plan_prompt(prompt.chunks, prune, [], encoded, room)
        if prune is not None and plan.windows and prune.look_ahead is not None:
            plan.look_ahead = ranking_layers(self.decoder, prune.look_ahead, plan.windows[0][0], notes)
        if prune is not None:
            plan.config, undone = possible_in_cells(decoder, prune, plan.n_cells, has_stage=bool(plan.windows))
            notes += undone
        if plan.n_cells + 1 > self.decoder.n_ctx:
            raise ContextLengthError(
                f"the prompt takes {plan.n_cells} tokens ({plan.n_text} text, {sum(plan.n_vision)} image) of a context "
                f"of {self.decoder.n_ctx}",
                "raise n_ctx, lower vision_keep, or give fewer or smaller images"
                if plan.images
                else "raise n_ctx, or shorten the prompt",
            )
        self._check_images(zip(plan.images, plan.n_vision))
        if not plan.n_cells:
            raise ConfigError("the prompt is empty", "give some text")
        return plan, notes

    def _check_images(self, images: Iterable[tuple[ImageChunk, int]]) -> None:
        """Checks that images which must be processed at once fit into one graph.

        Args:
            images: Each image with the number of tokens that the vision stage leaves of it.

        Raises:
            ContextLengthError: One of them does not.
        """
        for chunk, n in images:
            if not chunk.causal and n > self.decoder.n_ubatch:
                raise ContextLengthError(
                    f"an image of {n} tokens must be processed at once (its rows attend to each other), n_ubatch is "
                    f"{self.decoder.n_ubatch}",
                    f"use n_ubatch={n} or more",
                )

    def hand_over(self, state: Prefill) -> list[int]:
        """Puts the prompt's state into the Llama.

        Returns:
            Ids of the prompt. Llama.create_completion finds that it has read them already.
        """
        llama, n = self.llama, state.n_cells
        tokens = np.where(state.tokens < 0, _IMAGE_TOKEN, state.tokens)
        hand_over(llama, tokens, state.logits)
        self.context.continue_prompt(n, state.next_position, state.gap)
        ids: list[int] = tokens.tolist()
        return ids


def _image_reports(images: Sequence[StagedImage], state: Prefill) -> list[ImageReport]:
    reports = []
    for i, image in enumerate(images):
        vision, chunk, encoded = image.selection, image.chunk, image.encoded
        last = state.selections[-1][i] if state.selections else None
        reports.append(
            ImageReport(
                chunk.picture,
                chunk.n_tokens,
                chunk.grid,
                encoded.cells,
                vision.kept,
                vision.kept if last is None else vision.kept[last.kept],
                vision.scores,
                state.scores[0][i] if state.scores else None,
                vision.mass,
                vision.mass if last is None else last.mass,
                encoded.special,
                encoded.cached,
                encoded.redundant,
                encoded.kept,
                encoded.layer,
                encoded.same_as,
                chunk.video,
                chunk.second,
            )
        )
    return reports
