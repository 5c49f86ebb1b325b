"""Bad input: each kind has its own typed error that names the cause, and the engine answers the next request."""

import dataclasses
import functools
import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.gguf_files import rewrite
from helpers.models import QWEN2VL, random_image
from helpers.pictures import png
from helpers.presets import kept
from PIL import Image

from star_edge import PRESETS, PruneConfig, StarVLM, errors, refvlm
from star_edge.chat import ChatFormat
from star_edge.cli.doctor import _describe
from star_edge.io.images import ImageLimits
from star_edge.llamacpp import native
from star_edge.pruning.presets import override
from star_edge.synthetic import DecoderShape, write_decoder

QUESTION = "how many squares?"


@pytest.fixture(scope="module")
def vlm():
    with StarVLM(
        refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=256, image_limits=ImageLimits(max_pixels=1_000_000, timeout_s=2)
    ) as engine:
        engine.expected = engine.generate(QUESTION, refvlm.DEMO_IMAGE, max_tokens=4).text
        yield engine


@pytest.fixture
def fails(vlm):
    """Asserts that a call raises the error, that the message has the words, and that the engine is as good as
    before.
    """

    def check(error, words, call):
        with pytest.raises(error) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert word in message, message
        assert vlm.generate(QUESTION, refvlm.DEMO_IMAGE, max_tokens=4).text == vlm.expected
        return caught.value

    return check


def ask(vlm, image=refvlm.DEMO_IMAGE, prune="balanced", prompt=QUESTION, **options):
    return vlm.generate(prompt, image, prune, max_tokens=4, **options)


# ---- files ----


def test_missing_file(tmp_path):
    with pytest.raises(errors.ModelFileError, match="nowhere.gguf does not exist"):
        StarVLM(tmp_path / "nowhere.gguf")
    with pytest.raises(errors.ModelFileError, match="nowhere.gguf does not exist"):
        StarVLM(refvlm.TEXT_MODEL, tmp_path / "nowhere.gguf")
    with pytest.raises(errors.ModelFileError, match="not a file"):
        StarVLM(tmp_path)


@pytest.mark.parametrize("which", ["text", "mmproj"])
@pytest.mark.parametrize("size", [0, 3, 20, 3000, -1000])
def test_truncated_file(tmp_path, which, size):
    source = refvlm.TEXT_MODEL if which == "text" else refvlm.MMPROJ
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(source.read_bytes()[:size])
    with pytest.raises(errors.ModelFileError) as caught:
        StarVLM(broken) if which == "text" else StarVLM(refvlm.TEXT_MODEL, broken)
    said = str(caught.value)
    assert "broken.gguf" in said and any(words in said for words in ("truncated", "empty", "not a GGUF"))


def test_file_that_is_no_gguf(tmp_path):
    other = tmp_path / "model.gguf"
    other.write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(errors.ModelFileError, match="not a GGUF file"):
        StarVLM(other)


def test_damaged_header(tmp_path):
    data = bytearray(refvlm.TEXT_MODEL.read_bytes())
    data[8:24] = struct.pack("<QQ", 2**60, 2**60)  # tensors and keys without end
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(errors.ModelFileError, match="header"):
        StarVLM(tmp_path / "m.gguf")


def test_files_given_in_each_others_place():
    with pytest.raises(errors.ModelFileError, match="is an mmproj file"):
        StarVLM(refvlm.MMPROJ)
    with pytest.raises(errors.ModelFileError, match="is a text model"):
        StarVLM(refvlm.TEXT_MODEL, refvlm.TEXT_MODEL)


def test_mmproj_of_another_model(tmp_path):
    write_decoder(tmp_path / "wide.gguf", DecoderShape(2, 64, 4, 2, 64))
    with pytest.raises(errors.ModelMismatchError) as caught:
        StarVLM(tmp_path / "wide.gguf", refvlm.MMPROJ)
    assert "64" in str(caught.value) and "256" in str(caught.value)


def test_images_for_a_text_model():
    with StarVLM(refvlm.TEXT_MODEL, n_ctx=256) as text_only:
        with pytest.raises(errors.UnsupportedModelError, match="without a vision encoder"):
            text_only.generate(QUESTION, refvlm.DEMO_IMAGE)
        answer = text_only.generate("is there a red star?", max_tokens=4)
        assert answer.text and answer.report.n_image_tokens == 0


def test_no_chat_template(tmp_path, families):
    with StarVLM(families["llama"].text, n_ctx=256) as vlm:
        vlm._chat.exists = False
        with pytest.raises(errors.UnsupportedModelError, match="chat template"):
            vlm.generate("hello")
        assert vlm.generate("hello", chat=False, max_tokens=2).report.n_text_tokens > 0


