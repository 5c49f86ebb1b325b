"""What is taken for granted of libmtmd: chunks, positions, sizes, its log, and the graphs of its encoders."""

import ctypes

import llama_cpp
import llama_cpp.mtmd_cpp as mtmd
import numpy as np
import pytest
from helpers import ggml_tensors as ggml
from helpers import stock
from helpers.families import FOLDER, IS_0_3_35
from helpers.models import CLIP, random_image
from helpers.reference import load_tensors
from PIL import Image

IMAGE = random_image(1, 112, 112)
WIDE = random_image(2, 112, 168)
TEXT = mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT


def leaves(nodes, op):
    """Names of the leaves that nodes of an operation read."""
    return {s.name for node in nodes if node.op == op for s in node.sources if s is not None and s.op == "NONE"}


# ---- chunks ----


def test_the_marker_is_one_piece_of_text_that_is_replaced_by_one_image(encoders):
    marker = mtmd.mtmd_default_marker().decode()
    chunks = encoders("llama").tokenize(IMAGE, text=f"before {marker} after")
    kinds = [mtmd.mtmd_input_chunk_get_type(c) for c in chunks]
    assert kinds == [TEXT, mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE, TEXT]


def test_chunks_of_a_picture_have_the_id_of_its_bitmap(encoders):
    (chunk,) = encoders("llama").images(IMAGE, name=b"7:abc")
    assert mtmd.mtmd_input_chunk_get_id(chunk) == b"7:abc"


def test_tokens_of_a_text_chunk_are_int32_ids(encoders):
    chunk = encoders("llama").tokenize(IMAGE, text="hello " + mtmd.mtmd_default_marker().decode())[0]
    n = ctypes.c_size_t()
    tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
    assert n.value > 0 and n.value == mtmd.mtmd_input_chunk_get_n_tokens(chunk)
    assert all(0 <= tokens[i] < 512 for i in range(n.value))


def decoder_positions(chunk):
    """(n, 4) uint32 as mtmd_helper_image_get_decoder_pos writes them."""
    n = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
    raw = (mtmd.mtmd_decoder_pos * n)()
    mtmd.mtmd_helper_image_get_decoder_pos(mtmd.mtmd_input_chunk_get_tokens_image(chunk), 0, raw)
    return np.frombuffer(raw, np.uint32).reshape(n, 4)


