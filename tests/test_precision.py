"""mmproj_type: matrices of the encoder in another type, converted once into a cache."""

import ctypes
import json
import os
import shutil
from types import SimpleNamespace

import gguf
import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import stock
from helpers.families import FOLDER, load_fixtures
from helpers.models import random_image

from star_edge import PruneConfig, StarChatHandler, StarVLM, refvlm
from star_edge.cli import cli
from star_edge.errors import ConfigError, ModelFileError, OutputError, UnsupportedModelError
from star_edge.llamacpp.gguf import read_gguf_info
from star_edge.llamacpp.gguf_check import BF16, F16, F32
from star_edge.llamacpp.gguf_convert import convert
from star_edge.llamacpp.native import GGML
from star_edge.synthetic.encoders import write_encoder
from star_edge.synthetic.shapes import EncoderShape
from star_edge.vision import precision
from star_edge.vision.chunks import ImageChunk
from star_edge.vision.precision import fastest, matrices, with_type

Q8_0 = int(gguf.GGMLQuantizationType.Q8_0)
SMALL = EncoderShape(image_size=56, patch_size=14, n_layers=2, n_embd=64, n_heads=2, n_ff=128)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STAR_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mmproj"


@pytest.fixture(scope="module")
def mmproj(tmp_path_factory):
    """Files of one encoder by type."""
    folder = tmp_path_factory.mktemp("encoders")
    paths = {dtype: folder / f"{dtype}.gguf" for dtype in ("f32", "f16", "q8_0")}
    for dtype, path in paths.items():
        write_encoder(path, SMALL, 64, dtype, seed=3)
    return paths


def tensors(path):
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def rounded(values, kind):
    """float32 values as ggml's own conversion rounds them, as bits, (n,) uint16."""
    values = np.ascontiguousarray(values, np.float32).ravel()
    out = np.empty(values.size, np.uint16)
    convert_row = GGML.ggml_fp32_to_bf16_row_ref if kind == BF16 else GGML.ggml_fp32_to_fp16_row
    convert_row.restype, convert_row.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    convert_row(values.ctypes.data, out.ctypes.data, values.size)
    return out


@pytest.mark.parametrize("kind", [F16, BF16])
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_a_converted_file_has_what_ggml_makes_of_its_matrices_and_the_rest_as_it_was(mmproj, dtype, kind, tmp_path):
    info = read_gguf_info(mmproj[dtype])
    names = matrices(info)
    assert len(names) == 6 * SMALL.n_layers and all(name.startswith("v.blk.") for name in names)
    convert(info, tmp_path / "out.gguf", dict.fromkeys(names, kind))
    before, after = tensors(mmproj[dtype]), tensors(tmp_path / "out.gguf")
    assert list(before) == list(after)
    for name, tensor in after.items():
        source = before[name]
        assert tuple(tensor.shape) == tuple(source.shape)
        if name in names:
            assert int(tensor.tensor_type) == kind
            values = gguf.quants.dequantize(np.ascontiguousarray(source.data), source.tensor_type)
            assert np.array_equal(np.ascontiguousarray(tensor.data).view(np.uint16).ravel(), rounded(values, kind))
        else:
            assert tensor.tensor_type == source.tensor_type and np.array_equal(tensor.data, source.data)
    assert read_gguf_info(tmp_path / "out.gguf").metadata == info.metadata


def test_odd_values_are_rounded_as_ggml_rounds_them(tmp_path):
    """Ties, infinities, NaN, subnormal numbers, and the largest ones."""
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3.4e38, 0, -0.0])
    values = np.resize(values.astype(np.float32), 32)
    for kind, fits in ((BF16, values), (F16, np.where(np.abs(values) < 6e4, values, np.float32(1 + 2**-11)))):
        w = gguf.GGUFWriter(str(tmp_path / "in.gguf"), "clip")
        w.add_tensor("v.blk.0.attn_q.weight", fits.reshape(1, 32).repeat(2, axis=0))
        for step in ("header", "kv_data", "tensors"):
            getattr(w, f"write_{step}_to_file")()
        w.close()
        convert(read_gguf_info(tmp_path / "in.gguf"), tmp_path / "out.gguf", {"v.blk.0.attn_q.weight": kind})
        (out,) = gguf.GGUFReader(tmp_path / "out.gguf").tensors
        bits = np.ascontiguousarray(out.data).view(np.uint16).ravel()
        assert np.array_equal(bits, rounded(np.tile(fits, 2), kind))