def test_kv_types():
    with pytest.raises(errors.ConfigError, match="q9_9"):
        StarVLM(refvlm.TEXT_MODEL, type_k="q9_9")
    with pytest.raises(errors.ConfigError, match="needs flash attention"):
        StarVLM(refvlm.TEXT_MODEL, type_v="q8_0", flash_attn=False)


# ---- images ----


def jpeg():
    buffer = io.BytesIO()
    Image.fromarray(random_image(0)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        (b"", errors.ImageError, ["empty"]),
        (jpeg()[:400], errors.ImageError, []),
        (b"this is no image at all", errors.ImageError, ["23 bytes"]),
        ("no/such/picture.jpg", errors.ImageError, ["no/such/picture.jpg"]),
        (png(60000, 60000), errors.ImageTooLargeError, ["60000"]),
        (png(2000, 2000), errors.ImageTooLargeError, ["2000"]),
        (np.full((4, 4, 3), np.nan), errors.ImageError, []),
        ("http://127.0.0.1:9/none.png", errors.ImageError, ["127.0.0.1"]),
        ("data:image/png;base64,AAAA", errors.ImageError, []),
        (42, errors.ImageError, ["int"]),
    ],
    ids=["empty", "truncated", "no-image", "missing", "bomb", "large", "nan", "http", "data", "type"],
)
def test_images(vlm, fails, image, error, words):
    fails(error, words, lambda: ask(vlm, [image]))


def test_more_images_than_markers(vlm, fails):
    two = [refvlm.DEMO_IMAGE, refvlm.DEMO_IMAGE]
    fails(
        errors.PromptError,
        ["1 image markers for 2 images"],
        lambda: ask(vlm, two, prompt="USER:<__media__>x ASSISTANT:", chat=False),
    )
    fails(
        errors.PromptError,
        ["2 image markers for 1 images"],
        lambda: ask(vlm, prompt="<__media__>a<__media__>b", chat=False),
    )


# ---- limits and configs ----


def test_prompt_over_the_context_is_refused_before_any_compute(vlm, fails, monkeypatch):
    def must_not_run(*args, **kwargs):
        raise AssertionError("the encoder ran")

    with monkeypatch.context() as patch:
        patch.setattr(vlm.encoder, "encode", must_not_run)
        with pytest.raises(errors.ContextLengthError, match="context of 256"):
            ask(vlm, [refvlm.DEMO_IMAGE] * 6)
    fails(errors.ContextLengthError, ["256", "n_ctx"], lambda: ask(vlm, [refvlm.DEMO_IMAGE] * 4, None, prompt=QUESTION))
    # the same two images fit once half of their tokens are dropped
    fails(errors.ContextLengthError, [], lambda: ask(vlm, [refvlm.DEMO_IMAGE] * 2, None))
    assert ask(vlm, [refvlm.DEMO_IMAGE] * 2).report.n_vision_kept == 2 * kept("balanced").vision


def test_more_tokens_than_ubatch_is_no_error():
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_ubatch=32, n_batch=32) as small:
        assert small.generate("what color is the triangle?", refvlm.DEMO_IMAGE, max_tokens=4).text.strip() == "red"


def test_non_causal_image_must_fit_one_ubatch(vlm, fails, monkeypatch):
    original = vlm.encoder.tokenize

    def non_causal(*args, **kwargs):
        prompt = original(*args, **kwargs)
        for chunk in prompt.chunks:
            chunk.causal = False
        return prompt

    monkeypatch.setattr(vlm.decoder, "n_ubatch", 100)
    with monkeypatch.context() as patch:
        patch.setattr(vlm.encoder, "tokenize", non_causal)
        with pytest.raises(
            errors.ContextLengthError, match="144 tokens must be processed at once.*n_ubatch is 100: use n_ubatch=144"
        ):
            ask(vlm, prune=None)
    fails(errors.ConfigError, [], lambda: ask(vlm, prune="zzz"))


