"""What is taken for granted where rows leave a running encoder (csrc/shrink.c)."""

import re

import llama_cpp.mtmd_cpp as mtmd
import numpy as np
import pytest
from helpers import ggml_tensors as ggml
from helpers.families import FOLDER
from helpers.models import random_image
from helpers.reference import load_tensors

from star_edge.vision.precision import _MATRIX

IMAGE = random_image(1, 112, 112)
INPUT = 1  # GGML_TENSOR_FLAG_INPUT
# the node that enters the first layer
ENTRY = {
    "smolvlm": "pos_embed",
    "gemma3": "pos_embed",
    "internvl": "pos_embed",
    "lfm2-vl": "pos_embed",
    "gemma4": "pos_embd",
    "llava": "pre_ln",
}


@pytest.mark.parametrize("name", ENTRY)
def test_the_hidden_state_of_each_encoder_layer_is_layer_out_n_and_that_before_them_has_a_name(encoders, name):
    metadata, _ = load_tensors(FOLDER / name / "mmproj.gguf")
    nodes = encoders(name).encode(IMAGE)
    names = [node.name for node in nodes]
    n_layers = len([node for node in nodes if node.op == "SOFT_MAX"])
    assert n_layers in (metadata["clip.vision.block_count"], metadata["clip.vision.block_count"] - 1)
    assert [name for name in names if re.fullmatch(r"layer_out-\d+", name)] == [
        f"layer_out-{i}" for i in range(n_layers)
    ]
    assert names.count(ENTRY[name]) == 1 and names.index(ENTRY[name]) < names.index("layer_out-0")
    states = [node for node in nodes if re.fullmatch(rf"layer_out-\d+|{ENTRY[name]}", node.name)]
    assert len({node.ne for node in states}) == 1 and all(node.kind == 0 for node in states)


@pytest.mark.parametrize("name", ENTRY)
def test_the_last_node_of_an_encoder_has_a_row_for_each_image_token(encoders, name):
    """clip_encode ends the process where it has not."""
    encoder = encoders(name)
    (chunk, *_) = encoder.images(IMAGE)
    n = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
    assert encoder.encode(IMAGE)[-1].ne[1] == n


def test_row_numbers_and_positions_are_inputs_of_the_graph_and_weights_are_not(encoders):
    for name, inputs in (("llava", {"patches", "positions"}), ("gemma4", {"pos_x", "pos_y"})):
        encoder, flags = encoders(name), {}
        nodes = encoder.encode(IMAGE)

        def note(tensor, flags=flags):
            for source in tensor.src:
                if source and source.contents.op == 0:
                    flags[source.contents.name.decode()] = source.contents.flags

        for node in nodes:
            encoder.recorder.on_ask[node.name] = note
        encoder.encode(IMAGE)
        encoder.recorder.on_ask.clear()
        assert not encoder.recorder.errors
        assert {leaf for leaf, flag in flags.items() if flag & INPUT} >= inputs
        assert not any(flag & INPUT for leaf, flag in flags.items() if leaf.endswith(".weight"))


def test_a_shape_that_is_changed_in_one_encode_is_gone_in_the_next(encoders):
    """clip_encode builds its graph anew each time."""
    encoder, seen = encoders("gemma3"), []

    def change(tensor):  # the stride of a dimension of length 1, which nothing reads
        assert tensor.ne[3] == 1
        seen.append(tensor.nb[3])
        tensor.nb[3] += 4

    encoder.recorder.on_done["layer_out-1"] = change
    for _ in range(3):
        encoder.encode(IMAGE)
    encoder.recorder.on_done.clear()
    assert not encoder.recorder.errors and len(seen) == 3 and len(set(seen)) == 1


def test_a_backend_reads_shapes_when_it_computes(encoders):
    """A node and its operands that are made shorter while it is asked about are computed as far as they go."""
    encoder, made = encoders("gemma3"), {}
    node = next(node for node in encoder.encode(IMAGE) if node.name == "ffn_inp-1")
    assert node.op == "ADD"
    width, length = node.ne[:2]

    def set_rows(tensor, n):
        for t in (tensor, *(source.contents for source in tensor.src[:2])):
            t.ne[1] = n

    def note(which, shorter):
        def done(tensor):
            set_rows(tensor, length)
            out = np.empty((length, width), np.float32)
            ggml.get_bytes(tensor, out.ctypes.data, 0, out.nbytes)
            made[which] = out

        encoder.recorder.on_ask[node.name] = lambda tensor: set_rows(tensor, shorter)
        encoder.recorder.on_done[node.name] = done
        encoder.encode(IMAGE)

    note("all", length)
    note("two", 2)
    encoder.recorder.on_ask.clear()
    encoder.recorder.on_done.clear()
    assert not encoder.recorder.errors
    assert np.array_equal(made["all"][:2], made["two"][:2]) and not np.array_equal(made["all"][2:], made["two"][2:])


@pytest.mark.parametrize("name", [f.name for f in sorted(FOLDER.iterdir()) if (f / "mmproj.gguf").is_file()])
def test_matrices_of_layers_are_multiplied_and_nothing_else(encoders, name):
    """What star_edge/vision/precision.py converts: any type that ggml multiplies by will do there."""
    encoder, image = encoders(name), random_image(2, 64, 64)
    used = {}
    for node in encoder.encode(image):
        for i, source in enumerate(node.sources):
            if source is not None and _MATRIX.fullmatch(source.name):
                used.setdefault(source.name, set()).add((node.op, i))
    assert bool(used) == (name != "gemma4-unified")  # which has no layers
    assert all(readers == {("MUL_MAT", 0)} for readers in used.values())
