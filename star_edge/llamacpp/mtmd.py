"""libmtmd: splits a prompt into chunks, and encodes its images. Returns Python types; handles stay inside.

Only libmtmd's log says why something failed, so it is kept for the calling thread (csrc/log.c).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import llama_cpp
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
from llama_cpp import Llama

from ..errors import ImageError, ModelFileError, ModelMismatchError, PromptError
from .native import ffi, lib
from .tap import Tap

MEDIA_MARKER = mtmd.mtmd_default_marker().decode()

_log_callback = ctypes.cast(lib.se_log_callback_address(), llama_cpp.llama_log_callback)
mtmd.mtmd_log_set(_log_callback, None)
mtmd.mtmd_helper_log_set(_log_callback, None)


def logged() -> str:
    """libmtmd's warnings and errors since the log was cleared, in one line."""
    return " ".join(ffi.string(lib.se_log_text()).decode("utf-8", "replace").split())[:200]


def clear_log() -> None:
    lib.se_log_clear()


def unprepared(status: int) -> ImageError:
    """The error for a status of mtmd_tokenize other than 0: it cannot scale or cut an image."""
    reason = logged().removeprefix("mtmd_tokenize: error: ")
    return ImageError(
        f"an image has a shape that the model cannot have ({reason or f'code {status}'})",
        "crop it, or pad it to be less narrow",
    )


def load_error(path: str) -> ModelMismatchError | ModelFileError:
    """The error for an mmproj file that could not be loaded, from the log."""
    reason = logged()
    if "mismatch" in reason or "n_embd" in reason:
        return ModelMismatchError(
            f"{path} does not belong to this text model ({reason})", "use the mmproj file that was made for it"
        )
    return ModelFileError(
        f"{path} cannot be loaded ({reason or 'no reason given'})",
        "use a llama.cpp that supports the model, or download it again",
    )


@dataclass
class RawImage:
    """An image chunk as libmtmd has it.

    handle: for `Mtmd.encode`. positions: relative to the chunk's first, (n_tokens,) int32, or (4, n_tokens) for M-RoPE
        (t, y, x, 0). moves: what is added to them for each position that the chunk starts later, of their shape.
        nx, ny: columns and rows of tokens, where libmtmd says them. size: (height, width) in pixels of what the encoder
        gets, or None. name: of its bitmap.
    """

    handle: object
    n_tokens: int
    positions: np.ndarray
    moves: np.ndarray
    n_positions: int
    nx: int
    ny: int
    size: tuple[int, int] | None
    causal: bool
    name: str


class Mtmd:
    """An mmproj file, loaded beside its text model.

    tap: gets the callback of its graphs, and must outlive it.
    """

    def __init__(self, llama: Llama, tap: Tap, *, flash_attn: bool, use_gpu: bool, min_tokens: int, max_tokens: int):
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = use_gpu
        params.print_timings = False
        params.n_threads = llama.n_threads_batch
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.image_min_tokens, params.image_max_tokens = min_tokens, max_tokens
        params.cb_eval = ctypes.cast(tap.callback, llama_cpp.ggml_backend_sched_eval_callback)
        params.cb_eval_user_data = tap.user_data
        self._params, self._llama = params, llama
        self.handle: object | None = None
        self.n_embd_inp = llama_cpp.llama_model_n_embd_inp(llama.model)
        self.mrope = False

    def load(self, path: str) -> bool:
        """Loads a file. False: it cannot be loaded, and the log says why."""
        clear_log()
        self.handle = mtmd.mtmd_init_from_file(os.fsencode(path), self._llama.model, self._params)
        if self.handle is None:
            return False
        self.mrope = bool(mtmd.mtmd_decode_use_mrope(self.handle))
        return True

    @property
    def has_vision(self) -> bool:
        return bool(mtmd.mtmd_support_vision(self.handle))

    def close(self) -> None:
        if self.handle is not None:
            mtmd.mtmd_free(self.handle)
            self.handle = None

    # ---- prompt ----

    def tokenize(self, text: str, images: Sequence[np.ndarray], names: Sequence[str]) -> object:
        """The handle of a prompt's chunks, for `chunks` and `free_chunks`. names: one for each image.

        Raises:
            ImageError: an image of a shape that the encoder cannot have.
        """
        data = text.encode()
        inner = mtmd.mtmd_input_text(text=data, text_len=len(data), add_special=True, parse_special=True)
        handle = mtmd.mtmd_input_chunks_init()
        bitmaps: list[Any] = [make_bitmap(image, name) for image, name in zip(images, names)]
        try:
            array = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
            clear_log()
            name_joined(bitmaps)
            status = mtmd.mtmd_tokenize(self.handle, handle, ctypes.byref(inner), array, len(bitmaps))
            if status:
                raise unprepared(status)
        except BaseException:
            free_chunks(handle)
            raise
        finally:
            for bitmap in bitmaps:
                mtmd.mtmd_bitmap_free(bitmap)
        return handle

    def chunks(self, handle: object) -> list[np.ndarray | RawImage]:
        """Token ids, (n,) int32, of each run of text, and the images, in order. The handle must outlive the latter.

        Raises:
            PromptError: audio.
        """
        n = mtmd.mtmd_input_chunks_size(handle)
        return [self._chunk(mtmd.mtmd_input_chunks_get(handle, i)) for i in range(n)]

    def _positions(self, image: object, n: int, start: int) -> np.ndarray:
        """RoPE positions of an image's n tokens, if the first is at `start`."""
        raw = (mtmd.mtmd_decoder_pos * n)()
        mtmd.mtmd_helper_image_get_decoder_pos(image, start, raw)
        txyz: np.ndarray = np.frombuffer(memoryview(raw), np.uint32).reshape(n, 4).astype(np.int32)
        # set_position_mrope_2d: t, y, x, z
        positions: np.ndarray = txyz[:, [0, 2, 1, 3]].T if self.mrope else txyz[:, 0]
        return positions.copy()

    def _chunk(self, chunk: object) -> np.ndarray | RawImage:
        kind = mtmd.mtmd_input_chunk_get_type(chunk)
        if kind == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
            count = ctypes.c_size_t()
            tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            n = count.value
            return np.ctypeslib.as_array(tokens, (n,)).astype(np.int32) if n else np.empty(0, np.int32)
        if kind != mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            raise PromptError("the prompt has a chunk that is neither text nor image", "audio is not supported")
        n = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        image = mtmd.mtmd_input_chunk_get_tokens_image(chunk)
        positions = self._positions(image, n, 0)
        return RawImage(
            chunk,
            n,
            positions,
            self._positions(image, n, 1) - positions,
            mtmd.mtmd_input_chunk_get_n_pos(chunk),
            mtmd.mtmd_image_tokens_get_nx(image),
            mtmd.mtmd_image_tokens_get_ny(image),
            _image_size(chunk),
            not mtmd.mtmd_decode_use_non_causal(self.handle, chunk),
            (mtmd.mtmd_input_chunk_get_id(chunk) or b"").decode(),
        )

    # ---- encode ----

    def encode(self, image: object) -> str:
        """Runs the encoder and the projector on the handle of an image. Returns why that failed, or ""."""
        clear_log()
        status = mtmd.mtmd_encode_chunk(self.handle, image)
        return (logged() or f"code {status}") if status else ""

    def output(self, n_tokens: int) -> np.ndarray:
        """What `encode` has made, (n_tokens, n_embd_inp) float32: a view of libmtmd's memory, valid until the next."""
        pointer = mtmd.mtmd_get_output_embd(self.handle)
        return np.ctypeslib.as_array(pointer, (n_tokens, self.n_embd_inp))


