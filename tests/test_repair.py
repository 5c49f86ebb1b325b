"""What stock llama.cpp gets wrong with CLIP encoders of LLaVA files, and that it is put right, and only there."""

import json
import os
import shutil
import tempfile
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient
from helpers import bounds
from helpers.families import FOLDER, load_fixtures
from helpers.gguf_files import rewrite
from helpers.models import CLIP, random_image
from helpers.reference import ClipEncoder

from star_edge import PruneConfig, StarChatHandler, StarVLM, refvlm
from star_edge.cli import cli
from star_edge.errors import ConfigError, UnsupportedModelError
from star_edge.llamacpp import mtmd
from star_edge.llamacpp.gguf import copy_with_metadata, read_gguf_info
from star_edge.llamacpp.native import lib
from star_edge.llamacpp.tap import Tap
from star_edge.server.app import make_app
from star_edge.server.settings import Policy
from star_edge.synthetic import write_encoder
from star_edge.vision import encoder as encoder_module
from star_edge.vision import profiles, repair
from star_edge.vision.chunks import ImageChunk

LEGACY = [
    ("clip.has_text_encoder", False),
    ("clip.has_llava_projector", True),
    ("general.description", "image encoder for LLaVA"),
]


@pytest.fixture(scope="module")
def legacy(families, tmp_path_factory):
    """The file as the legacy converter leaves it: with its keys, and without CLIP's last layer."""
    return rewrite(families["llama"].mmproj, tmp_path_factory.mktemp("legacy") / "mmproj.gguf", add=LEGACY)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary files go."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def encode(vlm, image, attention="received"):
    prompt = vlm.tokenize("<__media__>a", [image], chat=False)
    try:
        encoded = vlm.encoder.encode(next(c for c in prompt.chunks if isinstance(c, ImageChunk)), attention)
        encoded.embeddings = encoded.embeddings.copy()
        return encoded
    finally:
        prompt.close()


def load(families, mmproj, **options):
    return StarVLM(families["llama"].text, mmproj, n_ctx=256, n_threads=1, **options)


@pytest.mark.parametrize("flash_attn", [False, True], ids=["no-fa", "fa"])
def test_repaired_features_are_clips_own(families, legacy, flash_attn):
    """Against CLIP in float64: all layers of the file, each patch at its place, no CLS among the tokens."""
    image = random_image(4)
    reference = ClipEncoder(legacy)
    reference.n_layer_run = CLIP.n_layers
    features, attention = reference.encode(image, repaired=True)
    received = reference.received(attention, repaired=True)
    with load(families, legacy, flash_attn=flash_attn) as vlm:
        got = encode(vlm, image)
        assert vlm.encoder.last_outcome.n_attention == CLIP.n_layers
        from_cls = encode(vlm, image, "cls").scores
        _, report = vlm.read_prompt("what?", image, PruneConfig(0.5, 0.25, 2))
        assert (
            len(report.repairs) == 2
            and "25814" in report.repairs[0]
            and "all 4 layers run instead of 3" in report.repairs[1]
        )
        assert report.figures()["repairs"] == report.repairs and not report.notes
        assert vlm.read_prompt("what?")[1].repairs == []
    with load(families, legacy, flash_attn=flash_attn, encoder="stock") as vlm:
        stock = encode(vlm, image)
        _, report = vlm.read_prompt("what?", image, PruneConfig(0.5, 0.25, 2))
        assert report.repairs == [] and vlm.encoder.last_outcome.n_attention == CLIP.n_layers - 1
    assert bounds.are_features(got.embeddings, features)
    assert bounds.cosines(stock.embeddings, features).mean() < 0.9
    share = bounds.share(bounds.relative([(got.embeddings, features)]))
    assert (
        bounds.distance(got.scores, received)
        <= share * received.max()
        < bounds.distance(np.roll(received, 1), received)
    )
    theirs = attention[:, -1].mean(axis=0)[:-1]  # the reference has CLS last; it is no token
    assert bounds.distance(from_cls, theirs) <= share * theirs.max() < bounds.distance(received, theirs)
    assert np.array_equal(got.cells, np.arange(49))
    assert stock.cells.tolist() == [*range(1, 49), -1]