def test_values_that_f16_cannot_hold_are_refused(cache, tmp_path):
    w = gguf.GGUFWriter(str(tmp_path / "in.gguf"), "clip")
    w.add_tensor("v.blk.0.attn_q.weight", np.full((2, 32), 1e5, np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(w, f"write_{step}_to_file")()
    w.close()
    with pytest.raises(ModelFileError, match="attn_q.weight .* f16 cannot hold"):
        with_type(read_gguf_info(tmp_path / "in.gguf"), "f16", False)
    assert list(cache.iterdir()) == []


NO_LAYERS = "gemma4-unified"


def test_an_encoder_without_layers_says_so(cache):
    fixture = load_fixtures()[NO_LAYERS]
    for kind in ("bf16", "auto", "file"):
        with StarVLM(fixture.text, fixture.mmproj, n_ctx=512, n_threads=1, mmproj_type=kind) as vlm:
            assert not vlm.encoder.precision.is_converted
            note = "mmproj_type='bf16': the encoder has no layers whose matrices are converted"
            assert vlm.encoder.notes == ([note] if kind == "bf16" else [])
    assert not cache.exists()


@pytest.mark.parametrize("fixture", [f for f in load_fixtures().values() if f.name != NO_LAYERS], ids=lambda f: f.name)
def test_every_family_computes_what_its_converted_file_says(fixture, cache):
    """Also its repairs. The converted file, given as if it were the user's, is the same encoder."""
    image = fixture.prompts[0].pictures[0]
    features = []
    for path, kind in ((fixture.mmproj, "bf16"), (None, "file"), (fixture.mmproj, "file")):
        if path is None:
            (path,) = cache.iterdir()
        with StarVLM(fixture.text, path, n_ctx=1024, n_threads=1, mmproj_type=kind, image_cache_bytes=0) as vlm:
            prompt = vlm.tokenize("<__media__>a", [image], chat=False)
            try:
                chunk = next(c for c in prompt.chunks if isinstance(c, ImageChunk))
                features.append(vlm.encoder.encode(chunk).embeddings.copy())
            finally:
                prompt.close()
            assert bool(vlm.encoder.repairs) == fixture.repaired
            assert vlm.encoder.precision.is_converted == (kind == "bf16")
    converted, given, of_file = features
    assert np.array_equal(converted, given)
    difference = np.sqrt(((converted - of_file) ** 2).mean() / (of_file**2).mean())
    assert 0 < difference < 0.1  # 8 bits, through some layers


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "gemma3"])
def test_everything_kept_is_bit_identical_to_stock_on_the_converted_file(family, cache):
    folder = FOLDER / family
    llama = stock.load(folder / "text.gguf", True, n_threads=1)
    with StarVLM(
        folder / "text.gguf", folder / "mmproj.gguf", n_ctx=1024, n_threads=1, mmproj_type="bf16", encoder="stock"
    ) as vlm:
        multimodal = stock.Multimodal(llama, vlm.encoder.file, True)
        image = random_image(3)
        theirs, _ = multimodal.ask("<__media__>What is this?", [image], 0)
        state, report = vlm.read_prompt("<__media__>What is this?", [image], None, chat=False)
        assert np.array_equal(state.logits, theirs[0])
        if family != "llava":  # whose stock encoder makes a token of CLS, which no encoder stage can keep
            config = PruneConfig(encoder_layer=1, decoder_layer=1, redundancy="exact")
            state, windows = vlm.read_prompt("<__media__>What is this?", [image], config, chat=False)
            assert windows.encoder_layer == 1 and np.array_equal(state.logits, theirs[0])
        assert vlm.encoder.path == str(folder / "mmproj.gguf") and vlm.encoder.file != vlm.encoder.path
        of_file = read_gguf_info(folder / "mmproj.gguf")
        assert report.notes == [f"the encoder computes in bf16; the file has {precision.type_of(of_file)}"]
    multimodal.close()
    llama.close()


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        # what is fastest in the table of precision.py, and where two are within its noise the more exact one
        ("CPU : AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 |", {F32: F16, F16: F16, BF16: F16, Q8_0: Q8_0}),
        ("CPU : AVX2 = 1 | F16C = 1 | AVX512 = 1 |", {F32: F16, F16: F16, BF16: BF16, Q8_0: F16}),
        ("CPU : AVX2 = 1 | F16C = 1 | AVX512 = 1 | AVX512_BF16 = 1 |", dict.fromkeys([F32, F16, BF16, Q8_0], BF16)),
        ("CPU : NEON = 1 | ARM_FMA = 1 |", {k: k for k in (F32, F16, BF16, Q8_0)}),  # not measured
        ("CPU : AVX2 = 0 | F16C = 1 | AVX512_BF16 = 0 |", {k: k for k in (F32, F16, BF16, Q8_0)}),
    ],
)
def test_the_fastest_type(features, expected):
    assert {kind: fastest(kind, features) for kind in expected} == expected