def test_mtmd_decoder_pos_has_the_columns_t_x_y_z(encoders):
    (chunk,) = encoders("qwen2vl").images(WIDE)
    image = mtmd.mtmd_input_chunk_get_tokens_image(chunk)
    nx, ny = mtmd.mtmd_image_tokens_get_nx(image), mtmd.mtmd_image_tokens_get_ny(image)
    assert nx > ny
    i = np.arange(nx * ny)
    assert np.array_equal(decoder_positions(chunk), np.stack([0 * i, i % nx, i // nx, 0 * i], axis=1))
    assert [name for name, _ in mtmd.mtmd_decoder_pos._fields_][:3] == ["t", "x", "y"]


def test_an_image_takes_as_many_positions_as_its_longer_side_with_m_rope_and_else_one_a_token(encoders):
    (chunk,) = encoders("qwen2vl").images(WIDE)
    image = mtmd.mtmd_input_chunk_get_tokens_image(chunk)
    sides = mtmd.mtmd_image_tokens_get_nx(image), mtmd.mtmd_image_tokens_get_ny(image)
    assert mtmd.mtmd_input_chunk_get_n_pos(chunk) == max(sides)
    (chunk,) = encoders("llama").images(WIDE)
    n = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
    assert mtmd.mtmd_input_chunk_get_n_pos(chunk) == n
    assert np.array_equal(decoder_positions(chunk)[:, 0], np.arange(n))


def test_without_m_rope_a_square_image_has_n_tokens_by_one(encoders):
    (chunk,) = encoders("llama").images(IMAGE)
    image = mtmd.mtmd_input_chunk_get_tokens_image(chunk)
    assert (mtmd.mtmd_image_tokens_get_nx(image), mtmd.mtmd_image_tokens_get_ny(image)) == (49, 1)


def test_a_chunk_saved_without_pixels_has_version_1_or_2_and_ends_with_width_height_and_a_zero_byte(encoders):
    """Where libmtmd tells the size of a preprocessed image."""
    (chunk,) = encoders("pixtral").images(random_image(3, 64, 112))
    n = ctypes.c_size_t()
    mtmd.mtmd_input_chunk_save(chunk, None, 0, ctypes.byref(n))
    data = (ctypes.c_char * n.value)()
    assert mtmd.mtmd_input_chunk_save(chunk, data, n.value, ctypes.byref(n)) == 0
    assert int.from_bytes(data[:8], "little") in (1, 2)
    width, height = np.frombuffer(data, "<i4", 2, n.value - 9)
    assert data[n.value - 1] == b"\0" and (width, height) == (112, 64)


def test_images_of_llava_are_causal_and_m_rope_is_asked_of_the_context(encoders):
    for name, mrope in (("llama", False), ("qwen2vl", True)):
        (chunk,) = encoders(name).images(IMAGE)
        assert not mtmd.mtmd_decode_use_non_causal(encoders(name).ctx, chunk)
        assert mtmd.mtmd_decode_use_mrope(encoders(name).ctx) == mrope


def test_the_output_of_the_encoder_is_n_tokens_rows_of_n_embd_inp_float32(encoders, families):
    encoder = encoders("llama")
    encoder.encode(IMAGE)
    width = families["llama"].shape.n_embd
    rows = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(encoder.ctx), (49, width))
    assert np.isfinite(rows).all() and (np.abs(rows).sum(axis=1) > 0).all()


# ---- pictures that are cut ----


def bilinear(picture, side):
    """A picture as a square, (side, side, 3) uint8: four pixels for each, the corners in place, and no antialiasing."""
    height, width = picture.shape[:2]
    y, x = (np.arange(side, dtype=np.float32) * np.float32((n - 1) / (side - 1)) for n in (height, width))
    y0, x0 = y.astype(int), x.astype(int)
    y1, x1 = np.minimum(y0 + 1, height - 1), np.minimum(x0 + 1, width - 1)
    in_y, in_x = (y - y0)[:, None, None], (x - x0)[None, :, None]
    rows = [picture[i][:, x0] * (1 - in_x) + picture[i][:, x1] * in_x for i in (y0, y1)]
    return np.ascontiguousarray(rows[0] * (1 - in_y) + rows[1] * in_y, np.uint8)


def test_the_overview_of_a_cut_picture_is_what_pillow_shrinks_it_to_and_in_0_3_35_bilinear(encoders):
    """clip_hparams.image_resize_algo_ov (clip-model.h) and img_tool::resize (mtmd-image.cpp). LLaVA-NeXT takes a
    picture of the overview's size as it is, which shows what the overview of a larger one is.
    """
    encoder, side = encoders("llava-next"), 84
    picture = np.random.default_rng(9).integers(0, 256, (2 * side, 2 * side, 3), np.uint8)

    def last(image):
        chunk = encoder.images(image)[-1]
        assert mtmd.mtmd_encode_chunk(encoder.ctx, chunk) == 0
        n = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        return np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(encoder.ctx), (n, encoder.width)).copy()

    shrunk = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
    candidates = [np.asarray(shrunk), bilinear(picture, side)]
    overview = last(picture)
    to_pillow, to_bilinear = (np.abs(last(candidate) - overview).max() for candidate in candidates)
    if IS_0_3_35:
        assert to_bilinear < 0.1 * to_pillow
    else:
        assert to_pillow < 0.1 * to_bilinear


# ---- the log ----


class Log:
    def __init__(self):
        self.lines = []
        kind = llama_cpp.llama_log_callback
        self.callback = kind(lambda level, text, _: self.lines.append(text.decode("utf-8", "replace")))


@pytest.fixture
def log():
    """What libmtmd logs; star_edge's own callback is put back."""
    from star_edge.llamacpp.native import lib

    log, own = Log(), ctypes.cast(lib.se_log_callback_address(), llama_cpp.llama_log_callback)
    mtmd.mtmd_log_set(log.callback, None)
    yield log
    mtmd.mtmd_log_set(own, None)


def test_an_mmproj_file_of_another_width_is_refused_with_mismatch_or_n_embd_in_the_log(families, log):
    llama = stock.load(FOLDER / "llava" / "text.gguf", False, n_ctx=256)
    params = mtmd.mtmd_context_params_default()
    params.use_gpu = False
    context = mtmd.mtmd_init_from_file(str(families["llama"].mmproj).encode(), llama.model, params)
    llama.close()
    assert context is None
    text = " ".join(log.lines)
    assert "mismatch" in text or "n_embd" in text, text


# ---- graphs of encoders ----


def test_an_encoder_has_one_soft_max_for_each_layer_in_order(encoders):
    nodes = encoders("llama").encode(IMAGE)
    places = [i for i, node in enumerate(nodes) if node.op == "SOFT_MAX"]
    assert len(places) == CLIP.n_layers - 1  # clip_graph_llava leaves out the last of a file without feature layers
    rows = (CLIP.image_size // CLIP.patch_size) ** 2 + 1
    assert {nodes[i].ne for i in places} == {(rows, rows, CLIP.n_heads, 1)}


def test_only_window_attention_has_a_mask(encoders):
    nodes = [node for node in encoders("qwen2.5-vl").encode(IMAGE) if node.op == "SOFT_MAX"]
    masks = [node.sources[1].name if node.sources[1] else None for node in nodes]
    assert set(masks) == {"window_mask", None}
    assert all(s.sources[1] is None for s in encoders("llama").encode(IMAGE) if s.op == "SOFT_MAX")


def test_llava_gathers_patches_by_the_input_patches_and_their_embeddings_by_the_input_positions(encoders):
    nodes = encoders("llava").encode(IMAGE)
    gathered = leaves(nodes, "GET_ROWS")
    assert {"patches", "positions", "v.position_embd.weight"} <= gathered, gathered


def test_llava_joins_v_class_embd_in_a_concat_after_the_patches(encoders):
    """Last, as of this version: vision/repair.py puts right what follows from it, and asks the graph itself."""
    (concat,) = (node for node in encoders("llava").encode(IMAGE) if node.op == "CONCAT")
    assert [s.name for s in concat.sources if s is not None][1] == "v.class_embd"


def test_internvl_joins_v_class_embd_through_a_repeat_and_adds_v_position_embd_weight(encoders):
    nodes = encoders("internvl").encode(IMAGE)
    (repeat,) = (node for node in nodes if node.op == "REPEAT")
    (concat,) = (node for node in nodes if node.op == "CONCAT")
    assert repeat.sources[0].name == "v.class_embd" and concat.sources[1].name == repeat.name
    assert "v.position_embd.weight" in leaves(nodes, "ADD")


def test_qwen2_5_vl_puts_its_tokens_in_order_by_the_input_window_idx(encoders):
    nodes = encoders("qwen2.5-vl").encode(IMAGE)
    assert {"window_idx", "inv_window_idx"} <= leaves(nodes, "GET_ROWS")
    assert [n for n in nodes if n.op == "GET_ROWS"][-1].sources[1].name == "window_idx"


def test_pixtral_makes_its_row_ends_from_a_leaf_times_zero(encoders):
    encoder, factors = encoders("pixtral"), []
    (scale,) = (n for n in encoder.encode(IMAGE) if n.op == "SCALE" and n.sources[0].op == "NONE")
    encoder.recorder.on_ask[scale.name] = lambda t: factors.append(np.frombuffer(bytes(t.op_params), np.float32)[0])
    encoder.encode(IMAGE)
    encoder.recorder.on_ask.clear()
    assert not encoder.recorder.errors and factors == [0.0]


def test_inputs_of_clip_may_be_overwritten_before_they_are_read(encoders):
    encoder = encoders("llava")
    nodes = encoder.encode(IMAGE)
    out = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(encoder.ctx), (64, 64)).copy()
    gather = next(n for n in nodes if n.op == "GET_ROWS" and n.sources[1] and n.sources[1].name == "patches")
    index = np.zeros(64, np.int32)

    def overwrite(tensor):
        if tensor.src[1]:
            ggml.set_bytes(tensor.src[1], index.ctypes.data, 0, index.nbytes)

    encoder.recorder.on_ask[gather.name] = overwrite
    encoder.encode(IMAGE)
    encoder.recorder.on_ask.clear()
    changed = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(encoder.ctx), (64, 64)).copy()
    assert not encoder.recorder.errors and (changed == changed[0]).all() and not (out == out[0]).all()


def test_a_llava_file_without_feature_layers_runs_one_layer_less_than_it_says(families, encoders):
    metadata, _ = load_tensors(families["llama"].mmproj)
    nodes = encoders("llama").encode(IMAGE)
    assert len([n for n in nodes if n.op == "SOFT_MAX"]) == metadata["clip.vision.block_count"] - 1
