"""Headers that do not fit their tensors are refused before llama.cpp sees the file, and every file that fits passes."""

import math
import shutil
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.gguf_files import rewrite

from star_edge import StarChatHandler, StarVLM, errors, refvlm
from star_edge.llamacpp.gguf import read_gguf_info
from star_edge.llamacpp.gguf_check import check_shards, check_text_model
from star_edge.llamacpp.mmproj_check import check_mmproj
from star_edge.synthetic import DecoderShape, EncoderShape, write_decoder, write_encoder

FUZZ = Path(__file__).parent / "fuzz"
sys.path.insert(0, str(FUZZ))

from gguf_mutations import parse  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = sorted(p.name for p in FIXTURES.iterdir() if (p / "mmproj.gguf").exists())
V = "clip.vision."
UNUSED = (
    "resampler.pos_embed_k",
    "model.image_newline",
)  # llama.cpp loads the first, and has another name for the second


def put(source, target, key=None, value=None, tensor=None, dims=None, kind=None, name=None):
    """The file with one number of its header changed in place; name: the key or the tensor is called otherwise."""
    data = bytearray(source.read_bytes())
    header = parse(data)
    if key is not None:
        field = next(f for f in header.fields if f.name == key)
        if name is not None:
            data[field.name_at : field.name_at + len(name)] = name
        elif kind is not None:
            struct.pack_into("<I", data, field.type_at, kind)
        else:
            at = field.value_at
            kind = field.item_kind if field.kind == 9 else field.kind  # of an array the first value
            struct.pack_into({4: "<I", 5: "<i", 6: "<f"}[kind], data, at, value)
    if tensor is not None:
        found = next(t for t in header.tensors if t.name == tensor)
        if dims is not None:
            struct.pack_into(f"<{len(dims)}Q", data, found.dims_at, *dims)
        elif kind is not None:
            struct.pack_into("<I", data, found.type_at, kind)
        else:
            data[found.name_at] = ord("z")
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_all_families_pass(family):
    check_text_model(read_gguf_info(FIXTURES / family / "text.gguf"))
    check_mmproj(read_gguf_info(FIXTURES / family / "mmproj.gguf"))


