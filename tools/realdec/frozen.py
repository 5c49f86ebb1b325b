"""What if rows that a decoder stage drops could still be read above layer K? In torch, beside the engine.

python tools/realdec/frozen.py MODELS/gemma-3-270m-q4_k_m.gguf [--split test] [--items 10]
(with what tools/realdec/frozen-requirements.txt lists)

A dropped row costs no more than its keys and values if they are made, in each layer from K on, from the state that it
had when it entered layer K ("frozen"). Early exits of language models fill their cache so (CALM, arXiv 2207.07061,
section 3.2.1). Compared with rows that are gone from K on, and with rows that are computed in some layers only. The
answer's tokens see all rows below K, as with `seen_below`, and the question does too.

Printed for each way: average rows (a frozen row counts as the share of a layer's weights that its keys and values
are), the share of items whose unpruned answer is the most likely one at each of its tokens, the same of items that are
answered right, and the mean KL divergence of these tokens in nats.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from prompts import MAX_ANSWER, PROMPTS, sentence
from tasks import TASKS, Item, make
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Way:
    """What is computed of the context in each layer.

    Attributes:
        name: As the table shows it.
        first: Layer K as a share of the layers: all rows below it.
        keep: Share of the rows that goes on, by the attention of the prompt's last row at layer K.
        frozen: The others can be read from K on, by keys and values of their state at K. False: they are gone.
        every: From K on all rows are computed in each layer of this number, counted from K. 0: in none.
    """

    name: str
    first: float
    keep: float = 0.0
    frozen: bool = True
    every: int = 0

    def full(self, layer: int, n_layers: int) -> bool:
        """Whether all rows are computed in this layer."""
        after = layer - round(self.first * n_layers)
        return after < 0 or (self.every > 0 and after % self.every == self.every - 1)

    def average(self, n_layers: int, cost: float) -> float:
        """Average rows. cost: of a frozen row, as a share of a computed one."""
        less = self.keep + (1 - self.keep) * cost * self.frozen
        return float(np.mean([1.0 if self.full(layer, n_layers) else less for layer in range(n_layers)]))


WAYS = [
    *(Way(f"all frozen from {first} L", first) for first in (0.2, 0.33, 0.45, 0.5, 0.6, 0.67, 0.8)),
    *(
        Way(f"a quarter from {first} L, others {'frozen' if frozen else 'gone'}", first, 0.25, frozen)
        for first in (0.33, 0.45, 0.67, 0.8)
        for frozen in (False, True)
    ),
    *(Way(f"from {first} L one layer of {every}", first, every=every) for first, every in ((0.2, 2), (0.2, 4))),
    Way("from 0.33 L one layer of 2", 0.33, every=2),
]


class Decoder:
    """A decoder of Hugging Face transformers, layer by layer. Each call computes all rows: short prompts only."""

    def __init__(self, path: Path) -> None:
        names = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        self.tokenizer = AutoTokenizer.from_pretrained(**names)
        self.lm = AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32).eval()
        self.model, self.config = self.lm.model, self.lm.config
        self.n_layers = len(self.model.layers)
        self.is_gemma = self.config.model_type.startswith("gemma")

    def cost(self) -> float:
        """Weights of a layer's keys and values as a share of its weights."""
        layer = self.model.layers[0]
        part = sum(p.numel() for m in (layer.self_attn.k_proj, layer.self_attn.v_proj) for p in m.parameters())
        return part / sum(p.numel() for p in layer.parameters())

    def read(self, item: Item) -> tuple[list[int], int, int]:
        """Tokens of a prompt, the first of its context and the number of those."""
        before, after = PROMPTS["gemma3" if self.is_gemma else "llama"]
        texts = (before, item.context, after.format(question=item.question, lead=item.leads[0]))
        parts = [
            self.tokenizer(text, add_special_tokens=i == 0 and self.is_gemma)["input_ids"]
            for i, text in enumerate(texts)
        ]
        return [*parts[0], *parts[1], *parts[2]], len(parts[0]), len(parts[1])

    def answer(self, prompt: list[int]) -> list[int]:
        """The greedy answer up to the end of its sentence, by transformers' own forward pass."""
        said: list[int] = []
        rows, past = torch.tensor([prompt]), None
        while len(said) < MAX_ANSWER and sentence(text := self.tokenizer.decode(said)) == text:
            out = self.lm(rows, past_key_values=past, use_cache=True)
            past = out.past_key_values
            said.append(int(out.logits[0, -1].argmax()))
            rows = torch.tensor([said[-1:]])
        return said

    def logits(self, tokens: list[int], first: int, n: int, n_prompt: int, way: Way | None) -> torch.Tensor:
        """Log-probabilities at the prompt's last row and after, (n_answer, n_vocab). None for all rows everywhere."""
        states = self.model.embed_tokens(torch.tensor([tokens]))
        ropes = self._ropes(states)
        context = slice(first, first + n)
        kept: torch.Tensor | None = None
        for i in range(self.n_layers):
            computed = torch.ones(len(tokens), dtype=torch.bool)
            if way is not None and not way.full(i, self.n_layers):
                if kept is None:
                    _, attention = self._layer(i, states, ropes, computed)
                    scores = attention[0].mean(dim=0)[n_prompt - 1, context]
                    kept = first + scores.topk(round(way.keep * n)).indices
                computed[context] = False
                computed[kept] = True
            seen = torch.ones_like(computed) if way is None or way.frozen else computed
            after, _ = self._layer(i, states, ropes, seen)
            states = torch.where(computed[None, :, None], after, states)
        return self.lm.lm_head(self.model.norm(states[:, n_prompt - 1 :]))[0].log_softmax(dim=-1)

    def _ropes(self, states: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        at = torch.arange(states.shape[1])[None]
        if not self.is_gemma:
            return {"full_attention": self.model.rotary_emb(states, at)}
        return {kind: self.model.rotary_emb(states, at, kind) for kind in set(self.config.layer_types)}

    def _layer(
        self, i: int, states: torch.Tensor, ropes: dict[str, tuple[torch.Tensor, torch.Tensor]], seen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows through layer i, and its attention (1, n_heads, n, n). seen: rows that can be read, (n,) bool."""
        layer, n = self.model.layers[i], states.shape[1]
        attention = layer.self_attn
        kind = self.config.layer_types[i] if self.is_gemma else "full_attention"
        x = layer.input_layernorm(states)
        q, k, v = (
            projection(x).view(1, n, -1, attention.head_dim).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if self.is_gemma:
            q, k = attention.q_norm(q), attention.k_norm(k)
        half = attention.head_dim // 2
        cos, sin = (part[:, None] for part in ropes[kind])
        q, k = (x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin for x in (q, k))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        back = torch.arange(n)[:, None] - torch.arange(n)[None]
        mask = (back >= 0) & (seen | (back == 0))
        if kind == "sliding_attention":
            mask &= back < self.config.sliding_window
        logits = (q @ k.transpose(-1, -2) * attention.scaling).masked_fill(~mask, float("-inf"))
        weights = logits.softmax(dim=-1)
        read = attention.o_proj((weights @ v).transpose(1, 2).reshape(1, n, -1))
        if self.is_gemma:
            states = states + layer.post_attention_layernorm(read)
            wide = layer.mlp(layer.pre_feedforward_layernorm(states))
            return states + layer.post_feedforward_layernorm(wide), weights
        states = states + read
        return states + layer.mlp(layer.post_attention_layernorm(states)), weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--items", type=int, default=10, help="of each task")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    decoder = Decoder(args.model)
    right: list[bool] = []
    same: dict[Way, list[bool]] = {way: [] for way in WAYS}
    divergence: dict[Way, list[float]] = {way: [] for way in WAYS}
    for item in (make(args.split, task, i) for i in range(args.items) for task in TASKS):
        prompt, first, n = decoder.read(item)
        said = decoder.answer(prompt)
        tokens, n_prompt = prompt + said[:-1], len(prompt)
        unpruned = decoder.logits(tokens, first, n, n_prompt, None)
        if unpruned.argmax(dim=-1).tolist() != said:  # a near tie between two ways to round
            continue
        right.append(re.search(rf"\b{re.escape(item.answers[0])}\b", decoder.tokenizer.decode(said)) is not None)
        for way in WAYS:
            pruned = decoder.logits(tokens, first, n, n_prompt, way)
            same[way].append(pruned.argmax(dim=-1).tolist() == said)
            divergence[way].append(float((unpruned.exp() * (unpruned - pruned)).sum(dim=-1).mean()))
    print(f"{args.model.stem}, {len(right)} items, first answers of which {100 * np.mean(right):.0f}% are right")
    print("| way | average rows, % | unchanged, % | of right ones | KL |\n|---|---|---|---|---|")
    for way in WAYS:
        of_right = np.mean(np.array(same[way])[right]) if any(right) else np.nan
        average = way.average(decoder.n_layers, decoder.cost())
        cells = [f"{100 * x:.0f}" for x in (average, np.mean(same[way]), of_right)]
        print("|", " | ".join([way.name, *cells, f"{np.mean(divergence[way]):.3f}"]), "|")


if __name__ == "__main__":
    main()