def test_auto_goes_by_the_processor(mmproj, cache, monkeypatch):
    monkeypatch.setattr(precision, "cpu_features", lambda: "CPU : AVX512_BF16 = 1 |")
    found = with_type(read_gguf_info(mmproj["q8_0"]), "auto", False)
    assert (found.kind, found.of_file, found.is_converted) == ("bf16", "q8_0", True)
    assert not with_type(read_gguf_info(mmproj["q8_0"]), "auto", True).is_converted  # on a GPU
    monkeypatch.setattr(precision, "cpu_features", lambda: "CPU : NEON = 1 |")
    assert not with_type(read_gguf_info(mmproj["q8_0"]), "auto", False).is_converted
    assert not with_type(read_gguf_info(mmproj["f16"]), "f16", False).is_converted


def test_a_file_is_converted_once(mmproj, cache, monkeypatch, tmp_path):
    first = with_type(read_gguf_info(mmproj["f32"]), "f16", False).info
    written = os.stat(first.path).st_ino
    renamed = shutil.copy(mmproj["f32"], tmp_path / "another.gguf")
    assert with_type(read_gguf_info(renamed), "f16", False).info.path == first.path
    assert os.stat(first.path).st_ino == written and len(list(cache.iterdir())) == 1
    with open(first.path, "r+b") as file:  # a damaged one is made again
        file.truncate(2000)
    assert with_type(read_gguf_info(mmproj["f32"]), "f16", False).info.n_bytes == first.n_bytes
    # Another file of that name is another model
    write_encoder(renamed, SMALL, 64, "f32", seed=4)
    assert with_type(read_gguf_info(renamed), "f16", False).info.path != first.path


def test_the_cache_is_bounded(mmproj, cache, monkeypatch):
    paths = [with_type(read_gguf_info(mmproj[d]), "f16", False).info.path for d in ("f32", "q8_0")]
    os.utime(paths[0], (1e9, 1e9))
    os.utime(paths[1], (2e9, 2e9))
    unfinished = cache / "x.gguf-part"
    unfinished.write_bytes(b"")
    os.utime(unfinished, (1e9, 1e9))
    monkeypatch.setattr(precision, "CACHE_BYTES", int(2.5 * os.path.getsize(paths[1])))
    last = with_type(read_gguf_info(mmproj["f32"]), "bf16", False).info.path
    assert sorted(map(str, cache.iterdir())) == sorted([paths[1], last])