def test_the_reference_model_passes():
    check_text_model(read_gguf_info(refvlm.TEXT_MODEL))
    check_mmproj(read_gguf_info(refvlm.MMPROJ))


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
@pytest.mark.parametrize("kind", ["clip", "qwen2vl", "qwen2.5vl", "idefics3", "gemma3"])
def test_synthetic_encoders_pass(tmp_path, kind, dtype):
    shape = EncoderShape(
        image_size=112, patch_size=14, n_layers=2, n_embd=64, n_heads=4, n_ff=128, kind=kind, n_merge=2
    )
    write_encoder(tmp_path / "m.gguf", shape, 64, dtype)
    check_mmproj(read_gguf_info(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    "shape",
    [
        DecoderShape(2, 64, 4, 2, 64),
        DecoderShape(2, 64, 4, 2, 64, rope_sections=(2, 3, 3, 0)),
        DecoderShape(2, 64, 4, 2, 64, sliding_window=8),
    ],
    ids=["llama", "qwen2vl", "gemma3"],
)
def test_synthetic_decoders_pass(tmp_path, shape):
    write_decoder(tmp_path / "m.gguf", shape, "f16")
    check_text_model(read_gguf_info(tmp_path / "m.gguf"))


def test_a_header_is_read_once(tmp_path, monkeypatch):
    """A model of many tensors costs one pass over its header: as many calls as it has keys and tensors, whatever is
    checked.
    """
    import star_edge.llamacpp.gguf as module

    opened = []
    original = module._open
    monkeypatch.setattr(module, "_open", lambda name: opened.append(name) or original(name))
    info = read_gguf_info(FIXTURES / "minicpmv" / "mmproj.gguf")
    check_mmproj(info)
    assert len(opened) == 1


# ---- mmproj files ----

WRONG_KEYS = [
    ("llava", "embedding_length", 17),
    ("llava", "embedding_length", 64),
    ("llava", "attention.head_count", 0),
    ("llava", "attention.head_count", 5),
    ("llava", "attention.head_count", 65535),
    ("llava", "patch_size", 0),
    ("llava", "patch_size", 7),
    ("llava", "image_size", 9000),
    ("llava", "image_size", 128),
    ("llava", "image_size", 5),
    ("granite-vision", "image_size", 31),
    ("granite-vision", "image_grid_pinpoints", 83),
    ("llava", "image_size", 0),
    ("qwen2-vl", "image_size", 5),
    ("llava", "block_count", 0),
    ("llava", "block_count", 1000),
    ("mobilevlm", "image_size", 100),
    ("mobilevlm-v2", "patch_size", 8),
    ("llava", "attention.layer_norm_epsilon", math.nan),
    ("llava", "attention.layer_norm_epsilon", -1.0),
    ("llava", "attention.layer_norm_epsilon", 0.0),
    ("llava", "attention.layer_norm_epsilon", math.inf),
    ("llava", "image_std", 0.0),
    ("llava", "image_std", 1e-30),
    ("llava", "image_mean", math.nan),
    ("llava", "image_mean", 1e30),
    ("idefics3", "projector.scale_factor", 8),
    ("idefics3", "projector.scale_factor", 1),
    ("internvl", "projector.scale_factor", 0),
    ("smolvlm", "preproc_image_size", 2**31 - 1),
    ("lfm2-vl", "projector.scale_factor", 3),
    ("mistral3", "spatial_merge_size", 3),
    ("mistral3", "spatial_merge_size", 0),
    ("qwen3-vl", "spatial_merge_size", 4),
    ("qwen2.5-vl", "projection_dim", 63),
    ("gemma3", "image_size", 10),
    ("gemma4", "attention.head_count", 16),
    ("gemma4-unified", "patch_size", 16),
    ("kimi-k2.5", "attention.head_count", 16),
    ("kimi-k2.5", "projector.scale_factor", 4),
    ("nemotron-vl", "image_size", 128),
    ("nemotron-vl", "projector.scale_factor", 4),
    ("pixtral", "patch_size", 16),
]


@pytest.mark.parametrize(("family", "key", "value"), WRONG_KEYS)
def test_numbers_of_an_mmproj(tmp_path, family, key, value):
    path = put(FIXTURES / family / "mmproj.gguf", tmp_path / "m.gguf", V + key, value)
    with pytest.raises(errors.ModelFileError) as caught:
        StarVLM(FIXTURES / family / "text.gguf", path, n_ctx=256)
    message = str(caught.value)
    assert "m.gguf" in message and "\n" not in message
    assert key in message or "tensor" in message, message


@pytest.mark.parametrize(
    "key", ["embedding_length", "attention.head_count", "attention.layer_norm_epsilon", "block_count", "image_size"]
)
def test_values_of_another_type(tmp_path, key):
    path = put(
        FIXTURES / "llava" / "mmproj.gguf", tmp_path / "m.gguf", V + key, kind=5
    )  # int32 where uint32 or float32 is read
    with pytest.raises(errors.ModelFileError, match=rf"{key} is of type i32, and llama.cpp reads [uf]32"):
        check_mmproj(read_gguf_info(path))


@pytest.mark.parametrize("key", ["embedding_length", "attention.head_count", "image_size", "image_mean"])
def test_missing_keys(tmp_path, key):
    path = put(FIXTURES / "llava" / "mmproj.gguf", tmp_path / "m.gguf", V + key, name=b"klip")
    with pytest.raises(errors.ModelFileError, match=f"{key} is missing"):
        check_mmproj(read_gguf_info(path))


def each_tensor(family):
    seen = set()
    for tensor in parse((FIXTURES / family / "mmproj.gguf").read_bytes()).tensors:
        name = ".".join(
            "#" if part.isdigit() and tensor.name.startswith(("v.blk", "v.deepstack")) else part
            for part in tensor.name.split(".")
        )
        if name not in seen:
            seen.add(name)
            yield tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_has_another_shape(tmp_path, family):
    """The same number of values in another shape, for one tensor of each kind."""
    source = FIXTURES / family / "mmproj.gguf"
    for tensor in each_tensor(family):
        even = [i for i in range(1, tensor.n_dims) if tensor.dims[i] % 2 == 0]
        if tensor.name in UNUSED or not even:
            continue
        halved = [tensor.dims[0] * 2, *tensor.dims[1:]]
        halved[even[-1]] //= 2
        with pytest.raises(errors.ModelFileError, match="tensor"):
            check_mmproj(read_gguf_info(put(source, tmp_path / "m.gguf", tensor=tensor.name, dims=halved)))
            pytest.fail(f"{family}: {tensor.name} of {halved}")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_vector_has_another_length(tmp_path, family):
    source = FIXTURES / family / "mmproj.gguf"
    for tensor in each_tensor(family):
        if tensor.n_dims == 1 and tensor.dims[0] > 1 and tensor.name not in UNUSED:
            values = np.ones(2 * tensor.dims[0], np.float32)
            path = rewrite(source, tmp_path / "m.gguf", drop=(tensor.name,), tensors=[(tensor.name, values)])
            with pytest.raises(errors.ModelFileError, match=tensor.name):
                check_mmproj(read_gguf_info(path))
                pytest.fail(f"{family}: {tensor.name}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [26, 27, 24], ids=["i32", "i64", "i8"])
def test_types_that_cannot_be_computed_with(tmp_path, family, kind):
    source = FIXTURES / family / "mmproj.gguf"
    for tensor in each_tensor(family):
        if tensor.kind == 0 and kind == 26:
            with pytest.raises(errors.ModelFileError, match="i32"):
                check_mmproj(read_gguf_info(put(source, tmp_path / "m.gguf", tensor=tensor.name, kind=kind)))
                pytest.fail(f"{family}: {tensor.name}")
        elif tensor.n_dims == 2:
            values = np.zeros(tensor.dims[::-1], {27: np.int64, 24: np.int8}.get(kind, np.int32))
            path = _with_tensor(source, tmp_path / "m.gguf", tensor.name, values)
            with pytest.raises(errors.ModelFileError, match="cannot multiply|takes f32"):
                check_mmproj(read_gguf_info(path))
                pytest.fail(f"{family}: {tensor.name}")
            break


def _with_tensor(source, target, name, values):
    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(target), "clip")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(
                field.name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            )
    for tensor in reader.tensors:
        if tensor.name == name:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_shape=tensor.data.shape, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


REQUIRED = {
    "llava": [
        "v.blk.0.attn_q.weight",
        "v.position_embd.weight",
        "v.patch_embd.weight",
        "mm.0.bias",
        "mm.2.weight",
        "v.blk.2.ffn_up.weight",
    ],
    "lfm2-vl": ["v.blk.1.attn_v.weight", "v.position_embd.weight", "mm.2.bias"],
    "qwen2.5-vl": ["v.blk.1.attn_k.weight", "v.blk.1.attn_q.bias", "v.patch_embd.weight.1", "mm.0.bias"],
    "qwen3-vl": ["v.blk.0.attn_qkv.weight", "v.blk.0.attn_qkv.bias", "v.patch_embd.bias", "v.deepstack.0.fc2.weight"],
    "internvl": ["v.class_embd", "mm.model.mlp.0.bias", "v.position_embd.weight"],
    "gemma4-unified": ["v.patch_norm.3.bias", "v.patch_embd.bias", "mm.a.input_projection.weight"],
    "kimi-k2.5": ["mm.input_norm.bias", "v.position_embd.weight", "mm.2.bias"],
    "nemotron-vl": ["v.class_embd", "v.position_embd.weight", "mm.model.mlp.3.weight"],
    "mistral3": ["mm.input_norm.weight", "mm.patch_merger.weight"],
    "minicpmv": ["resampler.query", "resampler.attn.q.bias", "v.position_embd.weight"],
    "minicpmv4.6": ["v.vit_merger.attn_q.weight", "v.vit_merger.ds_ffn_up.weight", "mm.up.weight"],
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in REQUIRED.items() for name in names])
def test_missing_tensors(tmp_path, family, name):
    path = put(FIXTURES / family / "mmproj.gguf", tmp_path / "m.gguf", tensor=name)
    with pytest.raises(errors.ModelFileError, match=name.replace(".", r"\.")):
        check_mmproj(read_gguf_info(path))