def test_positions_alone(families):
    """A file that says nothing of its converter keeps its number of layers."""
    image = random_image(4)
    reference = ClipEncoder(families["llama"].mmproj)
    with load(families, families["llama"].mmproj) as vlm:
        got = encode(vlm, image)
        assert [r[:21] for r in vlm.encoder.repairs] == ["each patch has its ow"]
    assert bounds.are_features(got.embeddings, reference.encode(image, repaired=True)[0])


def test_marked_file_is_left_alone():
    """The shipped model was trained on stock's layout."""
    image = np.asarray(random_image(2, 168, 168))
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=256, n_threads=1) as vlm:
        got = encode(vlm, image)
        assert vlm.encoder.repairs == []
    assert bounds.are_features(got.embeddings, ClipEncoder(refvlm.MMPROJ).encode(image)[0])
    assert got.cells[-1] == -1


def test_graph_with_cls_elsewhere_is_left_alone(families, legacy, monkeypatch):
    """Only the graph that joins CLS last is changed: here none is found to."""
    image = random_image(4)
    with load(families, legacy, encoder="stock") as vlm:
        stock = encode(vlm, image)
    monkeypatch.setattr(repair, "misses_layer", lambda *_: False)
    monkeypatch.setattr(Tap, "find_concat", lambda tap, _, find=Tap.find_concat: find(tap, "no such tensor"))
    with load(families, legacy) as vlm:
        assert vlm.encoder.repairs == []
        assert np.array_equal(encode(vlm, image).embeddings, stock.embeddings)


def test_where_cls_is_joined_is_learned_when_the_file_is_loaded(families, legacy):
    """Not from the graph that runs, where a backend may put what reads the positions before the CONCAT: there it is not
    looked for here.
    """
    image = random_image(4)
    with load(families, legacy) as vlm:
        assert len(vlm.encoder.repairs) == 2  # before any picture
        right = encode(vlm, image).embeddings
        vlm.encoder.tap.find_concat(None)
        assert np.array_equal(encode(vlm, image).embeddings, right)


def test_graph_with_cls_first_has_other_rows(families, legacy, monkeypatch):
    """With a llama.cpp that joins CLS first, rows 1..N are the patches, and the attention from CLS is that of row 0."""
    image = random_image(4)
    run = encoder_module.VisionEncoder.run

    def fixed(self, *args):
        outcome = run(self, *args)
        if self.last_outcome.concat:
            self.last_outcome.concat = lib.SE_CONCAT_FIRST
            self.profile = self.profile.cls_first or self.profile
        return outcome

    monkeypatch.setattr(encoder_module.VisionEncoder, "run", fixed)
    monkeypatch.setattr(repair, "graph_inputs", lambda *_: {})  # such a llama.cpp would not apply them
    monkeypatch.setattr(repair, "misses_layer", lambda *_: False)
    reference = ClipEncoder(legacy)
    features, attention = reference.encode(image)
    with load(families, legacy) as vlm:
        got = encode(vlm, image, "cls")
        assert vlm.encoder.repairs == []
    assert np.array_equal(got.cells, np.arange(49))
    theirs = attention[:, 0].mean(axis=0)[1:]
    limit = bounds.share(bounds.relative([(got.embeddings, features)])) * theirs.max()
    assert bounds.are_features(got.embeddings, features)
    assert bounds.distance(got.scores, theirs) <= limit < bounds.distance(np.roll(theirs, 1), theirs)


# ---- which files ----

W, D, FL = "clip.vision.embedding_length", "clip.vision.block_count", "clip.vision.feature_layer"