def test_no_room(mmproj, cache, monkeypatch):
    """A type that was named is an error, "auto" goes on with the file and says so. Nothing is left half written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    info = read_gguf_info(mmproj["f32"])
    with pytest.raises(ConfigError, match="mmproj_type='bf16'.*No space left") as caught:
        with_type(info, "bf16", False)
    assert "STAR_EDGE_CACHE" in caught.value.remedy
    monkeypatch.setattr(precision, "cpu_features", lambda: "AVX512_BF16 = 1")
    found = with_type(info, "auto", False)
    assert not found.is_converted and "computes in f32: not converted" in found.note and "No space left" in found.note
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("folder", ["file", "~nobody-has-that-name/cache"])
def test_no_folder(mmproj, monkeypatch, tmp_path, folder):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STAR_EDGE_CACHE", folder if folder[0] == "~" else str(tmp_path / folder))
    monkeypatch.setattr(precision, "cpu_features", lambda: "AVX512_BF16 = 1")
    assert "computes in f32: not converted" in with_type(read_gguf_info(mmproj["f32"]), "auto", False).note
    with pytest.raises(ConfigError, match="mmproj_type='f16': the converted file cannot be kept"):
        with_type(read_gguf_info(mmproj["f32"]), "f16", False)


def test_types_that_cannot_be_converted(mmproj, cache, monkeypatch):
    monkeypatch.setattr(precision, "is_readable", lambda kind: kind != F32)
    monkeypatch.setattr(precision, "cpu_features", lambda: "AVX512_BF16 = 1")
    info = read_gguf_info(mmproj["f32"])
    with pytest.raises(UnsupportedModelError, match="matrices of type f32"):
        with_type(info, "bf16", False)
    assert not with_type(info, "auto", False).is_converted


def test_the_fronts_say_what_they_compute_in(cache):
    question, image = "what color is the star?", refvlm.DEMO_IMAGE
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=1024, n_threads=1, mmproj_type="bf16") as vlm:
        answer = vlm.generate(question, images=[image], prune="off", max_tokens=4)
        assert answer.text.strip() == "red"
        assert "the encoder computes in bf16; the file has f16" in answer.report.notes
    handler = StarChatHandler(refvlm.MMPROJ, verbose=False, use_gpu=False, prune=None, mmproj_type="bf16")
    llama = llama_cpp.Llama(str(refvlm.TEXT_MODEL), chat_handler=handler, n_ctx=1024, n_threads=1, verbose=False)
    content = [{"type": "image_url", "image_url": {"url": str(image)}}, {"type": "text", "text": question}]
    response = llama.create_chat_completion([{"role": "user", "content": content}], max_tokens=4)
    assert "the encoder computes in bf16; the file has f16" in response["star_edge"]["notes"]
    llama.close()
    ran = CliRunner().invoke(cli, ["doctor", "--no-check", "--json", "--mmproj-type", "bf16"])
    assert json.loads(ran.stdout)["model"]["encoder_type"] == "bf16, converted: the file has f16"


def test_results_in_another_type_are_not_gone_on_with(cache, tmp_path):
    """And the default is not in the header, so that older files of results are."""
    questions, out = tmp_path / "q.jsonl", tmp_path / "r.jsonl"
    question = {"image": str(refvlm.DEMO_IMAGE), "question": "what color is the star?", "answer": "red"}
    questions.write_text(json.dumps(question) + "\n")
    asked = ["eval", str(questions), "--out", str(out), "--preset", "fast", "--metric", "exact", "-t", "1"]
    assert CliRunner().invoke(cli, asked).exit_code == 0
    assert "mmproj_type" not in out.read_text()
    assert CliRunner().invoke(cli, asked).exit_code == 0
    refused = CliRunner().invoke(cli, [*asked, "--mmproj-type", "bf16"])
    assert isinstance(refused.exception, OutputError) and "--mmproj-type" in str(refused.exception)