@pytest.mark.parametrize("keep", [0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf"), True, "half", None])
@pytest.mark.parametrize("name", ["vision_keep", "decoder_keep"])
def test_keep_values(name, keep):
    with pytest.raises(errors.ConfigError, match=name):
        PruneConfig(**{name: keep})


def test_keep_over_the_count(vlm, fails):
    fails(errors.ConfigError, ["vision_keep=145", "144"], lambda: ask(vlm, prune=PruneConfig(vision_keep=145)))
    fails(errors.ConfigError, ["decoder_keep=200", "144"], lambda: ask(vlm, prune=PruneConfig(decoder_keep=200)))
    with pytest.raises(errors.ConfigError, match="more than vision_keep"):
        PruneConfig(vision_keep=0.25, decoder_keep=0.5)


@pytest.mark.parametrize("layer", [0, -1, 1.5, True])
def test_layers_that_no_model_has(layer):
    with pytest.raises(errors.ConfigError, match="decoder_layer"):
        PruneConfig(decoder_layer=layer)


@pytest.mark.parametrize("layer", [6, 7, 100])
def test_layers_that_this_model_does_not_have(vlm, fails, layer):
    fails(errors.ConfigError, [f"decoder_layer={layer}", "1..5"], lambda: ask(vlm, prune=PruneConfig(0.5, 0.25, layer)))


def test_prune_values(vlm, fails):
    fails(errors.ConfigError, ["'fastest'", "balanced"], lambda: ask(vlm, prune="fastest"))
    fails(errors.ConfigError, ["float"], lambda: ask(vlm, prune=0.5))
    for options in (
        {"vision_scorer": "some"},
        {"decoder_scorer": "cls"},
        {"representatives": "x"},
        {"positions": "new"},
        {"seed": -1},
        {"seed": 0.5},
        {"vision_share": 1.5},
        {"decoder_share": "half"},
        {"decoder_share": float("nan")},
        {"redundancy": "some"},
        {"redundancy": -0.1},
        {"redundancy": 1.0},
        {"redundancy": True},
        {"redundancy": float("nan")},
        {"redundancy": None},
        {"encoder_keep": 0},
        {"encoder_keep": 1.5},
        {"encoder_layer": 0},
        {"encoder_layer": 1.5},
        {"windows": ((2, 0.5),), "decoder_keep": 0.5},
        {"windows": "ab"},
        {"windows": ((2,),)},
        {"windows": ((0, 0.5),)},
        {"windows": ((1.0, 0.5),)},
        {"windows": ((2, 0.25), (4, 0.5))},
        {"vision_keep": 0.25, "windows": ((2, 0.5),)},
        {"windows": ((2, 0.0),)},
        {"windows": ((1, 0.5),) * 7},
    ):
        with pytest.raises(errors.ConfigError, match="window" if "windows" in options else next(iter(options))):
            PruneConfig(**options)
    fails(errors.ConfigError, ["ascending"], lambda: ask(vlm, prune=PruneConfig(windows=((4, 0.5), (2, 0.25)))))
    fails(errors.ConfigError, ["1..5"], lambda: ask(vlm, prune=PruneConfig(windows=((4, 0.5), (6, 0.25)))))


@pytest.mark.parametrize(
    "options",
    [
        {"suffix": "x"},
        {"bogus": 3},
        {"logprobs": 3},
        {"max_tokens": 0},
        {"max_tokens": "a"},
        {"temperature": float("nan")},
        {"temperature": -1},
    ],
)
def test_sampling_options_are_checked_before_compute(vlm, fails, monkeypatch, options):
    with monkeypatch.context() as patch:
        patch.setattr(vlm, "read_prompt", lambda *a, **k: pytest.fail("computed"))
        with pytest.raises(errors.ConfigError, match=next(iter(options))):
            vlm.generate(QUESTION, refvlm.DEMO_IMAGE, **options)
    fails(errors.ConfigError, [], lambda: ask(vlm, prune="zzz"))


@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": 1},
        {"n_ctx": -5},
        {"n_batch": 1},
        {"n_ubatch": 0},
        {"n_gpu_layers": -7},
        {"vocab_only": True},
        {"n_gpu_layer": -1},
        {"n_ctx": 4.5},
    ],
)
def test_constructor_options(options):
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        StarVLM(refvlm.TEXT_MODEL, **options)


def test_smallest_context():
    with StarVLM(refvlm.TEXT_MODEL, n_ctx=2) as tiny, pytest.raises(errors.ContextLengthError, match="context of 2"):
        tiny.generate("is there a red star?")


@pytest.mark.parametrize("prompt", [None, b"bytes", 3, "a\udcffb"])
def test_prompts_that_are_no_text(vlm, fails, prompt):
    fails(errors.PromptError, ["prompt"], lambda: ask(vlm, prompt=prompt))


def test_chat_templates(vlm):
    """Templates that loop over the parts of a message, that take one string, and that are none."""
    text = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    plus = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    for template, expected in ((text, "[INST] <__media__>what? [/INST]"), (plus, "<|user|><__media__>what?")):
        assert ChatFormat(vlm.llama, template).format("what?", 1) == expected
    with pytest.raises(errors.PromptError, match="only assistants"):
        ChatFormat(vlm.llama, "{{ raise_exception('only assistants') }}").format("what?", 1)
    with pytest.raises(errors.UnsupportedModelError, match="chat template cannot be used"):
        ChatFormat(vlm.llama, "{{ foo(")


# ---- the extension beside another llama-cpp-python ----


def test_version_check():
    native.check_version("0.3.36", "0.3.36")
    with pytest.raises(errors.VersionMismatchError) as caught:
        native.check_version("0.3.36", "0.3.37")
    assert "0.3.36" in str(caught.value) and "0.3.37" in str(caught.value) and "pip install" in str(caught.value)


