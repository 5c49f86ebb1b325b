"""Odd arguments of every public call, and files and requests of kinds that were found by trying: each is honoured, or
refused with a typed error before anything is computed.
"""

import contextlib
import json

import gguf
import numpy as np
import pytest
from helpers.families import FOLDER
from helpers.gguf_files import rewrite
from helpers.odd_values import VALUES

from star_edge import PruneConfig, StarChatHandler, StarVLM, batch, errors, hub, refvlm
from star_edge.arguments import parameters
from star_edge.evaluation.results import Records
from star_edge.io.fingerprints import fingerprint_file
from star_edge.llamacpp.gguf_check import read_text_model
from star_edge.server.app import make_app

QUESTION = "what color is the star?"
REF = {"n_ctx": 512, "n_threads": 1}


@pytest.fixture(scope="module")
def vlm():
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, **REF) as engine:
        yield engine
        assert engine.generate(QUESTION, refvlm.DEMO_IMAGE, max_tokens=4).text == " red"


# ---- constructors ----


@pytest.mark.parametrize(
    "name", [n for n in parameters(StarChatHandler.__init__) if n not in ("clip_model_path", "prune")]
)
def test_arguments_of_the_handler(name, tmp_path, monkeypatch):
    """Each value is taken or refused by its name."""
    monkeypatch.chdir(tmp_path)
    refused = 0
    for value in VALUES.values():
        try:
            StarChatHandler(refvlm.MMPROJ, **{name: value})
        except (errors.ConfigError, errors.UnsupportedModelError) as error:
            assert name in str(error) or "chat template" in str(error) or value is None, (name, value, str(error))
            refused += 1
    assert refused > len(VALUES) / 2


def test_is_cancelled_is_a_function():
    with pytest.raises(errors.ConfigError, match="is_cancelled"):
        StarChatHandler(refvlm.MMPROJ).cancellable(5).__enter__()


def test_fewer_tokens_at_most_than_at_least():
    for make in (
        lambda **k: StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, **k),
        lambda **k: StarChatHandler(refvlm.MMPROJ, **k),
    ):
        with pytest.raises(errors.ConfigError, match="image_min_tokens=10 is more than image_max_tokens=5"):
            make(image_min_tokens=10, image_max_tokens=5)


@pytest.mark.parametrize(
    "options",
    [
        {"split_mode": 99},
        {"main_gpu": 55},
        {"tensor_split": [1.0] * 1000},
        {"tensor_split": [-1.0]},
        {"pooling_type": 77},
        {"rope_scaling_type": 99},
        {"attention_type": 9},
        {"numa": 7},
        {"last_n_tokens_size": -5},
        {"rope_freq_base": -1.0},
        {"rope_freq_scale": -1.0},
        {"n_threads_batch": 4},
        {"model_path": "x"},
        {"kv_overrides": {"a": "b" * 500}},
        {"kv_overrides": {"a" * 200: 1}},
        {"kv_overrides": {"a": 2**63}},
    ],
    ids=lambda options: str(options)[:40],
)
def test_options_of_llama(options):
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        StarVLM(refvlm.TEXT_MODEL, **options)


@pytest.mark.parametrize(
    "override",
    [
        {"llama.block_count": 1000},  # each of these three ended the process
        {"llama.attention.layer_norm_rms_epsilon": -1.0},
        {"llama.expert_count": 8},
        {"llama.rope.freq_base": float("nan")},
    ],
    ids=str,
)
def test_overrides_are_checked_as_the_file_is(override):
    with pytest.raises(errors.ModelFileError, match=next(iter(override))):
        read_text_model(refvlm.TEXT_MODEL, override)
    with pytest.raises(errors.ModelFileError, match=next(iter(override))):
        StarVLM(refvlm.TEXT_MODEL, kv_overrides=override)


def test_an_override_is_honoured():
    with StarVLM(refvlm.TEXT_MODEL, kv_overrides={"tokenizer.ggml.add_bos_token": False}, **REF) as vlm:
        assert len(vlm.tokenize("a", [], chat=False).chunks[0].tokens) >= 1
        assert vlm.generate("a", max_tokens=1).finish_reason


# ---- calls of an engine ----