def test_the_last_layer_is_checked_though_stock_skips_it(tmp_path):
    """Stock llama.cpp leaves the last layer of a LLaVA file out, and the repair runs it: what is wrong there ended the
    process.
    """
    family = FIXTURES / "llava"
    for tensor in parse((family / "mmproj.gguf").read_bytes()).tensors:
        if tensor.name.startswith("v.blk.2.") and tensor.n_dims == 2:
            dims = [tensor.dims[0] * 2, tensor.dims[1] // 2]
            path = put(family / "mmproj.gguf", tmp_path / "m.gguf", tensor=tensor.name, dims=dims)
            with pytest.raises(errors.ModelFileError, match=r"tensor v\.blk\.2\."):
                StarVLM(family / "text.gguf", path, n_ctx=256)


def test_the_handler_refuses_at_once(tmp_path):
    path = put(FIXTURES / "llava" / "mmproj.gguf", tmp_path / "m.gguf", V + "embedding_length", 17)
    with pytest.raises(errors.ModelFileError, match="embedding_length = 17"):
        StarChatHandler(path)


# ---- text models ----


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llava", "llama.block_count", 0),
        ("llava", "llama.block_count", 1000),
        ("llava", "llama.attention.head_count", 3),
        ("llava", "llama.attention.head_count_kv", 3),
        ("llava", "llama.attention.layer_norm_rms_epsilon", math.nan),
        ("llava", "llama.attention.layer_norm_rms_epsilon", -1.0),
        ("llava", "llama.rope.dimension_count", 7),
        ("mistral3", "mistral3.rope.dimension_count", 0),
        ("gemma4", "gemma4.rope.dimension_count_swa", 0),
        ("gemma4", "gemma4.attention.value_length", 8),
        ("gemma4", "gemma4.attention.shared_kv_layers", 5),
        ("gemma4-moe", "gemma4.attention.shared_kv_layers", 2**31),
        ("kimi-k2.5", "deepseek2.attention.key_length", 2**16),
        ("kimi-k2.5", "deepseek2.attention.kv_lora_rank", 33),
        ("qwen2-vl", "qwen2vl.rope.dimension_sections", 48),
        ("llava", "llama.embedding_length", 0),
        ("llava", "llama.rope.freq_base", 0.0),
        ("llava", "llama.rope.freq_base", math.inf),
        ("gemma4", "gemma4.final_logit_softcapping", math.nan),
        ("qwen3.5", "qwen35.ssm.inner_size", 129),
        ("qwen3.5-moe", "qwen35moe.ssm.inner_size", 32),
    ],
)
def test_numbers_of_a_text_model(tmp_path, family, key, value):
    path = put(FIXTURES / family / "text.gguf", tmp_path / "t.gguf", key, value)
    with pytest.raises(errors.ModelFileError, match=key.partition(".")[2].replace(".", r"\.").partition("_kv")[0]):
        StarVLM(path, n_ctx=256)