@pytest.mark.parametrize(
    ("values", "tensors", "layer", "positions"),
    [
        ({W: 1024, D: 23, "clip.has_llava_projector": True}, {repair.CLASS_EMBEDDING}, True, True),  # LLaVA-1.5
        ({W: 1024, D: 23}, {repair.CLASS_EMBEDDING}, True, True),
        (
            {W: 1024, D: 24, "clip.has_llava_projector": True},
            {repair.CLASS_EMBEDDING},
            False,
            True,
        ),  # with the layer that stock does not run
        ({W: 1024, D: 23, FL: [23]}, {repair.CLASS_EMBEDDING}, False, True),  # LLaVA-1.6
        ({W: 1152, D: 28, "clip.has_llava_projector": True}, {"v.post_ln.weight"}, False, False),  # Moondream2
        ({W: 1152, D: 26, "clip.has_llava_projector": True}, set(), True, False),  # SigLIP
        ({W: 64, D: 3, "clip.has_llava_projector": True}, {repair.CLASS_EMBEDDING}, True, True),
        ({W: 64, D: 3}, {repair.CLASS_EMBEDDING}, False, True),
        (
            {W: 1024, D: 23, "clip.has_llava_projector": True, repair.LAYOUT_KEY: "stock"},
            {repair.CLASS_EMBEDDING},
            False,
            False,
        ),
    ],
)
@pytest.mark.parametrize("projector", ["mlp", "ldp", "ldpv2", "qwen2vl_merger"])
def test_decision_table(values, tensors, layer, positions, projector):
    keys = profiles.METADATA_KEYS + repair.METADATA_KEYS
    sizes = {"clip.vision.image_size": 336, "clip.vision.patch_size": 14}
    info = encoder_module.GGUFInfo("x", 0, "clip", {k: (values | sizes).get(k) for k in keys}, frozenset(tensors))
    is_llava = projector != "qwen2vl_merger"
    assert repair.misses_layer(info, projector) == (layer and is_llava)
    inputs = repair.graph_inputs(info, projector)
    assert bool(inputs) == (positions and is_llava)
    if inputs:
        assert inputs["positions"].tolist() == [*range(1, 577), 0] and inputs["patches"].tolist() == list(range(576))


def test_position_embeddings_of_internvl(tmp_path):
    """They go round by one row, whatever their type; a file that says so, and one without CLS, is left alone."""
    fixture = load_fixtures()["internvl"]
    keys = profiles.METADATA_KEYS + repair.METADATA_KEYS
    inputs = lambda path: repair.graph_inputs(read_gguf_info(path, keys), "internvl")
    name = "v.position_embd.weight"
    table = next(t.data for t in gguf.GGUFReader(str(fixture.mmproj)).tensors if t.name == name).reshape(-1, 32)
    rolled = inputs(fixture.mmproj)[name]
    assert np.array_equal(rolled.view(np.float32), np.concatenate([table[1:], table[:1]]))
    assert inputs(rewrite(fixture.mmproj, tmp_path / "stock.gguf", add=[(repair.LAYOUT_KEY, "stock")])) == {}
    assert inputs(rewrite(fixture.mmproj, tmp_path / "no-cls.gguf", drop=[repair.CLASS_EMBEDDING])) == {}


@pytest.mark.parametrize(
    ("values", "tensors", "wrong"),
    [
        ({"clip.use_gelu": False, "clip.has_llava_projector": True}, set(), True),  # Granite-Vision
        (
            {"clip.use_gelu": False, "clip.has_llava_projector": True},
            {repair.CLASS_EMBEDDING},
            False,
        ),  # CLIP's own is QuickGELU
        ({"clip.use_gelu": True, "clip.has_llava_projector": True}, set(), False),
        ({"clip.has_llava_projector": True}, set(), False),
        ({"clip.use_gelu": False}, set(), False),  # of another converter
        ({"clip.use_gelu": False, "clip.has_llava_projector": True, repair.LAYOUT_KEY: "stock"}, set(), False),
    ],
)
@pytest.mark.parametrize("projector", ["mlp", "idefics3"])
def test_which_activation(values, tensors, wrong, projector):
    keys = profiles.METADATA_KEYS + repair.METADATA_KEYS
    info = encoder_module.GGUFInfo("x", 0, "clip", {k: values.get(k) for k in keys}, frozenset(tensors))
    assert repair.takes_quick_gelu(info, projector) == (wrong and projector == "mlp")


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({}, True),
        ({"clip.use_gelu": False}, False),  # who wrote it knew of the key
        ({"clip.use_silu": True}, False),
        ({repair.LAYOUT_KEY: "stock"}, False),
    ],
)
def test_activation_of_gemma4(values, wrong):
    keys = profiles.METADATA_KEYS + repair.METADATA_KEYS
    info = encoder_module.GGUFInfo("x", 0, "clip", {k: values.get(k) for k in keys}, frozenset())
    assert repair.takes_quick_gelu(info, "gemma4v") == wrong
    assert [change.key for change in repair.metadata_changes(info, "gemma4v")] == ["clip.use_gelu"] * wrong