def make_bitmap(image: np.ndarray, name: str) -> object:
    """A bitmap of (h, w, 3) uint8, C-contiguous. Its chunks get the name. The caller frees it."""
    pixels = image.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap = mtmd.mtmd_bitmap_init(image.shape[1], image.shape[0], pixels)
    mtmd.mtmd_bitmap_set_id(bitmap, name.encode())
    return bitmap


def name_joined(bitmaps: Sequence[object]) -> None:
    """Gives bitmaps that libmtmd may join the names of both. Call it before mtmd_tokenize.

    Before llama-cpp-python 0.3.36, libmtmd takes adjacent bitmaps of one size for frames of a video if the encoder has
    such frames (mtmd_bitmap::can_merge_with). Their chunk has only the name of the first. What they are joined with is
    unknown if the second has no more than a number (VisionEncoder.bitmap_name).
    """
    if hasattr(mtmd, "mtmd_bitmap_set_mergeable"):  # bitmaps stay apart unless it is called
        return

    def size(bitmap: Any) -> tuple[int, int]:
        return mtmd.mtmd_bitmap_get_nx(bitmap), mtmd.mtmd_bitmap_get_ny(bitmap)

    for bitmap, following in pairwise(bitmaps):
        if size(bitmap) == size(following):
            names = [mtmd.mtmd_bitmap_get_id(b) or b"" for b in (bitmap, following)]
            content = names[1].partition(b":")[2]
            if content:
                mtmd.mtmd_bitmap_set_id(bitmap, names[0] + b"+" + content)


def names_alone(names: Sequence[str]) -> list[str]:
    """Names of the chunks that mtmd_tokenize has made: without the second's where it has a chunk of its own."""
    numbers = {name.partition(":")[0] for name in names}

    def alone(name: str) -> str:
        number, _, content = name.partition(":")
        own, joined, _ = content.partition("+")
        return f"{number}:{own}" if joined and number.isdigit() and str(int(number) + 1) in numbers else name

    return [alone(name) for name in names]


def free_chunks(handle: object) -> None:
    mtmd.mtmd_input_chunks_free(handle)


# MTMD_SERIALIZATION_VERSION of llama-cpp-python 0.3.35 and 0.3.36
_SAVED_VERSIONS = (1, 2)


def _image_size(chunk: object) -> tuple[int, int] | None:
    """(height, width) in pixels of what the encoder gets for an image, or None.

    libmtmd tells it only where a chunk is saved without its pixels (mtmd_input_chunk_save): in both formats that are
    known here there stand at the end the last image's width and height, int32, and a byte that says that there is no
    audio.
    """
    n = ctypes.c_size_t()
    mtmd.mtmd_input_chunk_save(chunk, None, 0, ctypes.byref(n))
    buffer = (ctypes.c_char * n.value)()
    if mtmd.mtmd_input_chunk_save(chunk, buffer, n.value, ctypes.byref(n)) or n.value < 17:
        return None
    data = bytes(buffer)
    version, ended = int.from_bytes(data[:8], "little"), data[n.value - 1] == 0
    width, height = (int(v) for v in np.frombuffer(data, "<i4", 2, n.value - 9))
    return (height, width) if version in _SAVED_VERSIONS and ended and min(width, height) > 0 else None
