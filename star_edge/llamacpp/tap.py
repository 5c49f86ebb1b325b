"""One tap: the object behind the evaluation callback of a llama.cpp or mtmd context.

A tap is created before its context, because llama.cpp takes `cb_eval` only at creation. It must outlive the context.
While nothing is armed, the callback answers "no" to every node, and the graph runs as if there were no callback.
`armed(plan)` covers one `llama_decode` or one encode. The plan says what to observe, skip and inject, and where to
stop. Leaving the block always restores the graph. No Python runs inside the callback, so no exception can cross C.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from ..errors import EngineError
from .native import check, ffi, lib

MEAN_HEADS, MEAN_ROWS, MEAN_ALL = lib.SE_MEAN_HEADS, lib.SE_MEAN_ROWS, lib.SE_MEAN_ALL
CONCAT_FIRST, CONCAT_LAST = lib.SE_CONCAT_FIRST, lib.SE_CONCAT_LAST  # of Outcome.concat
SAMPLE_BYTES = int(lib.SE_SAMPLE_BYTES)
NO_ATTENTION, NO_ROWS_LEAVE = lib.SE_ERR_NO_ATTENTION, lib.SE_ERR_ROWS  # of Outcome.error


@dataclass
class AttentionRead:
    """Which attention to read out of a running graph.

    layers: ascending. Of an encoder, whose graph names no layer outputs, indices over its attention operations.
    rows: query rows as (first, count, step) within the rows of the decode; count -1 runs to the end.
    reduce: 0 keeps (n_heads, n_rows, n_columns); MEAN_HEADS, MEAN_ROWS or MEAN_ALL average over those axes.
    max_columns: upper bound on the attended positions (KV cells, or encoder rows).
    max_rows, max_heads: upper bounds, used only for the axes that are kept.
    """

    layers: list[int]
    max_columns: int
    rows: tuple[int, int, int] = (0, -1, 1)
    reduce: int = MEAN_ALL
    max_rows: int = 1
    max_heads: int = 1
    n_threads: int = 1


@dataclass
class KeepRows:
    """Rows that stay in a running vision encoder from one of its layers on; the others leave the graph.

    layer: rows leave the hidden state that enters it.
    rows: (n,) int32, rows of the encoder's sequence, each at most once, in the order that they get.
    rehearsal: what `Plan(count_only=True, keep=...)` with as many rows brought back. None: this is that plan.
    """

    layer: int
    rows: np.ndarray
    rehearsal: Outcome | None = None


@dataclass
class Compare:
    """Whether an input of a graph looks like one of an earlier graph. If so, nothing is computed from it.

    name: of the input.
    known: (n, SAMPLE_BYTES) uint8, `Outcome.sample` of each earlier one.
    """

    name: str
    known: np.ndarray


@dataclass
class Plan:
    """One decode or encode; see `se_plan` in csrc/star_edge.h. Arrays are C-contiguous and of the dtype given there."""

    n_rows: int = 0
    window: tuple[int, int, int] | None = None  # (first, last, n_layers)
    inject: np.ndarray | None = None  # (n_rows, n_embd) float32
    hidden: np.ndarray | None = None  # out: (n_rows, n_embd) float32
    positions: np.ndarray | None = None  # (n_rows,) or (4, n_rows) int32
    want_cells: bool = False
    only_cells: bool = False  # a plain decode: the outcome says nothing else
    attention: AttentionRead | None = None
    count_only: bool = False  # nothing is computed: what the graph is like is learned from it
    keep: KeepRows | None = None
    encoder: bool = False  # the graph is a vision encoder's
    extra_layers: Sequence[int] = ()  # further layers whose hidden states are given or taken
    extra_inject: np.ndarray | None = None  # (len(extra_layers), n_rows, n_embd) float32
    extra_hidden: np.ndarray | None = None  # out: the same
    source: tuple[str, int] | None = None  # name of a node, and which of its sources is replaced or taken
    source_in: np.ndarray | None = None
    source_out: np.ndarray | None = None
    compare: Compare | None = None


@dataclass
class Outcome:
    """What a plan brought back."""

    cells: np.ndarray | None = None  # (n_rows,) int64
    attention: list[np.ndarray] = field(default_factory=list)  # one array for each layer of the read
    n_attention: int = 0
    last_unmasked: int = -1
    attention_layers: list[int] = field(default_factory=list)  # layers whose attention was seen
    has_rope: bool = False  # a ROPE of the batch's positions was seen
    concat: int = lib.SE_CONCAT_NONE  # where the leaf of `find_concat` stands
    n_skipped: int = 0
    stopped: bool = False
    flash: bool = False
    score_seconds: float = 0.0
    n_nodes: int = 0  # nodes of the graph that were seen
    keep_node: int = 0  # which of them rows left at, from 1 on
    n_rows: int = 0  # rows of the hidden state there, before they left
    n_out: int = 0  # rows of the last node, with the rows that stay: image tokens that the encoder has made
    sample: np.ndarray | None = None  # of the input that is compared, (SAMPLE_BYTES,) uint8
    known: int | None = None  # which of the known ones has that sample; then nothing was computed
    error: int = 0


@dataclass(frozen=True)
class Traffic:
    """What a tap cost the backend (docs/gpu.md). An idle tap counts nothing.

    Attributes:
        n_asked: Nodes that it was asked about while it was at work.
        n_stops: Nodes at which it had the backend finish and wait.
        n_reads: Reads of tensors' memory. On a GPU each is a copy that is waited for.
        n_writes: Writes, likewise.
        read_bytes: What was read.
        written_bytes: What was written.
    """

    n_asked: int
    n_stops: int
    n_reads: int
    n_writes: int
    read_bytes: int
    written_bytes: int


class Tap:
    """One `se_tap`. Not thread-safe, as the context that it belongs to is not."""

    def __init__(self) -> None:
        self._tap = lib.se_tap_new()
        if self._tap == ffi.NULL:
            raise MemoryError("no memory for the tap")
        self._bias: np.ndarray | None = None

    @property
    def user_data(self) -> int:
        """Address to give as cb_eval_user_data."""
        return int(ffi.cast("uintptr_t", self._tap))

    @property
    def callback(self) -> int:
        """Address to give as cb_eval."""
        return int(lib.se_tap_callback_address())

    def close(self) -> None:
        """Frees the tap. The context that it was given to must be gone."""
        if self._tap != ffi.NULL:
            lib.se_tap_free(self._tap)
            self._tap = ffi.NULL

    @contextmanager
    def armed(self, plan: Plan, what: str) -> Iterator[Outcome]:
        """Covers one decode or encode. The outcome is filled in when the block ends.

        Raises:
            EngineError: the plan is unusable, or something failed inside the callback. `outcome.error` is its code, and
                the counts of what was seen are there.
        """
        outcome = Outcome()
        keep: list[object] = []  # what the C plan points to must live until finish

        def pointer(array: np.ndarray | None, ctype: str, dtype: type) -> object:
            if array is None:
                return ffi.NULL
            if array.dtype != dtype or not array.flags.c_contiguous:
                raise EngineError(f"{what}: an array of the plan is not contiguous {np.dtype(dtype)}")
            keep.append(array)
            return ffi.cast(f"{ctype} *", array.ctypes.data)

        c = ffi.new("se_plan *")
        c.n_rows, c.count_only = plan.n_rows, plan.count_only
        if plan.window is not None:
            c.first, c.last, c.n_layer = plan.window
        hidden = plan.inject if plan.inject is not None else plan.hidden
        for array in (plan.inject, plan.hidden):
            if array is not None and hidden is not None and array.shape != (plan.n_rows, hidden.shape[1]):
                raise EngineError(f"{what}: hidden states have shape {array.shape} for {plan.n_rows} rows")
        c.n_embd = 0 if hidden is None else hidden.shape[1]
        c.inject = pointer(plan.inject, "float", np.float32)
        c.hidden = pointer(plan.hidden, "float", np.float32)
        if plan.positions is not None:
            c.n_pos_per_row = 1 if plan.positions.ndim == 1 else plan.positions.shape[0]
            if plan.positions.shape[-1] != plan.n_rows:
                raise EngineError(f"{what}: positions have shape {plan.positions.shape} for {plan.n_rows} rows")
        c.positions = pointer(plan.positions, "int32_t", np.int32)
        if plan.want_cells:
            outcome.cells = np.full(plan.n_rows, -1, np.int64)
            c.cells = pointer(outcome.cells, "int64_t", np.int64)
        c.only_cells = plan.only_cells and plan.positions is None
        if plan.keep is not None:
            c.keep, c.n_keep = pointer(plan.keep.rows, "int32_t", np.int32), len(plan.keep.rows)
            c.keep_layer = plan.keep.layer
            if plan.keep.rehearsal is not None:
                c.keep_node, c.n_nodes = plan.keep.rehearsal.keep_node, plan.keep.rehearsal.n_nodes
        c.encoder = plan.encoder
        if plan.extra_layers:
            extra = np.asarray(plan.extra_layers, np.int32)
            c.extra_layers, c.n_extra = pointer(extra, "int32_t", np.int32), len(extra)
            for array in (plan.extra_inject, plan.extra_hidden):
                if array is not None and (hidden is None or array.shape != (len(extra), *hidden.shape)):
                    raise EngineError(f"{what}: hidden states of further layers have shape {array.shape}")
            c.extra_inject = pointer(plan.extra_inject, "float", np.float32)
            c.extra_hidden = pointer(plan.extra_hidden, "float", np.float32)
        if plan.source is not None:
            node = ffi.new("char[]", plan.source[0].encode())
            keep.append(node)
            c.source_node, c.source = node, plan.source[1]
            c.source_in = pointer(plan.source_in, "float", np.float32)
            c.source_out = pointer(plan.source_out, "float", np.float32)
            array = plan.source_in if plan.source_in is not None else plan.source_out
            c.source_bytes = 0 if array is None else array.nbytes
        sample = np.zeros(0 if plan.compare is None else SAMPLE_BYTES, np.uint8)
        if plan.compare is not None:
            name = ffi.new("char[]", plan.compare.name.encode())
            keep.append(name)
            c.compare_input, c.sample = name, pointer(sample, "uint8_t", np.uint8)
            c.known, c.n_known = pointer(plan.compare.known, "uint8_t", np.uint8), len(plan.compare.known)
            if plan.compare.known.shape != (c.n_known, SAMPLE_BYTES):
                raise EngineError(f"{what}: samples have shape {plan.compare.known.shape}")
        read = plan.attention
        buffer = None
        if read is not None:
            layers = np.asarray(read.layers, np.int32)
            block = read.max_columns
            block *= 1 if read.reduce & MEAN_HEADS else read.max_heads
            block *= 1 if read.reduce & MEAN_ROWS else read.max_rows
            buffer = np.empty((len(layers), block), np.float32)
            c.attn_layers, c.n_attn_layers = pointer(layers, "int32_t", np.int32), len(layers)
            c.row_first, c.row_count, c.row_step = read.rows
            c.reduce, c.n_threads = read.reduce, read.n_threads
            c.attn, c.attn_block = pointer(buffer, "float", np.float32), block
            n_columns = np.zeros(len(layers), np.int32)
            c.attn_n_kv = pointer(n_columns, "int32_t", np.int32)

        result = ffi.new("se_result *")
        # Inside the try from the start: an interrupt must not leave the tap armed.
        try:
            check(lib.se_tap_arm(self._tap, c), what)
            yield outcome
        finally:
            outcome.error = lib.se_tap_finish(self._tap, result)
            outcome.n_attention, outcome.last_unmasked = result.n_attention, result.last_unmasked
            outcome.concat, outcome.has_rope = result.concat, bool(result.rope)
            bits = [int(word) for word in result.attention_layers]
            outcome.attention_layers = [64 * w + b for w, word in enumerate(bits) for b in range(64) if word >> b & 1]
            outcome.n_skipped, outcome.stopped, outcome.flash = (
                result.n_skipped,
                bool(result.stopped),
                bool(result.flash),
            )
            outcome.score_seconds = result.score_seconds
            outcome.n_nodes, outcome.keep_node = result.n_nodes, result.keep_node
            outcome.n_rows, outcome.n_out = result.n_rows, result.n_out
            outcome.sample = sample if result.sampled else None
            outcome.known = result.known - 1 if result.known else None
        check(outcome.error, what)
        if read is not None:
            assert buffer is not None
            shape = () if read.reduce & MEAN_ROWS else (result.attn_rows,)
            shape = shape if read.reduce & MEAN_HEADS else (result.attn_heads, *shape)
            outcome.attention = [
                line[: int(np.prod(shape)) * n].reshape(*shape, n) for line, n in zip(buffer, n_columns) if n
            ]

    def take_traffic(self) -> Traffic:
        """The traffic since the last call."""
        c = ffi.new("se_traffic *")
        lib.se_tap_take_traffic(self._tap, c)
        return Traffic(c.n_asked, c.n_stops, c.n_reads, c.n_writes, c.read_bytes, c.written_bytes)

    # ---- lasting settings ----

    def begin(self) -> None:
        """Call before every plain decode."""
        lib.se_tap_begin(self._tap)

    def check(self) -> None:
        """Raises EngineError if a shift, a bias or an input could not be applied in a plain decode since the last
        call.
        """
        check(lib.se_tap_take_error(self._tap), "plain decode")

    def set_position_shift(self, start: int, offset: int) -> None:
        """RoPE positions >= start get `offset` added in plain decodes; 0 turns it off."""
        check(lib.se_tap_set_position_shift(self._tap, start, offset), "position shift")

    def set_layer_out(self, name: str | None) -> None:
        """What the graph calls the output of a layer; None: as most graphs do."""
        check(lib.se_tap_set_layer_out(self._tap, ffi.NULL if name is None else name.encode()), "layer output")

    def set_cell_bias(self, bias: np.ndarray | None) -> None:
        """Adds bias (n_cells,) float32 to the attention mask in every decode: exp(bias) is how much a KV cell counts.

        -inf hides a cell from all rows. None turns it off.
        """
        self._bias = bias
        if bias is None:
            check(lib.se_tap_set_cell_bias(self._tap, ffi.NULL, 0), "cell bias")
        else:
            values = np.ascontiguousarray(bias, np.float32)
            check(
                lib.se_tap_set_cell_bias(self._tap, ffi.cast("float *", values.ctypes.data), len(values)), "cell bias"
            )

    def unhide_cells(self) -> None:
        """Cells that the bias hides have been freed: others may come there."""
        if self._bias is not None and np.isneginf(self._bias).any():
            bias = np.where(np.isneginf(self._bias), 0, self._bias).astype(np.float32)
            self.set_cell_bias(bias if bias.any() else None)

    def set_levels(self, layers: Sequence[int], bias: np.ndarray, witness: np.ndarray) -> None:
        """What rows of plain decodes see of a prompt's cells, by layer, in place of the cell bias.

        Args:
            layers: First layer of each level, ascending, the first 0.
            bias: (n_levels, n_cells) float32, added to the attention mask in the layers of each level; -inf hides.
            witness: (n_cells,) int32. A cell is seen where the cell `witness` is: one that llama.cpp itself hides,
                because it is in no sequence of the rows. -1: where llama.cpp's mask lets it.
        """
        firsts = np.ascontiguousarray(layers, np.int32)
        values, seen_with = np.ascontiguousarray(bias, np.float32), np.ascontiguousarray(witness, np.int32)
        pointers = [ffi.cast("int32_t *", a.ctypes.data) for a in (firsts, seen_with)]
        check(
            lib.se_tap_set_levels(
                self._tap,
                pointers[0],
                len(firsts),
                ffi.cast("float *", values.ctypes.data),
                pointers[1],
                len(seen_with),
            ),
            "levels",
        )

    def forget_levels(self) -> None:
        """The cell bias holds again."""
        check(lib.se_tap_set_levels(self._tap, ffi.NULL, 0, ffi.NULL, ffi.NULL, 0), "levels")

    def set_input(self, name: str, data: np.ndarray | None) -> None:
        """Replaces the graph input `name` by the bytes of `data` before its first consumer runs; None turns it off."""
        if data is None:
            check(lib.se_tap_set_input(self._tap, name.encode(), ffi.NULL, 0), f"input {name}")
        else:
            values = np.ascontiguousarray(data)
            check(
                lib.se_tap_set_input(self._tap, name.encode(), ffi.cast("void *", values.ctypes.data), values.nbytes),
                f"input {name}",
            )

    def find_concat(self, leaf: str | None) -> None:
        """Finds out at which end the tensor `leaf` is concatenated: `Outcome.concat` of each graph; None turns it
        off.
        """
        check(
            lib.se_tap_find_concat(self._tap, ffi.NULL if leaf is None else leaf.encode()), f"concatenation of {leaf}"
        )

    @contextmanager
    def watching(self, name: str, out: np.ndarray) -> Iterator[None]:
        """Copies the graph input `name` into `out` while a graph runs. `watched()` tells how many bytes came."""
        check(
            lib.se_tap_watch_input(self._tap, name.encode(), ffi.cast("void *", out.ctypes.data), out.nbytes),
            f"input {name}",
        )
        try:
            yield
        finally:
            self._watched = int(lib.se_tap_watched_bytes(self._tap))
            lib.se_tap_watch_input(self._tap, ffi.NULL, ffi.NULL, 0)

    def watched(self) -> int:
        """Bytes of the last watched input that were seen, 0 if the graph has no such input."""
        return self._watched