# ---- the path that is loaded ----


def test_file_is_not_changed(families, legacy, scratch, monkeypatch):
    """What is loaded is a copy, which is gone as soon as the model is in memory."""
    before, sizes = legacy.read_bytes(), []
    original = repair.copy_with_metadata

    def spy(source, target, *rest):
        original(source, target, *rest)
        sizes.append(os.path.getsize(target))

    monkeypatch.setattr(repair, "copy_with_metadata", spy)
    with load(families, legacy) as vlm:
        assert len(vlm.encoder.repairs) == 2
        assert list(scratch.iterdir()) == []
    assert legacy.read_bytes() == before and len(sizes) == 1 and sizes[0] >= len(before)


@pytest.mark.parametrize("n", range(0, 70, 3))
def test_copy_with_metadata(families, tmp_path, n):
    """All other keys and the tensors stay, however long the header is."""
    source = rewrite(
        families["llama"].mmproj,
        tmp_path / "s.gguf",
        remove=["general.name"],
        add=[*LEGACY[:2], ("general.description", "x" * n)],
    )
    target = tmp_path / "t.gguf"
    copy_with_metadata(source, target, {FL: np.array([4]), "clip.use_gelu": True})
    keys = (FL, D, W, "clip.use_gelu", "clip.projector_type", "clip.vision.image_mean", "general.description")
    ours, theirs = read_gguf_info(target, keys), read_gguf_info(source, keys)
    assert ours.values == theirs.values | {FL: [4], "clip.use_gelu": True}
    a, b = ClipEncoder(target), ClipEncoder(source)
    assert all(np.array_equal(a.tensors[name], b.tensors[name]) for name in b.tensors) and len(a.tensors) == len(
        b.tensors
    )


def test_no_room_for_a_copy(families, legacy, scratch, monkeypatch):
    """Found out before anything is written; the file runs as on stock, and the report says so."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with load(families, legacy) as vlm:
        _, report = vlm.read_prompt("what?", random_image(1), PruneConfig(0.5))
        assert len(report.repairs) == 1 and "3 of its 4 layers run (No space left on device)" in report.notes[0]
    assert list(scratch.iterdir()) == []


def test_no_place_for_temporary_files(families, legacy, monkeypatch, tmp_path):
    """The file runs as on stock, and the report says so."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with load(families, legacy) as vlm:
        _, report = vlm.read_prompt("what?", random_image(1), PruneConfig(0.5))
        assert len(report.repairs) == 1 and "3 of its 4 layers run" in report.notes[0]
        assert vlm.encoder.last_outcome.n_attention == 3


def test_interrupted_load_leaves_nothing(families, legacy, scratch, monkeypatch):
    def interrupt(*_):
        assert len(list(next(scratch.iterdir()).iterdir())) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(mtmd.mtmd, "mtmd_init_from_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(families, legacy)
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("value", ["Repaired", None, True])
def test_unknown_choice(value):
    with pytest.raises(ConfigError, match="encoder="):
        StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, encoder=value)
    with pytest.raises(ConfigError, match="encoder="):
        StarChatHandler(refvlm.MMPROJ, encoder=value)