@pytest.mark.parametrize(
    "pictures",
    [
        None,
        5,
        [5],
        [np.zeros((2, 2))],
        [np.zeros((4, 4, 3))],
        [np.zeros((4000, 4000, 1), np.uint8)],  # libmtmd would read past its end
        [np.zeros((0, 4, 3), np.uint8)],
        np.zeros((4, 4, 3), np.uint8),
    ],
    ids=lambda p: type(p).__name__ + str(getattr(p[0], "shape", "")) if isinstance(p, list) else type(p).__name__,
)
def test_pictures_of_tokenize(vlm, pictures):
    with pytest.raises((errors.ConfigError, errors.ImageError)):
        vlm.tokenize(QUESTION, pictures)


def test_pictures_that_are_not_contiguous(vlm):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    mirrored = pixels[:, ::-1]
    features = []
    for picture in (mirrored, mirrored.copy()):
        with contextlib.closing(vlm.tokenize(QUESTION, [picture])) as prompt:
            image = next(chunk for chunk in prompt.chunks if hasattr(chunk, "grid"))
            features.append(vlm.encoder.encode(image).embeddings.copy())
    assert np.array_equal(*features)


def test_inspections(vlm, tmp_path):
    inspection = vlm.inspect(QUESTION, refvlm.DEMO_IMAGE, decoder_layers=[0])
    assert inspection.to_image(np.int64(0)).shape == (144,)
    for arguments in ((5,), ("a",), (0, 7), (0, -1), (None,)):
        with pytest.raises(errors.ConfigError):
            inspection.to_image(*arguments)
    for path in (tmp_path / "none" / "x.npz", "\0"):
        with pytest.raises(errors.OutputError, match="cannot be written"):
            inspection.save(path)
    with pytest.raises(errors.ConfigError, match="path=5"):
        inspection.save(5)
    inspection.save(tmp_path / "x.npz")
    assert np.load(tmp_path / "x.npz")["decoder_0"].ndim == 3


def test_pictures_of_reports(vlm):
    report = vlm.generate(QUESTION, refvlm.DEMO_IMAGE, max_tokens=1).report
    for arguments in ({"index": "a"}, {"index": 7}, {"index": -1}, {"limits": 5}, {"index": 0.5}):
        with pytest.raises(errors.ConfigError, match=f"{next(iter(arguments))}|no image"):
            report.picture(refvlm.DEMO_IMAGE, **arguments)


@pytest.mark.parametrize(
    "returned",
    [np.zeros(5, np.float32), "x", None, object(), [[1.0], [2.0, 3.0]]],
    ids=["array", "str", "None", "object", "ragged"],
)
def test_what_logits_processors_return(vlm, returned):
    with pytest.raises(errors.ConfigError, match="logits_processor returned"):
        vlm.generate("x", logits_processor=[lambda tokens, logits: returned], max_tokens=2)


def test_an_answer_fills_the_context_beside_a_narrow_picture():
    """M-RoPE, 1,875 image tokens: the answer that is not UTF-8 text ends with the context, and no decode goes past
    it."""
    folder = FOLDER / "qwen3-vl"
    with StarVLM(folder / "text.gguf", folder / "mmproj.gguf", n_ctx=2048, n_threads=1) as vlm:
        answer = vlm.generate("a", [np.zeros((1, 60000, 3), np.uint8)], None, None)
        assert answer.finish_reason == "length" and answer.report.n_kv_cells + answer.report.n_generated == 2048


def test_a_decode_that_fails_while_answering_is_typed(vlm, monkeypatch):
    def fail(*_):
        raise RuntimeError("llama_decode returned 1")

    stream = vlm.generate(QUESTION, refvlm.DEMO_IMAGE, max_tokens=8, stream=True, logit_bias={2: -100.0})
    next(stream)
    with monkeypatch.context() as patched:
        patched.setattr("llama_cpp._internals.LlamaContext.decode", fail)
        with pytest.raises(errors.EngineError, match="llama_decode returned 1"):
            list(stream)


# ---- configs, files, the hub ----


@pytest.mark.parametrize("value", [np.array([1, 2]), np.array(["attention"]), ["attention"], None, 5, b"x"], ids=repr)
@pytest.mark.parametrize("name", ["vision_scorer", "decoder_scorer", "representatives", "budget", "positions"])
def test_names_of_a_config(name, value):
    with pytest.raises(errors.ConfigError, match=name):
        PruneConfig(**{name: value})


