"""The vision encoder of an mmproj file, run by libmtmd, with attention read out on the way.

Knows chunks, pixels and encoder rows. Does not decide which tokens stay.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike

import numpy as np
from llama_cpp import Llama

from ..errors import (
    EngineClosedError,
    EngineError,
    ImageError,
    ModelFileError,
    PromptError,
    UnsupportedModelError,
)
from ..llamacpp.devices import can_offload
from ..llamacpp.gguf import GGUFInfo, count_rows, read_gguf_info
from ..llamacpp.mmproj_check import check_mmproj
from ..llamacpp.mtmd import MEDIA_MARKER, Mtmd, RawImage, load_error, logged, names_alone
from ..llamacpp.names import CLASS_EMBEDDING, POSITION_EMBEDDINGS
from ..llamacpp.native import version_and_features
from ..llamacpp.tap import CONCAT_FIRST, CONCAT_LAST, MEAN_ALL, NO_ATTENTION, AttentionRead, Outcome, Plan, Tap
from . import repair
from .cache import CachedImage, ImageCache, file_digest, pixels_id
from .chunks import Encoded, ImageChunk, LooksKnownError, Prompt, TextChunk, cells_of
from .precision import with_type
from .profiles import METADATA_KEYS, POSITION_TABLES, Layout, find_profile, repeated_rows

MAX_QUERY_ROWS = 1024  # attention received is a mean over query rows: a sample of them is enough


class VisionEncoder:
    """An mmproj file, loaded beside its text model.

    Args:
        path: The mmproj file.
        llama: The text model.
        flash_attn: Flash attention in the encoder.
        use_gpu: Whether the encoder may use the GPU.
        image_min_tokens: For encoders with dynamic resolution; -1: the model's own.
        image_max_tokens: The same.
        repaired: Put right what this llama.cpp gets wrong with the file (vision/repair.py).
        mmproj_type: The type that the encoder computes in (vision/precision.py).
        cache_bytes: Bytes that `encode_once` keeps in memory.
        cache_dir: A directory where it keeps more, or None.

    Raises:
        ModelFileError: The file is missing, truncated, or not an mmproj file.
        ModelMismatchError: The file was made for a text model of another embedding width.
        UnsupportedModelError: The file has no vision encoder, or its matrices cannot get that type.
        ConfigError: A converted file cannot be kept.

    Attributes:
        path: The mmproj file.
        file: The file that is loaded: the mmproj file, or its converted copy.
        precision: Types of the two.
        flash_attn, mmproj_type: As given.
        on_gpu: Whether it may use a GPU.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        llama: Llama,
        *,
        flash_attn: bool,
        use_gpu: bool,
        image_min_tokens: int = -1,
        image_max_tokens: int = -1,
        repaired: bool = True,
        mmproj_type: str = "file",
        cache_bytes: int = 0,
        cache_dir: str | PathLike[str] | None = None,
    ) -> None:
        info = read_gguf_info(path, METADATA_KEYS + repair.METADATA_KEYS)
        if info.architecture != "clip":
            raise ModelFileError(
                f"{info.path} is a text model ({info.architecture}), not an mmproj file",
                "give the projector that belongs to the text model",
            )
        check_mmproj(info)
        self.path = info.path
        self.flash_attn, self.mmproj_type = flash_attn, mmproj_type
        self.on_gpu = use_gpu and can_offload()
        self.precision = with_type(info, mmproj_type, self.on_gpu)
        info = self.precision.info
        self.file, self.metadata = info.path, info.values
        self.projector, self.profile = find_profile(info.values)
        if repaired:
            repair.check_graph(info, self.projector, version_and_features()[0])
        self.n_threads = llama.n_threads_batch
        self.lock = threading.RLock()  # whoever uses the encoder holds it; while an answer is generated, nobody does
        self.image_min_tokens = image_min_tokens
        self.cache: ImageCache | None = None
        if cache_bytes or cache_dir is not None:
            version, features = version_and_features()  # the processor's decide how kernels round
            settings = (
                flash_attn,
                use_gpu,
                image_min_tokens,
                image_max_tokens,
                repaired,
                MAX_QUERY_ROWS,
                version,
                platform.machine(),
                features,
            )
            model = (
                file_digest(info.path) if cache_dir is not None else b""
            )  # within a process the encoder stays the same
            self.cache = ImageCache(cache_bytes, cache_dir, model + repr(settings).encode())
        self.tap = Tap()
        self.before_run: Callable[[], None] | None = None  # an exception of it ends the request

        self._mtmd = Mtmd(
            llama,
            self.tap,
            flash_attn=flash_attn,
            use_gpu=use_gpu,
            min_tokens=image_min_tokens,
            max_tokens=image_max_tokens,
        )
        self.notes = [self.precision.note] if self.precision.note else []
        if self.precision.is_converted:
            self.notes.append(f"the encoder computes in {self.precision.kind}; the file has {self.precision.of_file}")
        if not self._load(info, repaired):
            self.tap.close()
            raise load_error(self.path)
        if not self._mtmd.has_vision:
            self.close()
            raise UnsupportedModelError(
                f"{info.path} has no vision encoder", "give the mmproj file of a vision-language model"
            )
        self._n_positions = 0  # patches along a side that a position table holds; 0: any number
        if self.projector in POSITION_TABLES:  # (2, n, width): of columns and of rows
            width = int(self.metadata["clip.vision.embedding_length"] or 0)
            self._n_positions = count_rows(info, POSITION_EMBEDDINGS, width) // 2
        self._layer = self.profile.n_layers(self.metadata) - 1
        if CLASS_EMBEDDING in info.tensors:
            self.tap.find_concat(CLASS_EMBEDDING)
        elif self.profile.cls_row:
            self.profile = replace(self.profile, cls_row=None)
        self.n_heads = int(self.metadata["clip.vision.attention.head_count"] or 1)
        self.last_outcome = Outcome()
        self.mrope, self.n_embd_inp = self._mtmd.mrope, self._mtmd.n_embd_inp
        self._moved: dict[str, np.ndarray] = {}
        if repaired:
            try:
                self._move(repair.graph_inputs(info, self.projector))
            except BaseException:
                self.close()
                raise

    @property
    def context(self) -> object | None:
        """The mtmd_context, or None once it is closed."""
        return self._mtmd.handle

    def _load(self, info: GGUFInfo, repaired: bool) -> bool:
        """Loads the file, repaired where it can be. False: it cannot be loaded, and the log says why."""
        self._changed: list[repair.Change] = []
        changes = repair.metadata_changes(info, self.projector) if repaired else []
        if changes:
            problem = ""
            try:
                with repair.with_metadata(info, changes) as path:
                    is_loaded = self._mtmd.load(path)
            except OSError as error:
                is_loaded, problem = False, error.strerror or str(error)
            if is_loaded:
                self.metadata |= {c.key: c.value if isinstance(c.value, bool) else c.value.tolist() for c in changes}
                self._changed = changes
                return True
            undone = ", ".join(c.undone for c in changes)
            self.notes.append(f"encoder not repaired: {undone} ({problem or logged()})")
        return self._mtmd.load(info.path)

    @property
    def repairs(self) -> list[str]:
        """What stock llama.cpp gets wrong with this file, and is put right here."""
        moved = [repair.describe(self._moved)] if self._moved else []
        return moved + [change.done for change in self._changed]

    def _move(self, inputs: dict[str, np.ndarray]) -> None:
        """Replaces inputs of the graph from now on, if the graph joins CLS last.

        This is learned from a graph that is built for a gray picture and not computed. In a running graph, the
        consumers of the inputs may come before the CONCAT that tells (csrc/tap_inputs.c).
        """
        if not inputs:
            return
        prompt = self.tokenize(
            MEDIA_MARKER, [np.full((64, 64, 3), 128, np.uint8)]
        )  # libmtmd scales it to the encoder's size
        try:
            chunk = next(chunk for chunk in prompt.chunks if isinstance(chunk, ImageChunk))
            outcome = self.run(chunk, Plan(count_only=True))
        finally:
            prompt.close()
        if outcome.concat == CONCAT_LAST:
            self._moved = inputs
            for name, values in inputs.items():
                self.tap.set_input(name, values)

    def _check_open(self) -> None:
        if self.context is None:
            raise EngineClosedError("the vision encoder is closed", "make a new StarVLM")

    def close(self) -> None:
        if self.context is not None:
            self._mtmd.close()
            self.tap.close()

    # ---- prompt ----

    def tokenize(self, text: str, images: Sequence[np.ndarray]) -> Prompt:
        """Splits a prompt into chunks, and preprocesses its images.

        Args:
            text: The prompt, with one media marker for each image.
            images: Pixels, (h, w, 3) uint8 each.

        Returns:
            The chunks. They must be closed.

        Raises:
            PromptError: The numbers of markers and images differ.
            ImageError: An image has a shape that the encoder cannot take.
        """
        self._check_open()
        n_markers = text.count(MEDIA_MARKER)
        if n_markers != len(images):
            raise PromptError(
                f"the prompt has {n_markers} image markers for {len(images)} images",
                f"write {MEDIA_MARKER} once for each image, or none at all",
            )
        names = [self.bitmap_name(image, i) for i, image in enumerate(images)]
        with self.lock:
            prompt = Prompt([], self._mtmd.tokenize(text, images, names))
        try:
            prompt.chunks = self.chunks(prompt._handle)
        except BaseException:
            prompt.close()
            raise
        return prompt

    def chunks(self, handle: object) -> list[TextChunk | ImageChunk]:
        """The chunks of libmtmd's mtmd_input_chunks, which must outlive the encoding of the images.

        Raises:
            PromptError: A chunk is audio.
            ImageError: An image has more patches along a side than the encoder has positions.
        """
        chunks = [self._chunk(raw) for raw in self._mtmd.chunks(handle)]
        images = [chunk for chunk in chunks if isinstance(chunk, ImageChunk)]
        for image, name in zip(images, names_alone([image.content for image in images])):
            image.content = name
        # Large pictures are cut into several chunks of one name (mtmd_tokenizer::split_batch_to_chunk), always in the
        # same way.
        parts: dict[str, list[ImageChunk]] = {}
        for i, chunk in enumerate(chunks):
            if isinstance(chunk, ImageChunk):
                parts.setdefault(chunk.content or f"unnamed {i}", []).append(chunk)
        for number, (name, pieces) in enumerate(parts.items()):
            content = name.partition(":")[2]
            for part, chunk in enumerate(pieces):
                chunk.picture, chunk.content = number, f"{content} {part}" if content else ""
        return chunks

    def bitmap_name(self, image: np.ndarray, number: int) -> str:
        """What a bitmap is called, so that its chunks can be told from others', and found in the cache.

        image: its pixels. number: unique among the bitmaps of a prompt.
        """
        content = "" if self.cache is None else pixels_id(image)
        return f"{number}:{content}"

    def _chunk(self, raw: np.ndarray | RawImage) -> TextChunk | ImageChunk:
        if not isinstance(raw, RawImage):
            return TextChunk(raw)
        n = raw.n_tokens
        self._check_size(raw)
        # Slices (MiniCPM-V 4.6) are numbered one after the other beside M-RoPE too, and have no rows and columns then
        has_rows = self.mrope and raw.nx * raw.ny == n and not raw.positions[0].any()
        grid = (raw.ny, raw.nx) if has_rows else self.profile.grid(n, raw.nx, raw.ny)
        if grid is None and self.profile.sized_grid:
            grid = self.profile.sized_grid(n, raw.size) if raw.size else None
        special = self.profile.special(n, grid) if self.profile.special else None
        return ImageChunk(
            raw.handle,
            n,
            raw.positions,
            raw.moves,
            raw.n_positions,
            grid,
            raw.causal,
            special,
            content=raw.name,
            size=raw.size,
        )

    def _check_size(self, raw: RawImage) -> None:
        size = raw.size if self._n_positions else None
        if size is None:
            return
        n_patches = max(size) // POSITION_TABLES[self.projector](self.metadata)
        if n_patches > self._n_positions:
            raise ImageError(
                f"an image has {n_patches} patches along a side, and the model has positions for {self._n_positions}",
                "crop it, pad it to be less narrow, or lower image_max_tokens",
            )

    # ---- encode ----

    def encode_once(
        self, chunk: ImageChunk, attention: str | None, *, want_cells: bool, plan: Plan | None = None
    ) -> Encoded:
        """Like `encode`, from the cache if it has everything that is asked for.

        Arrays stay valid, and may be read-only.
        """
        if self.cache is None or not chunk.content:
            encoded = self.encode(chunk, attention, want_cells=want_cells, plan=plan)
            return replace(encoded, embeddings=encoded.embeddings.copy())
        self._check_open()
        attention = attention if self.reads_attention(chunk) else None
        want_cells = bool(want_cells and self.profile.to_cells)
        key, n = self.cache.key(chunk.content), chunk.n_tokens
        found = self.cache.get(key, n, self.n_embd_inp, attention, want_cells)
        if found is not None:
            scores = None if attention is None else found.scores[attention]
            special = self._special(chunk, found.embeddings)
            cells = found.cells if want_cells and found.cells is not None else cells_of(n, special)
            return Encoded(found.embeddings, scores, cells, 0.0, special, cached=self.cache.is_of_earlier(key))
        encoded = self.encode(chunk, attention, want_cells=want_cells, plan=plan)
        encoded = replace(encoded, embeddings=encoded.embeddings.copy())
        self.remember(chunk, encoded, attention, want_cells=want_cells)
        return encoded

    def remember(self, chunk: ImageChunk, encoded: Encoded, attention: str | None, *, want_cells: bool) -> None:
        """Keeps an image's output in the cache. Its arrays become read-only.

        Arguments are those of `encode_once`, which gave the output of this image or of one that equals it.
        """
        if self.cache is None or not chunk.content:
            return
        image = CachedImage(
            encoded.embeddings,
            encoded.cells if want_cells and self.profile.to_cells else None,
            {} if attention is None or encoded.scores is None else {attention: encoded.scores},
        )
        self.cache.put(self.cache.key(chunk.content), image, chunk.n_tokens)

    def is_cached(self, chunk: ImageChunk, attention: str | None, *, want_cells: bool) -> bool:
        """Whether `encode_once` would find the image in the cache."""
        if self.cache is None or not chunk.content:
            return False
        attention = attention if self.reads_attention(chunk) else None
        cells = bool(want_cells and self.profile.to_cells)
        found = self.cache.get(self.cache.key(chunk.content), chunk.n_tokens, self.n_embd_inp, attention, cells)
        return found is not None

    def encode(
        self,
        chunk: ImageChunk,
        attention: str | None = "received",
        *,
        want_cells: bool = True,
        read: AttentionRead | None = None,
        plan: Plan | None = None,
    ) -> Encoded:
        """Runs the encoder and the projector on one image.

        Args:
            chunk: The image.
            attention: Attention to read, if the profile says how rows become tokens; of the last layer without a window
                mask. "received": the mean over heads and query rows of the softmax, a column mean. (STAR, arXiv
                2505.12359, section 3.2, prints a row mean, which is constant because a softmax row sums to one.) "cls":
                from the CLS row alone, or as "received" if there is none.
            want_cells: Find out which grid cell each token shows. Otherwise token i is taken to show cell i.
            read: Attention to read instead, for inspection.
            plan: What the tap does besides.

        Returns:
            The output. Its embeddings are a view of libmtmd's memory, valid until the next run.

        Raises:
            EngineError: libmtmd failed.
            LooksKnownError: The plan compares the image with earlier ones, and it looks like one of them.
        """
        self._check_open()
        attention = attention if self.reads_attention(chunk) else None
        index = rows = None
        plan = plan or Plan()
        if read is not None or (attention is None and not (want_cells and self.profile.to_cells)):
            outcome = self.run(chunk, replace(plan, attention=read))
        elif attention is None:
            outcome, index = self._run_watched(chunk, None, plan)
        else:
            outcome, index = self._run_scored(chunk, attention, plan)
            rows = outcome.attention[0]
        embeddings = self._mtmd.output(chunk.n_tokens)
        special = self._special(chunk, embeddings)
        cells = cells_of(chunk.n_tokens, special)
        if index is not None and self.profile.to_cells:
            cells = self.profile.to_cells(index).astype(np.int64)
        scores = None if rows is None else self._token_scores(rows, chunk, index, special)
        return Encoded(embeddings, scores, cells, outcome.score_seconds, special, outcome.attention)

    def output(self, n_tokens: int) -> np.ndarray:
        """The first rows of what the last run has made, (n_tokens, n_embd_inp) float32: libmtmd's memory."""
        return self._mtmd.output(n_tokens)

    def reads_attention(self, chunk: ImageChunk) -> bool:
        """Whether the profile maps rows to tokens, and the chunk has a grid if that map needs one."""
        return self.profile.reads_attention and (self.profile.sized_grid is None or chunk.grid is not None)

    def max_rows(self, chunk: ImageChunk) -> int:
        """Rows of the encoder's sequence for an image, as an upper bound."""
        return self.profile.n_rows(chunk.n_tokens)

    def _special(self, chunk: ImageChunk, embeddings: np.ndarray) -> np.ndarray | None:
        if self.reads_attention(chunk) or self.profile.special:
            return chunk.special
        special = repeated_rows(embeddings)
        return special if special.any() else None

    def _token_scores(
        self, rows: np.ndarray, chunk: ImageChunk, index: np.ndarray | None, special: np.ndarray | None
    ) -> np.ndarray:
        scores = np.zeros(chunk.n_tokens, np.float32)
        ordinary = np.ones(chunk.n_tokens, bool) if special is None else ~special
        n = int(ordinary.sum())
        assert self.profile.to_tokens is not None  # a profile that reads attention has it
        values = self.profile.to_tokens(rows, Layout(n, chunk.grid, index))
        if len(values) != n:
            raise EngineError(f"{self.projector}: {len(values)} scores for {n} image tokens")
        scores[ordinary] = values
        return scores

    def _run_scored(self, chunk: ImageChunk, attention: str, plan: Plan) -> tuple[Outcome, np.ndarray | None]:
        max_rows = (self.profile.n_last_rows or self.profile.n_rows)(chunk.n_tokens)
        for attempt in (1, 2):
            rows = (0, -1, -(-max_rows // MAX_QUERY_ROWS))
            profile = self.profile
            if attention == "cls" and profile.cls_row:
                rows = (profile.cls_row(chunk.n_tokens), 1, 1)
            read = AttentionRead([self._layer], max_rows, rows, MEAN_ALL, n_threads=self.n_threads)
            index = None
            try:
                _, index = self._run_watched(chunk, read, plan)
            except EngineError:
                if attempt == 2 or self.last_outcome.error != NO_ATTENTION:
                    raise
            # The file's metadata say how many layers run, and the profile where CLS is. The graph itself decides.
            if (
                self.last_outcome.attention
                and self._layer == self.last_outcome.last_unmasked
                and profile is self.profile
            ):
                break
            self._layer = self.last_outcome.last_unmasked
        return self.last_outcome, index

    def _run_watched(
        self, chunk: ImageChunk, read: AttentionRead | None, plan: Plan
    ) -> tuple[Outcome, np.ndarray | None]:
        """Runs the encoder, and reads the graph input that says which rows become tokens, if the profile names one."""
        if not self.profile.index_input:
            return self.run(chunk, replace(plan, attention=read)), None
        index = np.empty(self.max_rows(chunk), np.int32)
        with self.tap.watching(self.profile.index_input, index):
            outcome = self.run(chunk, replace(plan, attention=read))
        return outcome, index[: self.tap.watched() // 4]

    def run(self, chunk: ImageChunk, plan: Plan) -> Outcome:
        if self.before_run is not None and not plan.count_only:
            self.before_run()
        with self.tap.armed(plan, "vision encoder") as self.last_outcome:
            problem = self._mtmd.encode(chunk.handle)
        if problem:
            raise EngineError(f"the vision encoder failed ({problem})")
        if self.last_outcome.known is not None:
            raise LooksKnownError(self.last_outcome.known)
        if self.last_outcome.concat == CONCAT_FIRST and self.profile.cls_first:
            self.profile = self.profile.cls_first
        return self.last_outcome
