"""What a mass is worth where only some layers have attention.

    python benchmarks/hybrid_masses.py

Each image token of a prompt stands four times in a row, at one position. Merged into one token they are the same
prompt with a mass of 4. In attention alone that is nearly exact: a softmax with log 4 added to a logit is the softmax
with four equal ones. A recurrent layer reads a token once instead of four times, whatever its mass. Printed for random
decoders of eight layers: the root mean square of what merging changes in the logits of the last text row, without and
with masses, in units of their deviation, over ten prompts.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers import stock
from helpers.models import LFM2, LLAMA, QWEN35, Models, random_prompt

from star_edge.decoder.prefill import prefill
from star_edge.llamacpp.context import DecoderContext, attach_tap
from star_edge.llamacpp.tap import Tap
from star_edge.rows import Rows
from star_edge.synthetic import write_decoder

TIMES, N_PROMPTS, N_LAYERS = 4, 10, 8
DECODERS = {
    "Llama: attention in all layers": LLAMA,
    "Qwen3.5, attention in every second layer": replace(QWEN35, n_layers=N_LAYERS, attention_layers=(1, 3, 5, 7)),
    "Qwen3.5, attention in every fourth layer": replace(QWEN35, n_layers=N_LAYERS, attention_layers=(3, 7)),
    "LFM2, attention in every second layer": replace(LFM2, n_layers=N_LAYERS, attention_layers=(1, 3, 5, 7)),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in DECODERS.items():
            path = Path(folder) / "text.gguf"
            write_decoder(path, shape, "f32", seed=1, sharpness=2.0)
            tap, llama = Tap(), stock.load(path, False, n_threads=1)
            attach_tap(llama, tap)
            without, with_masses = measure(DecoderContext(llama, tap), Models(path, path, shape))
            print(f"{name}: {without:.3f} without masses, {with_masses:.3f} with them", flush=True)
            llama.close()
            tap.close()


def measure(context: DecoderContext, models: Models) -> tuple[float, float]:
    errors: list[list[np.ndarray]] = [[], []]
    for seed in range(N_PROMPTS):
        read = []
        for kind in ("repeated", "merged", "masses"):
            prompt = random_prompt(models, [12, (8, 8), 20], seed)
            image = prompt.segments[1]
            if kind == "repeated":
                rows = np.repeat(np.arange(len(image.rows)), TIMES)
                image.rows = Rows(image.rows.positions[..., rows], embeddings=image.rows.embeddings[rows])
            elif kind == "masses":
                image.mass = np.full(len(image.rows), float(TIMES))
            context.clear()
            context.tap.set_cell_bias(None)
            read.append(prefill(context, prompt.segments, prompt.next_position).logits)
        for error, logits in zip(errors, read[1:]):
            error.append((logits - read[0]) / read[0].std())
    without, with_masses = (float(np.sqrt(np.mean(np.square(e)))) for e in errors)
    return without, with_masses


if __name__ == "__main__":
    main()