def test_what_is_not_said_of_layers_with_a_window(tmp_path):
    """It is as in the other layers: RoPE would turn 64 values of heads that have 32."""
    path = put(FIXTURES / "gemma4" / "text.gguf", tmp_path / "t.gguf", "gemma4.rope.dimension_count_swa", name=b"z")
    with pytest.raises(errors.ModelFileError, match="dimension_count_swa = 64"):
        StarVLM(path, n_ctx=256)


def test_types_of_a_text_model(tmp_path):
    for name in ("blk.0.attn_q.weight", "blk.0.attn_norm.weight", "output.weight", "token_embd.weight"):
        path = put(FIXTURES / "llava" / "text.gguf", tmp_path / "t.gguf", tensor=name, kind=26)
        with pytest.raises(errors.ModelFileError, match=f"{name} is i32"):
            StarVLM(path, n_ctx=256)


def test_missing_shard(tmp_path):
    first = tmp_path / "model-00001-of-00003.gguf"
    shutil.copy(FIXTURES / "llava" / "text.gguf", first)
    shutil.copy(first, tmp_path / "model-00002-of-00003.gguf")
    with pytest.raises(errors.ModelFileError, match="model-00003-of-00003.gguf is missing"):
        StarVLM(first, n_ctx=256)
    put(FIXTURES / "llava" / "text.gguf", tmp_path / "model-00003-of-00003.gguf", tensor="blk.0.attn_q.weight", kind=26)
    with pytest.raises(errors.ModelFileError, match="model-00003-of-00003.gguf: tensor blk.0.attn_q.weight is i32"):
        StarVLM(first, n_ctx=256)
    with pytest.raises(errors.ModelFileError, match="part 2 of 3.*model-00001-of-00003.gguf"):
        StarVLM(tmp_path / "model-00002-of-00003.gguf", n_ctx=256)
    check_shards(tmp_path / "model.gguf")
    check_shards(tmp_path / "model-1-of-3.gguf")