def test_numbers_of_numpy_in_a_config():
    config = PruneConfig(decoder_layer=np.int64(2), seed=np.uint8(3), vision_keep=np.int32(5), decoder_keep=np.int16(4))
    assert config == PruneConfig(**json.loads(json.dumps(config.to_dict())))
    windows = PruneConfig(windows=((np.int64(2), np.float32(0.5)), (np.float64(0.75), 0.25)))
    assert windows == PruneConfig(**json.loads(json.dumps(windows.to_dict())))


@pytest.mark.parametrize("spec", [5, None, b"a/b", ["a/b"], "", "a/b:\0"], ids=repr)
def test_specs_of_the_hub(spec):
    with pytest.raises(errors.ConfigError):
        hub.fetch(spec)


def test_paths_of_batches_and_evaluations():
    settings = batch.Settings(None)
    for path in (5, None, "\0"):
        with pytest.raises(errors.ConfigError):
            batch.describe_model(path, None, {})
        with pytest.raises(errors.ConfigError):
            batch.read_tasks(path, "x", settings)
    with pytest.raises(errors.OutputError):
        batch.open_results("\0", [], "m")
    with pytest.raises(errors.EvaluationError):
        fingerprint_file("\0")


@pytest.mark.parametrize("field", ["task", "config", "task_fingerprint", "config_fingerprint"])
@pytest.mark.parametrize("value", [[1], {}, None, 5], ids=repr)
def test_records_of_wrong_types(tmp_path, field, value):
    path = tmp_path / "results.jsonl"
    record = {"task": "a", "config": "b", "task_fingerprint": "c", "config_fingerprint": "d", field: value}
    path.write_text(json.dumps({"star_edge_eval": 1}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(errors.EvaluationError, match="line 2 is not a result"):
        Records(str(path), {}, [], [])


# ---- model files ----


@pytest.mark.parametrize("eos", [None, 512, 1000])
def test_a_file_whose_end_of_text_is_no_token(tmp_path, eos):
    """The chat template got the text of a token that the vocabulary does not have, which ended the process."""
    source = FOLDER / "gemma4" / "text.gguf"
    path = tmp_path / "text.gguf"
    name = "tokenizer.ggml.eos_token_id"
    rewrite(source, path, remove=[name], add=[] if eos is None else [(name, eos)])
    with StarVLM(path, **REF) as vlm:
        assert vlm.generate("a", max_tokens=2).finish_reason


def test_a_chat_template_that_cannot_be_parsed(tmp_path):
    path = tmp_path / "text.gguf"
    name = "tokenizer.chat_template"
    rewrite(FOLDER / "qwen3-vl" / "text.gguf", path, remove=[name], add=[(name, "{% for x in %}")])
    with pytest.raises(errors.ModelFileError, match="chat template"):
        StarVLM(path, **REF)
    with pytest.raises(errors.ModelFileError, match="chat template"):  # and the server's
        make_app(path, FOLDER / "qwen3-vl" / "mmproj.gguf", alias="m", n_ctx=512)


def test_a_window_that_llama_cpp_cannot_multiply(tmp_path):
    path = tmp_path / "text.gguf"
    name = "gemma4.attention.sliding_window"
    rewrite(FOLDER / "gemma4" / "text.gguf", path, remove=[name], add=[(name, 2**31)])
    with pytest.raises(errors.ModelFileError, match="sliding_window"):
        StarVLM(path, **REF)


def test_a_token_that_is_there_twice(tmp_path):
    """llama.cpp asserts that all tokens differ. It gives empty ones names of their own."""
    key = "tokenizer.ggml.tokens"
    tokens = list(gguf.GGUFReader(str(refvlm.TEXT_MODEL)).fields[key].contents())
    twice, empty = [*tokens], [*tokens]
    twice[-1] = tokens[-2]
    empty[-1] = empty[-2] = ""
    rewrite(refvlm.TEXT_MODEL, tmp_path / "twice.gguf", remove=[key], add=[(key, twice)])
    with pytest.raises(errors.ModelFileError, match="twice in its vocabulary"):
        StarVLM(tmp_path / "twice.gguf")
    rewrite(refvlm.TEXT_MODEL, tmp_path / "empty.gguf", remove=[key], add=[(key, empty)])
    with StarVLM(tmp_path / "empty.gguf", n_ctx=256) as vlm:
        assert vlm.generate("x", max_tokens=1)