def test_cached_images_of_the_one_are_not_the_others(families, legacy, tmp_path):
    image = random_image(4)
    seen = {}
    for encoder in ("stock", "repaired"):
        for _ in range(2):
            with load(families, legacy, encoder=encoder, image_cache_dir=tmp_path) as vlm:
                state, report = vlm.read_prompt("what?", image, PruneConfig(0.5))
                first = seen.setdefault(encoder, state.logits)
                assert np.array_equal(state.logits, first)
                assert len(report.repairs) == (2 if encoder == "repaired" else 0)
        assert report.images[0].cached
    assert not np.array_equal(seen["stock"], seen["repaired"])


def test_siglip_without_cls(families, tmp_path):
    """No CLS: tokens are the patches as they are, and attention from CLS is attention received."""
    path = tmp_path / "siglip.gguf"
    write_encoder(tmp_path / "clip.gguf", CLIP, 256, "f32", seed=2)
    _without_cls(tmp_path / "clip.gguf", path)
    image = random_image(4)
    reference = ClipEncoder(path)
    features, attention = reference.encode(image)
    with load(families, path) as vlm:
        got, from_cls = encode(vlm, image), encode(vlm, image, "cls")
        assert vlm.encoder.repairs == []
    assert bounds.are_features(got.embeddings, features) and np.array_equal(got.cells, np.arange(49))
    received = reference.received(attention)
    limit = bounds.share(bounds.relative([(got.embeddings, features)])) * received.max()
    assert bounds.distance(got.scores, received) <= limit < bounds.distance(np.roll(received, 1), received)
    assert np.array_equal(got.scores, from_cls.scores)


def _without_cls(source, target):
    reader = gguf.GGUFReader(str(source))
    drop = {repair.CLASS_EMBEDDING, "v.position_embd.weight"}
    table = next(t.data for t in reader.tensors if t.name == "v.position_embd.weight")[1:]
    rewrite(source, target, tensors=[("v.position_embd.weight", table)], drop=drop)


@pytest.mark.parametrize(("arguments", "n"), [([], 2), (["--encoder", "stock"], 0)])
def test_command_line(families, legacy, arguments, n):
    model = ["-m", str(families["llama"].text), "--mmproj", str(legacy), "-c", "256"]
    done = CliRunner().invoke(cli, ["doctor", "--no-check", "--json", *model, *arguments])
    assert len(json.loads(done.stdout)["model"]["encoder_repairs"]) == n


@pytest.mark.parametrize("encoder", ["repaired", "stock"])
def test_server(families, legacy, encoder):
    app = make_app(families["llama"].text, legacy, Policy(), alias="m", n_ctx=256, n_threads=1, encoder=encoder)
    with TestClient(app):
        reader = app.state.engine.handler._reader
        assert len(reader.encoder.repairs) == (2 if encoder == "repaired" else 0)


@pytest.mark.parametrize(
    "name, projector, version, fits",
    [
        ("glm-ocr", "glm4v", "0.3.35", False),
        ("glm-ocr", "glm4v", "0.3.35+cu128", False),
        ("glm-ocr", "glm4v", "0.3.36", True),
        ("glm4.1v", "glm4v", "0.3.35", True),
        ("llava", "mlp", "0.3.35", True),
    ],
)
def test_an_encoder_that_an_older_llama_cpp_computes_wrongly_is_refused(name, projector, version, fits):
    """GLM-OCR on 0.3.35: tests/test_families.py has what it computes there."""
    info = read_gguf_info(FOLDER / name / "mmproj.gguf", profiles.METADATA_KEYS + repair.METADATA_KEYS)
    if fits:
        repair.check_graph(info, projector, version)
    else:
        with pytest.raises(UnsupportedModelError, match=r"GLM-OCR.*install llama-cpp-python 0\.3\.36"):
            repair.check_graph(info, projector, version)


def test_what_stock_computes_is_to_be_had_everywhere():
    with StarVLM(
        FOLDER / "glm-ocr" / "text.gguf", FOLDER / "glm-ocr" / "mmproj.gguf", n_ctx=512, encoder="stock"
    ) as vlm:
        assert not vlm.encoder.repairs
