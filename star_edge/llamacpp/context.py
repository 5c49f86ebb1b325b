"""A llama.cpp context with a tap, and decodes of given rows in it.

Knows batches, positions, KV cells and sequences. Knows neither images nor pruning.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from typing import Any, cast

import llama_cpp
import numpy as np
from llama_cpp import Llama, _internals

from ..errors import ContextLengthError, EngineError, RequestCancelledError, UnsupportedModelError
from ..progress import Meter
from ..rows import Rows
from .devices import can_offload
from .handover import free_with, keep_memory_on_reset
from .names import HYBRIDS, LAYER_OUTPUTS
from .tap import Outcome, Plan, Tap

# Sequence ids. MAIN holds the conversation. From PARKED on, each holds the dropped tokens of one decoder stage, whose
# cells must not be reused yet.
MAIN, PARKED, N_SEQUENCES = 0, 1, 7

# Decoders in whose layers a row of text is not treated as one of an image is: experts of its own, or an embedding of
# the token in every layer. It must be
# decoded as its token there. Of this version: what looks at ubatch.token or ubatch.embd past the input in src/models;
# to be looked up again for another.
TELLS_TEXT_APART = ("cogvlm", "deepseek4", "gemma3n", "gemma4", "qwen4exp")

# Decoders that end the process at an image unless their RoPE has sections (llama_model_glm4::graph, glm4_moe)
NEED_SECTIONS = ("glm4", "glm4moe")

EXPERTS_IN_HOST_MEMORY = (
    "a mixture of experts whose layers are not all on the GPU: put them there (n_gpu_layers=-1), "
    "or set op_offload=False"
)


def set_threads(llama: Llama, n: int) -> None:
    """The number of threads that the next decodes of a Llama use."""
    llama_cpp.llama_set_n_threads(llama.ctx, n, n)


def uses_mrope(llama: Llama) -> bool:
    kinds = llama_cpp.LLAMA_ROPE_TYPE_MROPE, llama_cpp.LLAMA_ROPE_TYPE_IMROPE
    return llama_cpp.llama_model_rope_type(llama._model.model) in kinds


def check_takes_images(llama: Llama) -> None:
    """Raises UnsupportedModelError if llama.cpp ends the process when this text model gets an image."""
    if llama.metadata.get("general.architecture") in NEED_SECTIONS and not uses_mrope(llama):
        raise UnsupportedModelError(
            "this text model was converted without its RoPE sections, and cannot take images",
            "convert it again with a newer convert_hf_to_gguf.py, or download another file",
        )


class TappedContext(_internals.LlamaContext):
    """A LlamaContext that tells its tap when a plain decode begins.

    Attributes:
        request: A number that changes whenever the prompt in the cache goes.
        is_cancelled: Asked before every decode, also while a prompt is read. If it returns true,
            RequestCancelledError is raised. It may raise an error of its own.
        stem: Rows of the last prompt that a later one may use (decoder.reuse.Stem), or None.
        n_parked: How many of those rows are only in the sequence PARKED, or in MAIN though no row may see them (hybrid
            decoders).
        dropped: Dense positions [start, stop) of such rows in MAIN, or None. The tap hides them.
        stem_end: Of a hybrid decoder with a stem, the dense position after the last row.
        clears_to_stem: The next kv_cache_clear begins a request, and leaves the stem.
        saved: Stems of other conversations (decoder.saved.SavedStems), or None.
        save_stem: Called before an answer takes the cells of the stem, or None.
    """

    def __init__(self, tap: Tap, **kwargs: Any) -> None:
        self.tap = tap
        self.request = 0
        self.is_cancelled: Callable[[], bool] | None = None
        self.stem: Any = None
        self.n_parked = 0
        self.dropped: tuple[int, int] | None = None
        self.stem_end = 0
        self.clears_to_stem = False
        self.saved: Any = None
        self.save_stem: Callable[[], None] | None = None
        self.attention_layers: list[int] = []
        self.has_rope = True
        self._n_prompt = 0
        self._gap = 0
        super().__init__(**kwargs)
        self.is_hybrid = bool(llama_cpp.llama_model_is_hybrid(self.model.model))

    def continue_prompt(self, n_cells: int, next_position: int, gap: int = 0) -> None:
        """Rows after the prompt's n_cells rows get RoPE positions from next_position on, until forget_prompt.

        gap: What dense positions are past the number of rows, see decoder.hybrid.
        """
        self._n_prompt, self._gap = n_cells, gap
        self.tap.set_position_shift(n_cells + gap, next_position - n_cells - gap)

    def see_below(self, layers: Sequence[int], bias: np.ndarray, witness: np.ndarray, n_hidden: int) -> None:
        """What is decoded after the prompt sees, by layer, rows that are in no sequence but parking ones
        (`Tap.set_levels`), until forget_prompt. n_hidden: how many of them.
        """
        self.n_parked = n_hidden
        self.tap.set_levels(layers, bias, witness)

    def forget_prompt(self) -> None:
        """Ends the position shift and the attention bias of plain decodes."""
        self.request += 1
        self._n_prompt = self._gap = 0
        self.tap.forget_levels()
        self.tap.set_position_shift(0, 0)
        self.tap.set_cell_bias(None)

    def end_prompt(self) -> None:
        """Empties the cache except for the stem."""
        self.forget_prompt()
        if self.stem is None:
            llama_cpp.llama_memory_clear(self.memory, False)
        elif not self.is_hybrid:  # a hybrid's stem is in MAIN: what follows it goes when the next prompt is read
            llama_cpp.llama_memory_seq_rm(self.memory, MAIN, 0, -1)

    def forget_stem(self) -> bool:
        """Frees the cells of rows that are dropped or only in a parking sequence. What is decoded from then on does not
        see them in any layer. Returns whether the cache is empty now.
        """
        stem, self.stem, self.n_parked = self.stem, None, 0
        self.tap.forget_levels()
        if self.is_hybrid:
            dropped, self.dropped = self.dropped, None
            if stem is not None and not self._n_prompt:
                llama_cpp.llama_memory_clear(self.memory, False)
                return True
            if dropped is not None:  # an answer goes on and needs the cells
                llama_cpp.llama_memory_seq_rm(self.memory, MAIN, *dropped)
                self.tap.unhide_cells()
            return False
        for parking in range(PARKED, N_SEQUENCES) if self.memory is not None else ():
            if llama_cpp.llama_memory_seq_pos_max(self.memory, parking) >= 0:
                llama_cpp.llama_memory_seq_rm(self.memory, parking, 0, -1)
        return False

    # Any other use of the Llama (Llama.eval, Llama.embed) first cuts the cache through one of these.

    def kv_cache_clear(self) -> None:
        if self.clears_to_stem:
            self.clears_to_stem = False
            self.end_prompt()
            return
        self.forget_prompt()
        self.forget_stem()
        super().kv_cache_clear()  # type: ignore[no-untyped-call]  # llama_cpp has no annotations there

    def kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        if p0 < self._n_prompt or not self._n_prompt:  # 0: it may have been read, in part or whole, and never answered
            self.forget_prompt()
        if not self._n_prompt and self.forget_stem() and p0 > 0:
            return False  # as from a memory that cannot go back: the rows before p0 are to be read again
        gap = self._gap  # seq_id -1: the only sequence of a Llama, and not those where rows are parked
        return super().kv_cache_seq_rm(MAIN if seq_id < 0 else seq_id, p0 + gap, p1 + gap if p1 >= 0 else p1)

    def check_cancelled(self) -> None:
        if self.is_cancelled is not None and self.is_cancelled():
            raise RequestCancelledError("the request was cancelled")

    def kv_cache_seq_cp(self, seq_id_src: int, seq_id_dst: int, p0: int, p1: int) -> None:
        self.forget_stem()
        super().kv_cache_seq_cp(seq_id_src, seq_id_dst, p0, p1)

    def kv_cache_seq_keep(self, seq_id: int) -> None:
        self.forget_stem()
        super().kv_cache_seq_keep(seq_id)

    def kv_cache_seq_shift(self, seq_id: int, p0: int, p1: int, shift: int) -> None:
        self.forget_stem()
        super().kv_cache_seq_shift(seq_id, p0, p1, shift)

    def decode(self, batch: _internals.LlamaBatch) -> None:
        self.check_cancelled()
        if not self._n_prompt:
            self.forget_stem()
        elif self.n_parked:
            n_used = llama_cpp.llama_memory_seq_pos_max(self.memory, MAIN) + 1 - self._gap + self.n_parked
            if n_used + batch.n_tokens() > llama_cpp.llama_n_ctx(self.ctx):  # an answer that long needs the cells
                if self.save_stem is not None and self.stem is not None:
                    self.save_stem()
                self.forget_stem()
        for i in range(batch.batch.n_tokens if self._gap else 0):  # set_batch writes them anew before every decode
            batch.batch.pos[i] += self._gap
        self.tap.begin()
        try:
            super().decode(batch)
        except RuntimeError as error:
            raise EngineError(f"llama.cpp failed while answering ({error})", "raise n_ctx, or ask again") from error
        self.stem_end += int(batch.n_tokens())
        self.tap.check()


def attach_tap(llama: Llama, tap: Tap) -> None:
    """Replaces the context of a `Llama` by one with the tap.

    cb_eval is taken only at creation, so the context is made anew from the model that is already loaded. A unified
    cache is what parking needs: it has LLAMA_MAX_SEQ sequences for any n_seq_max (llama_kv_cache::seq_to_stream).

    Raises:
        EngineError: llama.cpp could not create the context, usually for lack of memory. The Llama then has a context
            without a tap.
    """
    params = llama.context_params
    tap.set_layer_out(LAYER_OUTPUTS.get(llama.metadata.get("general.architecture", "")))
    untapped = type(params).from_buffer_copy(params)
    params.cb_eval = ctypes.cast(tap.callback, llama_cpp.ggml_backend_sched_eval_callback)
    params.cb_eval_user_data = tap.user_data
    if not llama_cpp.llama_model_is_hybrid(llama._model.model):  # parks nothing, and has a state for each sequence
        params.n_seq_max = max(2, params.n_seq_max)
    params.kv_unified = True
    llama._ctx.close()
    try:
        _install(llama, TappedContext(tap, model=llama._model, params=params, verbose=llama.verbose))
    except ValueError as error:
        llama.context_params = untapped
        with contextlib.suppress(ValueError):
            _install(llama, _internals.LlamaContext(model=llama._model, params=untapped, verbose=llama.verbose))
        raise EngineError(
            "llama.cpp could not create a context", "lower n_ctx, or quantize the KV cache (type_k, type_v)"
        ) from error


def tapped(llama: Llama) -> TappedContext:
    """The context that attach_tap has put into the Llama."""
    return cast(TappedContext, llama._ctx)


def tapped_context(llama: Llama) -> TappedContext:
    """The context of a Llama. It is made anew if it has no tap.

    Raises:
        EngineError: See `attach_tap`.
    """
    if not isinstance(llama._ctx, TappedContext):
        tap = Tap()
        free_with(llama, tap.close)  # freed after the context, which attach_tap puts on the stack later
        attach_tap(llama, tap)
    return tapped(llama)


def _install(llama: Llama, context: _internals.LlamaContext) -> None:
    llama._stack.callback(context.close)
    llama._ctx = context
    llama.reset()  # what was in the old cache is gone
    if isinstance(context, TappedContext):
        keep_memory_on_reset(llama)
    if llama._lora_adapter is not None:
        adapter: Any = llama._lora_adapter  # a c_void_p stands for any pointer
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        scales = (ctypes.c_float * 1)(llama.lora_scale)
        if llama_cpp.llama_set_adapters_lora(context.ctx, adapters, 1, scales):
            raise EngineError("the LoRA adapter could not be applied to the new context")


class DecoderContext:
    """Decodes in the context of a tapped `Llama`.

    The cache's metadata stays dense: the n-th row ever decoded has position n there, which llama.cpp's checks demand.
    The tap gives RoPE the true positions.
    """

    def __init__(self, llama: Llama, tap: Tap) -> None:
        self.llama = llama
        self.tap = tap
        model = llama._model.model
        self.n_layers = llama_cpp.llama_model_n_layer(model)
        self.n_heads = llama_cpp.llama_model_n_head(model)
        self.n_embd = llama_cpp.llama_model_n_embd(model)
        self.n_embd_inp = llama_cpp.llama_model_n_embd_inp(model)
        self.n_vocab = llama.n_vocab()
        self.n_ctx = min(
            llama.n_ctx(), len(llama.input_ids)
        )  # llama.cpp pads its context; Llama's own buffer is not padded
        self.n_ubatch = min(llama_cpp.llama_n_ubatch(llama.ctx), llama_cpp.llama_n_batch(llama.ctx))
        self.mrope = uses_mrope(llama)
        self.n_swa = llama_cpp.llama_model_n_swa(model)
        # llama_kv_cache_iswa: such a cache may be smaller than the context, in steps of 256, and then find_slot gives
        # the cells of rows that have left the window to later ones. What the tap knows of a cell would hold for those.
        params = llama.context_params
        n_window = -(-(self.n_swa * params.n_seq_max + params.n_ubatch) // 256) * 256
        self.cells_move_on = self.n_swa > 0 and not params.swa_full and n_window < self.n_ctx
        self.has_cells = not llama_cpp.llama_model_is_recurrent(model)
        self.is_hybrid = self.owner.is_hybrid
        self.tells_text_apart = llama.metadata.get("general.architecture") in TELLS_TEXT_APART
        self.layer_problems: dict[
            tuple[int, ...], str
        ] = {}  # layers of decoder stages -> why they cannot be, found while running
        self.n_threads = llama.n_threads_batch
        self.meter: Meter | None = None  # is told of the decodes of a prompt
        # As Llama.eval does it: a matrix product rounds differently for one row than for several, and logprobs show it.
        self.all_logits = llama._logits_all

        n = self.n_ubatch
        self._seq_id = (ctypes.c_int32 * 1)(MAIN)
        self._seq_ids = (ctypes.POINTER(ctypes.c_int32) * n)(*[self._seq_id] * n)
        self._n_seq_id = np.ones(n, np.int32)
        self._no_input = np.zeros((n, self.n_embd_inp), np.float32)
        self.stage_problem = self._find_stage_problem()

    def _find_stage_problem(self) -> str | None:
        """Why this model cannot have a decoder stage, or None."""
        metadata = self.llama.metadata
        arch = metadata.get("general.architecture")
        if not self.has_cells:
            return "a recurrent decoder has no cache of single tokens"
        n_experts = int(metadata.get(f"{arch}.expert_count", 0))
        in_host_memory = 0 <= self.llama.model_params.n_gpu_layers <= self.n_layers
        if n_experts and in_host_memory and can_offload() and self.llama.context_params.op_offload:
            # The GPU takes large products of host weights too (op_offload). Before it gets the experts that it needs,
            # ggml_backend_sched_compute_splits reads the expert ids that a skipped router never made, and asserts.
            return EXPERTS_IN_HOST_MEMORY
        if self.is_hybrid:
            self._look_at_graph()
            if arch not in HYBRIDS:
                return f"hybrid decoders of architecture {arch!r} are not tested"
            if self.n_swa:
                return "a hybrid decoder with a sliding window"
            if not any(layer > 0 for layer in self.attention_layers):
                return "the decoder has no attention after its first layer"
        return None

    def _look_at_graph(self) -> None:
        """Learns from the graph of one token, of which nothing is computed, what a hybrid decoder has in which layer.
        Once, in a context that is still empty.
        """
        owner = self.owner
        if not owner.attention_layers:
            row = Rows(np.zeros(1, np.int32), tokens=np.zeros(1, np.int32))
            outcome = self.decode(row, 0, Plan(count_only=True), "look at the graph")
            self.clear()
            owner.attention_layers, owner.has_rope = outcome.attention_layers, outcome.has_rope

    @property
    def attention_layers(self) -> list[int]:
        """Layers with attention, ascending: where a decoder stage can be."""
        return self.owner.attention_layers or list(range(self.n_layers))

    def nearest_attention(self, layer: int) -> int:
        """The layer with attention, 1 or later, that is nearest to `layer`; the earlier of two."""
        return min((k for k in self.attention_layers if k > 0), key=lambda k: (abs(k - layer), k))

    @property
    def memory(self) -> object:
        return llama_cpp.llama_get_memory(self.llama.ctx)

    @property
    def owner(self) -> TappedContext:
        """The context of the Llama. It knows what is kept of the last prompt."""
        return tapped(self.llama)

    @property
    def buffer(self) -> np.ndarray:
        """The Llama's token ids. Llama.load_state makes another array, and the cache then holds something else."""
        return self.llama.input_ids

    # ---- rows ----

    def decode(self, rows: Rows, first_position: int, plan: Plan, what: str, logits: bool = False) -> Outcome:
        """One llama_decode of at most n_ubatch rows into sequence MAIN; only the last row asks for logits, or all for
        `logits_all`.

        plan.positions is filled in where RoPE should see others than the dense positions from first_position on, which
        are what the cache's metadata get.

        Raises:
            ContextLengthError: There are no free KV cells.
            EngineError: llama.cpp or the tap failed.
            RequestCancelledError: TappedContext.is_cancelled says so.
        """
        tapped(self.llama).check_cancelled()
        n = len(rows)
        if n > self.n_ubatch:
            raise EngineError(f"{what}: {n} rows in one decode, n_ubatch is {self.n_ubatch}")
        dense = np.arange(first_position, first_position + n, dtype=np.int32)
        wants_logits = np.zeros(n, np.int8)
        wants_logits[0 if self.all_logits else -1 :] = logits

        batch: Any = llama_cpp.llama_batch()  # its annotations say array where it has pointers
        batch.n_tokens = n
        if rows.tokens is not None:
            tokens = np.ascontiguousarray(rows.tokens, np.int32)
            batch.token = tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
        else:
            embeddings = (
                self._no_input[:n] if rows.embeddings is None else np.ascontiguousarray(rows.embeddings, np.float32)
            )
            batch.embd = embeddings.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            if self.mrope:  # an embedding row carries (t, y, x, unused); a token row one position
                dense = np.concatenate([dense, dense, dense, np.zeros(n, np.int32)])
        batch.pos = dense.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_pos))
        batch.n_seq_id = self._n_seq_id.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.seq_id = ctypes.cast(cast(Any, self._seq_ids), type(batch.seq_id))
        batch.logits = wants_logits.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))

        plan.n_rows = n
        # A recurrent decoder knows no positions, and the attention of some hybrids (Granite 4, Nemotron-H) neither.
        if self.has_cells and self.owner.has_rope and not np.array_equal(rows.positions, dense):
            plan.positions = np.ascontiguousarray(rows.positions, np.int32)
        with self.tap.armed(plan, what) as outcome:
            status = llama_cpp.llama_decode(self.llama.ctx, batch)
        if status == 1:
            raise ContextLengthError(f"{what}: no free KV cells for {n} rows", f"raise n_ctx (it is {self.n_ctx})")
        if status:
            raise EngineError(f"{what}: llama_decode returned {status}")
        return outcome

    def join(self, parts: Sequence[Rows]) -> Rows:
        """Several runs of rows as one: those of images, or any for a window past layer 0, where a row is its hidden
        state. Text gets embeddings of zeros.

        With M-RoPE the positions of text become (p, p, p, 0), as in llm_graph_input_pos::set_input.
        """
        embeddings, positions = [], []
        for rows in parts:
            embeddings.append(
                np.zeros((len(rows), self.n_embd_inp), np.float32) if rows.embeddings is None else rows.embeddings
            )
            is_plain = self.mrope and rows.positions.ndim == 1
            positions.append(
                np.stack([rows.positions] * 3 + [np.zeros_like(rows.positions)]) if is_plain else rows.positions
            )
        return Rows(np.concatenate(positions, axis=-1), None, np.concatenate(embeddings))

    def logits(self) -> np.ndarray:
        """Logits of the last row that asked for them, (n_vocab,) float32, copied."""
        pointer = llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)
        if not pointer:
            raise EngineError("llama.cpp has no logits for the last row")
        return np.ctypeslib.as_array(pointer, (self.n_vocab,)).copy()

    # ---- cells ----

    def clear(self) -> None:
        """Empties the cache's metadata. The data stays: nothing reads a cell that belongs to no sequence, and the first
        decode of a recurrent layer clears its state.
        """
        self._clear(False)

    def clear_data(self) -> None:
        """Empties the cache and its data, for a prompt whose first decode does not reach all recurrent layers."""
        self._clear(True)

    def _clear(self, data: bool) -> None:
        context = tapped(self.llama)
        context.stem, context.n_parked, context.dropped = None, 0, None
        self.tap.forget_levels()
        llama_cpp.llama_memory_clear(self.memory, data)

    def copy(self, source: int, sequence: int, start: int, stop: int = -1) -> None:
        """Puts the dense positions [start, stop) of a sequence into another as well."""
        llama_cpp.llama_memory_seq_cp(self.memory, source, sequence, start, stop)

    def span(self, sequence: int) -> tuple[int, int]:
        """First and last dense position of a sequence, -1 if it is empty."""
        return (
            llama_cpp.llama_memory_seq_pos_min(self.memory, sequence),
            llama_cpp.llama_memory_seq_pos_max(self.memory, sequence),
        )

    def remove(self, sequence: int, start: int, stop: int = -1) -> None:
        """Takes the dense positions [start, stop) out of a sequence; cells of no sequence are free again."""
        if not llama_cpp.llama_memory_seq_rm(self.memory, sequence, start, stop):
            raise EngineError("llama.cpp cannot remove part of this model's cache")

    def park(self, start: int, parking: int) -> None:
        """Moves everything from dense position `start` on from MAIN to sequence `parking`, where no row of MAIN attends
        to it.
        """
        self.copy(MAIN, parking, start)
        self.remove(MAIN, start)

    def set_causal(self, causal: bool) -> None:
        llama_cpp.llama_set_causal_attn(self.llama.ctx, causal)