# ---- LoRA ----


def write_lora(
    path, base, arch="llama", rank=4, names=("blk.0.attn_q.weight",), change=lambda a, b: (a, b), kind="adapter"
):
    """A random adapter; `change` makes other matrices of the right ones."""
    shapes = {name: tensor.shape for name, tensor in read_gguf_info(base).tensors.items()}
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_string("general.type", kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    rng = np.random.default_rng(0)
    for name in names:
        n_in, n_out = shapes.get(name, (8, 8))
        a, b = change(
            rng.standard_normal((rank, n_in)).astype(np.float32), rng.standard_normal((n_out, rank)).astype(np.float32)
        )
        for end, array in (("a", a), ("b", b)):
            if array is not None:
                writer.add_tensor(f"{name}.lora_{end}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def base():
    return FIXTURES / "llava" / "text.gguf"


def test_a_lora_that_fits(tmp_path, base):
    prompt = "what is red?"
    with StarVLM(base, n_ctx=256) as plain:
        expected = plain.read_prompt(prompt, chat=False)[0].logits.copy()
    names = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight")
    with StarVLM(base, n_ctx=256, lora_path=str(write_lora(tmp_path / "l.gguf", base, names=names))) as vlm:
        assert not np.allclose(vlm.read_prompt(prompt, chat=False)[0].logits, expected)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p, base: p, errors.ModelFileError, "does not exist"),
        (lambda p, base: base, errors.ModelFileError, "not a LoRA adapter"),
        (lambda p, base: p.write_bytes(b"GGUF") and p, errors.ModelFileError, "truncated or damaged"),
        (lambda p, base: write_lora(p, base, kind="model"), errors.ModelFileError, "not a LoRA adapter"),
        (lambda p, base: write_lora(p, base, arch="qwen2"), errors.ModelMismatchError, "qwen2.*llama"),
        (lambda p, base: write_lora(p, base, names=()), errors.ModelFileError, "no tensors"),
        (
            lambda p, base: write_lora(p, base, names=("blk.99.attn_q.weight",)),
            errors.ModelMismatchError,
            "blk.99.attn_q.weight",
        ),
        (
            lambda p, base: write_lora(p, base, change=lambda a, b: (a, None)),
            errors.ModelFileError,
            "lora_b is missing",
        ),
        (
            lambda p, base: write_lora(p, base, change=lambda a, b: (a[:, :-1].copy(), b)),
            errors.ModelMismatchError,
            "blk.0.attn_q.weight is",
        ),
        (
            lambda p, base: write_lora(p, base, change=lambda a, b: (a, b[:-1].copy())),
            errors.ModelMismatchError,
            "blk.0.attn_q.weight is",
        ),
        (
            lambda p, base: write_lora(p, base, change=lambda a, b: (a[:-1].copy(), b)),
            errors.ModelMismatchError,
            "blk.0.attn_q.weight is",
        ),
        (
            lambda p, base: write_lora(p, base, change=lambda a, b: (a.astype(np.int32), b)),
            errors.ModelFileError,
            "i32",
        ),
    ],
    ids=["missing", "model", "damaged", "type", "arch", "empty", "tensor", "half", "in", "out", "rank", "int"],
)
def test_loras_that_do_not(tmp_path, base, make, error, words):
    path = make(tmp_path / "l.gguf", base)
    with pytest.raises(error, match=words):
        StarVLM(base, n_ctx=256, lora_path=str(path))


def test_a_lora_of_token_embeddings(tmp_path, base):
    """A and B change places there (llama_adapter_lora_init_impl)."""
    n_embd, n_vocab = read_gguf_info(base).tensors["token_embd.weight"].shape
    make = lambda a, b: (np.ones((n_vocab, 4), np.float32), np.ones((n_embd, 4), np.float32))
    path = write_lora(tmp_path / "l.gguf", base, names=("token_embd.weight",), change=make)
    with StarVLM(base, n_ctx=256, lora_path=str(path)) as vlm:
        assert vlm.generate("x", chat=False, max_tokens=1)
    write_lora(path, base, names=("token_embd.weight",))
    with pytest.raises(errors.ModelMismatchError, match="token_embd.weight"):
        StarVLM(base, n_ctx=256, lora_path=str(path))