def test_import_beside_another_version():
    code = "import llama_cpp; llama_cpp.__version__ = '9.9.9'\nimport star_edge"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "VersionMismatchError" in done.stderr and "9.9.9" in done.stderr


def test_recurrent_decoders_have_no_decoder_stage(vlm, monkeypatch):
    monkeypatch.setattr(vlm.decoder, "stage_problem", "a recurrent decoder has no cache of single tokens")
    answer = ask(vlm)
    assert answer.report.decoder_layer is None and "no decoder stage" in answer.report.notes[0]
    assert answer.report.n_decoder_kept == answer.report.n_vision_kept == kept("balanced").vision


def test_graphs_without_windows_answer_without_a_decoder_stage(vlm, monkeypatch):
    """A window that the graph does not allow is found while running; the answer comes without a decoder stage, and says
    so.
    """
    monkeypatch.setattr(vlm.decoder, "n_layers", 9)  # the graph has 6: layer 7 never comes
    monkeypatch.setattr(vlm.decoder, "layer_problems", {})
    answer = ask(vlm, prune=PruneConfig(0.5, 0.25, 7))
    assert answer.report.decoder_layer is None and answer.report.n_decoder_kept == 72
    assert "no decoder stage: probe" in answer.report.notes[0]
    expected = ask(vlm, prune=PruneConfig(0.5))
    assert answer.text == expected.text
    assert "no decoder stage" in ask(vlm, prune=PruneConfig(0.5, 0.25, 7)).report.notes[0]  # remembered, for this layer
    assert ask(vlm, prune=PruneConfig(0.5, 0.25, 2)).report.decoder_layer == 2


def test_doctor_says_what_a_request_has_found(vlm, monkeypatch):
    """Of the layer that is chosen for the model: 7 of 20, which the graph of 6 does not have."""
    monkeypatch.setattr(vlm.decoder, "layer_problems", {})
    assert _describe(vlm)["decoder_stage"] == "yes"
    monkeypatch.setattr(vlm.decoder, "n_layers", 20)
    assert ask(vlm, prune=PruneConfig(0.5, 0.25)).report.decoder_layer is None
    assert _describe(vlm)["decoder_stage"].startswith("no: probe")


def test_prompts_past_the_sliding_window(vlm, monkeypatch):
    monkeypatch.setattr(vlm.decoder, "n_swa", 40)
    answer = ask(vlm)
    assert answer.report.decoder_layer is None and "sliding window of 40" in answer.report.notes[0]
    monkeypatch.setattr(vlm.decoder, "n_swa", 100)
    assert ask(vlm).report.decoder_layer == 4


def test_a_glm_without_rope_sections_takes_no_images(tmp_path):
    """llama.cpp would end the process at the first one. Text it answers."""
    folder = Path(__file__).parent / "fixtures" / "glm4.1v"
    text = rewrite(folder / "text.gguf", tmp_path / "text.gguf", remove=["glm4.rope.dimension_sections"])
    with pytest.raises(errors.UnsupportedModelError, match="RoPE sections"):
        StarVLM(text, folder / "mmproj.gguf", n_ctx=256, n_threads=1)
    with StarVLM(text, n_ctx=256, n_threads=1) as vlm:
        assert vlm.read_prompt("a", chat=False)[1].n_kv_cells


def test_shapes_of_random_models_are_checked(tmp_path):
    with pytest.raises(ValueError, match="260"):
        write_decoder(tmp_path / "m.gguf", DecoderShape(1, 32, 2, 2, 32, n_vocab=100))
    with pytest.raises(ValueError, match="multiple of 256"):
        write_decoder(tmp_path / "m.gguf", QWEN2VL.__class__(1, 32, 2, 2, 32), "q4_k_m")
    with pytest.raises(ValueError, match="q9"):
        write_decoder(tmp_path / "m.gguf", QWEN2VL, "q9")


class Unprintable:
    def __repr__(self):
        raise RuntimeError("it cannot be printed")

    __str__ = __repr__


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(PruneConfig)])
@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, -(10**5000), np.array([1, 2]), Unprintable(), [Unprintable()], {"a": "x" * 10**6}],
    ids=["long", "digits", "array", "unprintable", "in a list", "long in an object"],
)
def test_any_value_of_a_config_is_a_short_typed_error(field, value):
    for make in (PruneConfig, functools.partial(override, PRESETS["fast"])):
        with pytest.raises(errors.ConfigError) as caught:
            make(**{field: value})
        assert len(str(caught.value)) < 600 and field in str(caught.value)


def test_tolerances_that_no_float_holds():
    for name in ("vision_tolerance", "encoder_tolerance"):
        with pytest.raises(errors.ConfigError, match=f"{name}=a number of more than 300 digits"):
            PruneConfig(0.5, encoder_keep=0.5, **{name: 10**400})
