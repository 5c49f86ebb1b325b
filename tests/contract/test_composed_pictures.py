"""What is taken for granted where a picture is composed of units (star_edge/vision/composed.py, window.py)."""

import numpy as np
import pytest
from helpers.families import FOLDER
from helpers.models import random_image
from helpers.reference import load_tensors

IMAGE = random_image(1, 168, 224)
F32, I32 = 0, 26
# Leaves whose values depend on the place of a patch, besides the pixels
PLACES = {
    "qwen2-vl": {"positions"},
    "qwen2.5-vl": {"positions", "window_mask", "inv_window_idx", "window_idx"},
    "qwen3-vl": {"positions"},
    "pixtral": {"pos_h", "pos_w"},
    "mistral3": {"pos_h", "pos_w"},
    "glm4.1v": {"positions"},
    "paddleocr-vl": {"positions"},
}


@pytest.fixture(scope="module", params=PLACES)
def family(request):
    return request.param


@pytest.fixture
def nodes(encoders, family):
    return encoders(family).encode(IMAGE)


def leaves(nodes, tensors):
    """Names of the inputs that nodes read: leaves that are no weights. ggml names those that have none leaf_N."""
    found = {s.name for node in nodes for s in node.sources if s is not None and s.op == "NONE"}
    return {name for name in found if name not in tensors and not name.startswith("leaf_")}


def test_pixels_and_places_are_all_inputs(nodes, family):
    _, tensors = load_tensors(FOLDER / family / "mmproj.gguf")
    known = leaves(nodes, tensors)
    assert {name for name in known if "#" not in name} == {"inp_raw", *PLACES[family]}


def test_each_layer_ends_in_layer_out_n(nodes, family):
    metadata, _ = load_tensors(FOLDER / family / "mmproj.gguf")
    n_layers = metadata["clip.vision.block_count"]
    states = [node for node in nodes if node.name.startswith("layer_out-") and node.name[10:].isdigit()]
    assert [node.name for node in states] == [f"layer_out-{i}" for i in range(n_layers)]
    assert len({node.ne for node in states}) == 1 and all(node.kind == F32 for node in states)
    assert len([node for node in nodes if node.op == "SOFT_MAX"]) == n_layers  # attention i is layer i


def test_a_later_layer_reads_the_last_one_alone(nodes, family):
    """And the encoder's end reads what DeepStack names, of nothing before it."""
    metadata, _ = load_tensors(FOLDER / family / "mmproj.gguf")
    planes = {i for i, flag in enumerate(metadata.get("clip.vision.is_deepstack_layers", [])) if flag}
    layer, readers = {}, {}
    for node in nodes:  # the layer whose state a node was made of
        sources = [layer[s.name] for s in node.sources if s is not None and s.name in layer]
        if node.name.startswith("layer_out-") and node.name[10:].isdigit():
            layer[node.name] = int(node.name[10:])
        elif sources:
            layer[node.name] = max(sources)
        for s in node.sources:
            if s is not None and s.name.startswith("layer_out-") and s.name[10:].isdigit():
                readers.setdefault(int(s.name[10:]), []).append(node)
    n_layers = metadata["clip.vision.block_count"]
    for il in range(n_layers - 1):
        # the norm and the sum of the next layer, and a view for each plane
        assert len(readers[il]) == 2 + (il in planes), (il, [node.name for node in readers[il]])


def test_qwen3_adds_position_embeddings_that_the_graph_has_computed(encoders):
    (node,) = [node for node in encoders("qwen3-vl").encode(IMAGE) if node.name == "inp_pos_emb"]
    assert node.op == "ADD" and node.sources[1].op == "CONT" and node.kind == F32


@pytest.mark.parametrize("name", ["glm4.1v", "paddleocr-vl"])
def test_others_add_them_under_another_name(encoders, name):
    (node,) = [node for node in encoders(name).encode(IMAGE) if node.name == "pos_embed"]
    assert node.op == "ADD" and node.sources[1].op == "CONT" and node.kind == F32


def test_what_the_encoder_gets_of_a_picture_of_whole_units(encoders, family):
    """(width, height, 3) float32, unscaled: a composed picture keeps its number of units."""
    metadata, _ = load_tensors(FOLDER / family / "mmproj.gguf")
    side = metadata["clip.vision.patch_size"]
    side *= metadata.get("clip.vision.spatial_merge_size", 1) if "pixtral" in metadata["clip.projector_type"] else 2
    least = -(-metadata.get("clip.vision.image_min_pixels", 0) // side**2)
    for rows, columns in ((2, 4), (1, 11), (13, 2)):
        if rows * columns < least:
            continue
        picture = np.full((rows * side, columns * side, 3), 9, np.uint8)
        encoder = encoders(family)
        pixels = {}

        def note(tensor, pixels=pixels):
            for source in tensor.src:
                if source and source.contents.name == b"inp_raw":
                    pixels["ne"] = tuple(source.contents.ne)

        nodes = encoder.encode(picture)
        for node in nodes[:12]:
            encoder.recorder.on_ask[node.name] = note
        encoder.encode(picture)
        encoder.recorder.on_ask.clear()
        assert not encoder.recorder.errors and pixels["ne"][:3] == (columns * side, rows * side, 3)
