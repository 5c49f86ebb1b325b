"""OpenVINO GenAI's CDPruner on a random Qwen2-VL of the sizes of `star-edge bench --shape qwen2-vl-2b`, for comparison.
Optional: needs an environment of its own.

    python -m venv .openvino && .openvino/bin/pip install -r benchmarks/openvino-requirements.txt
    .openvino/bin/python benchmarks/openvino_cdpruner.py [--folder DIR] [--repeats N] [--json FILE] [--tiny]

Makes the model and its tokenizer in code (nothing is downloaded), exports both with 4-bit weights, and asks VLMPipeline
the question of the shape: 35 tokens of text, a picture of 560 x 560 pixels, which is 400 tokens, and 40 tokens of text,
unpruned and with several pruning ratios in turn. --tiny tries the script on a model of a few megabytes.

With --serve it answers requests from stdin instead, one line of JSON each: so benchmarks/openvino_beside.py measures it
in turn with llama.cpp. Every request has a picture and a text of its own: the pipeline keeps prompts that it has seen.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import statistics
import string
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
import torch
from openvino_tokenizers import convert_tokenizer
from optimum.intel import OVModelForVisualCausalLM, OVWeightQuantizationConfig
from other_process import serve, take_stdout
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

RATIOS = (0, 75, 90)  # per cent of the image tokens that are dropped
SIDE = 560
# Letters around the picture. With what the template has at both ends, 6 and 13 tokens, they make 35 and 40 tokens
N_BEFORE, N_AFTER = 29, 27
TEXT = dict(
    hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960
)
VISION = dict(
    depth=32, embed_dim=1280, num_heads=16, mlp_ratio=4, patch_size=14, spatial_merge_size=2, temporal_patch_size=2
)
TINY_TEXT = TEXT | dict(
    hidden_size=384, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, intermediate_size=768
)
TINY_VISION = VISION | dict(depth=2, embed_dim=128, num_heads=4)
N_VOCAB = 151936
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(folder: Path) -> Qwen2TokenizerFast:
    """One token for each byte, the special ones after them, and words that nobody writes up to the size of the
    vocabulary.
    """
    words = [*sorted(ByteLevel.alphabet()), *SPECIAL]
    words += [f"unused{i}" for i in range(N_VOCAB - len(words))]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    made = Qwen2TokenizerFast(
        str(folder / "vocab.json"), str(folder / "merges.txt"), additional_special_tokens=list(SPECIAL[1:])
    )
    made.chat_template = TEMPLATE
    return made


def make(folder: Path, tiny: bool) -> Path:
    """A folder with the exported model."""
    source, done = folder / "torch", folder / "openvino"
    if (done / "openvino_detokenizer.xml").exists():
        return done
    source.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(source)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")
    }
    ids |= {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video", "vision")
    }
    text, vision = (TINY_TEXT, TINY_VISION) if tiny else (TEXT, VISION)
    config = Qwen2VLConfig(
        **text,
        **ids,
        vision_config=vision | {"hidden_size": text["hidden_size"]},
        vocab_size=N_VOCAB,
        tie_word_embeddings=True,
        rope_theta=1e6,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
        bos_token_id=tokenizer.convert_tokens_to_ids(SPECIAL[0]),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen2VLForConditionalGeneration(config).save_pretrained(source)
    torch.set_default_dtype(torch.float32)
    for made in (tokenizer, Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=1280 * 28 * 28)):
        made.save_pretrained(source)
        made.save_pretrained(done)
    bits = OVWeightQuantizationConfig(bits=4, sym=False, group_size=64, ratio=1.0)
    model = OVModelForVisualCausalLM.from_pretrained(source, export=True, compile=False, quantization_config=bits)
    model.save_pretrained(done)
    for made, name in zip(
        convert_tokenizer(tokenizer, with_detokenizer=True), ("openvino_tokenizer", "openvino_detokenizer")
    ):
        ov.save_model(made, done / f"{name}.xml")
    return done


def question(seed: int) -> dict[str, str]:
    """A picture as a data URL, and letters before and after it."""
    rng = np.random.default_rng(seed)
    image = np.zeros((SIDE, SIDE, 3))
    for n in (4, 14, 56):
        at = np.arange(SIDE) * n // SIDE
        image += rng.integers(0, 256, (n, n, 3))[at[:, None], at[None]]
    file = io.BytesIO()
    Image.fromarray((image / 3).astype(np.uint8)).save(file, "PNG")
    before, after = ("".join(random.Random(seed).choices(string.ascii_lowercase, k=n)) for n in (N_BEFORE, N_AFTER))
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"picture": url, "before": before, "after": after}


class Clock(genai.StreamerBase):
    """Records when each token is there."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, token: int | list[int]) -> genai.StreamingStatus:
        self.times.append(time.perf_counter())
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def ask(
    pipeline: genai.VLMPipeline, picture: str, before: str, after: str, ratio: int, n_generate: int = 1
) -> dict[str, float]:
    """One answer, timed from the encoded picture on.

    Args:
        pipeline: The model.
        picture: A data URL.
        before: Text before the picture.
        after: Text after it.
        ratio: Per cent of the image tokens that are dropped.
        n_generate: Tokens of the answer.

    Returns:
        first_token_ms: From the call to the first token. genai_first_token_ms: the same by GenAI's own clock, which
        starts with decoded pixels. embeddings_ms: of the former, what is done before the decoder. prompt_tokens: by
        GenAI.
        ms_per_token: of tokens after the first, if there are any.
    """
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.pruning_ratio = n_generate, True, ratio
    clock = Clock()
    start = time.perf_counter()
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).convert("RGB"))
    decoded = time.perf_counter()
    metrics = pipeline.generate(
        f"{before}<ov_genai_image_0>{after}", images=[ov.Tensor(pixels[None])], generation_config=config, streamer=clock
    ).perf_metrics
    found = {
        "first_token_ms": 1e3 * (clock.times[0] - start),
        "genai_first_token_ms": metrics.get_ttft().mean,
        "embeddings_ms": 1e3 * (decoded - start) + metrics.get_prepare_embeddings_duration().mean,
        "prompt_tokens": metrics.get_num_input_tokens(),
    }
    return found | ({"ms_per_token": metrics.get_tpot().mean} if n_generate > 1 else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, help="where the model is kept for the next time; default: a temporary folder"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="(%(default)s)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--serve", action="store_true", help="answer requests from stdin")
    options = parser.parse_args()
    versions = {name: version(name) for name in ("openvino-genai", "openvino", "optimum-intel", "transformers")}
    answers = take_stdout() if options.serve else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = make(options.folder or Path(temporary), options.tiny)
        pipeline = genai.VLMPipeline(str(folder), "CPU", INFERENCE_NUM_THREADS=options.threads)
        if answers is not None:
            serve(answers, {"versions": versions}, lambda **request: ask(pipeline, **request))
            return
        samples: dict[int, list[dict[str, float]]] = {ratio: [] for ratio in RATIOS}
        for repeat in range(options.repeats + 1):
            for i in range(len(RATIOS)):
                ratio = RATIOS[(i + repeat) % len(RATIOS)]
                sample = ask(pipeline, **question(repeat * len(RATIOS) + i), ratio=ratio, n_generate=17)
                if repeat:
                    samples[ratio].append(sample)
                print(f"repeat {repeat}, {ratio}%: {sample}", flush=True)
    medians = {ratio: {key: statistics.median(s[key] for s in of) for key in of[0]} for ratio, of in samples.items()}
    base = medians[0]
    rows = [
        {"pruning_ratio": ratio, "speed_up": base["first_token_ms"] / m["first_token_ms"], **m}
        for ratio, m in medians.items()
    ]
    print(
        "| pruning ratio | prompt tokens | first token, ms | of it, picture to embeddings | speed-up | ms per token |\n"
        "|---|---:|---:|---:|---:|---:|"
    )
    for row in rows:
        print(
            f"| {row['pruning_ratio']}% | {row['prompt_tokens']:.0f} | {row['first_token_ms']:.0f} | "
            f"{row['embeddings_ms']:.0f} | {row['speed_up']:.2f} | {row['ms_per_token']:.1f} |"
        )
    if options.json:
        options.json.write_text(
            json.dumps({"versions": versions, "repeats": options.repeats, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
