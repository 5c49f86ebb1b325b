"""Acceptance: does llama.cpp answer as torch does, and how often are both right?

python tools/refvlm/accept.py RUN/model.pt --gguf DIR --questions DIR [--limit N] [--text refvlm-text-f16.gguf]

Answers are greedy. llama.cpp runs as llama-cpp-python ships it, with its own image handling and chat template; nothing
of star_edge takes part. Exit status 1 if fewer than 99.5% of the answers are the same.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from export import MMPROJ_F16, TEXT_Q8_0, load_model
from llama_cpp import Llama, mtmd_cpp
from llama_cpp._logger import llama_log_callback
from llama_cpp.llama_chat_format import MTMDChatHandler
from model import ReferenceVLM
from PIL import Image
from questions import FAMILIES
from vocabulary import EOS, decode, encode_question

REQUIRED_AGREEMENT = 0.995
_PICTURES_AT_ONCE = 16


@dataclass
class Asked:
    """A question, its true answer, and what torch and llama.cpp answered."""

    image: Path
    family: str
    question: str
    answer: str
    by_torch: str = ""
    by_llama: str = ""


def read_questions(folder: Path, limit: int | None, seed: int = 0) -> list[Asked]:
    """All questions of a split, or a random sample of them, in the order of their pictures."""
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    if limit and limit < len(rows):
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]
    return [Asked(folder / row["image"], row["category"], row["question"], row["answer"]) for row in rows]


def round_as_exported(model: ReferenceVLM) -> None:
    """Rounds what export.py writes in f16, in place: q8_0 is then the only difference that the format makes."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2 and name != "vision.positions":
                p.copy_(p.half().float())


@torch.no_grad()
def answer_with_torch(model: ReferenceVLM, asked: list[Asked], max_tokens: int) -> None:
    by_image: dict[Path, list[Asked]] = defaultdict(list)
    for a in asked:
        by_image[a.image].append(a)
    images = list(by_image)
    for start in range(0, len(images), _PICTURES_AT_ONCE):
        some = images[start : start + _PICTURES_AT_ONCE]
        pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in some])
        encoded = model.vision(torch.from_numpy(pixels))
        together = [by_image[path] for path in some]
        for row, answers in zip(together, _greedy(model, encoded, together, max_tokens)):
            for a, text in zip(row, answers):
                a.by_torch = text


def _greedy(model: ReferenceVLM, encoded: torch.Tensor, asked: list[list[Asked]], max_tokens: int) -> list[list[str]]:
    """Answers to the questions about each picture, all packed into one pass per token. encoded: (B, patches + 1,
    v_width).
    """
    prompts = [[encode_question(a.question) for a in row] for row in asked]
    n_questions = max(map(len, prompts))
    length = max(len(p) for row in prompts for p in row) + max_tokens - 1
    ids = torch.zeros(len(asked), n_questions, length, dtype=torch.long)
    for b, row in enumerate(prompts):
        for q, prompt in enumerate(row):
            ids[b, q, : len(prompt)] = torch.tensor(prompt)
    given = [[[] for _ in row] for row in prompts]
    for n in range(max_tokens):
        best = model.decode(encoded, ids).argmax(-1)
        for b, row in enumerate(prompts):
            for q, prompt in enumerate(row):
                end = len(prompt) + n
                token = int(best[b, q, end - 1])
                given[b][q].append(token)
                if n + 1 < max_tokens:
                    ids[b, q, end] = token
    return [[decode(tokens[: tokens.index(EOS)] if EOS in tokens else tokens) for tokens in row] for row in given]


def answer_with_llama(text: Path, mmproj: Path, asked: list[Asked], max_tokens: int, threads: int) -> None:
    # libmtmd prints several lines per picture unless it logs where llama.cpp does
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    mtmd_cpp.mtmd_log_set(llama_log_callback, None)
    mtmd_cpp.mtmd_helper_log_set(llama_log_callback, None)
    handler = MTMDChatHandler(clip_model_path=str(mmproj), verbose=False)
    llama = Llama(
        str(text), n_ctx=1024, n_threads=threads, n_threads_batch=threads, chat_handler=handler, verbose=False
    )
    for a in asked:
        content = [
            {"type": "image_url", "image_url": {"url": a.image.resolve().as_uri()}},
            {"type": "text", "text": a.question},
        ]
        reply = llama.create_chat_completion(
            [{"role": "user", "content": content}], temperature=0.0, max_tokens=max_tokens
        )
        a.by_llama = reply["choices"][0]["message"]["content"].strip()
    llama.close()


def report(asked: list[Asked]) -> float:
    """Prints accuracy and agreement by family; returns the agreement over all."""
    print(f"{'':8}{'questions':>10}{'torch %':>10}{'llama %':>10}{'same %':>10}")
    agreement = 0.0
    for family in (*FAMILIES, "all"):
        own = [a for a in asked if family in (a.family, "all")]
        if not own:
            continue
        hits = [(a.by_torch == a.answer, a.by_llama == a.answer, a.by_torch == a.by_llama) for a in own]
        share = [sum(column) / len(own) for column in zip(*hits)]
        print(f"{family:8}{len(own):10}" + "".join(f"{100 * s:10.2f}" for s in share))
        agreement = share[2]
    for a in [a for a in asked if a.by_torch != a.by_llama][:10]:
        print(f"differs: {a.image.name} {a.question} torch {a.by_torch!r}, llama.cpp {a.by_llama!r}, true {a.answer!r}")
    return agreement


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="the model.pt that was exported")
    parser.add_argument("--gguf", type=Path, required=True, help="folder that export.py wrote")
    parser.add_argument("--questions", type=Path, required=True, help="folder that make_questions.py wrote")
    parser.add_argument("--text", default=TEXT_Q8_0, help="file in the GGUF folder (%(default)s)")
    parser.add_argument("--limit", type=int, help="a random sample of so many questions")
    parser.add_argument("--threads", type=int, default=1, help="more only pay on an idle machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.weights)
    round_as_exported(model)
    max_tokens = model.c.scenes.plate_digits + 1  # the longest answer and its end
    asked = read_questions(args.questions, args.limit)
    answer_with_torch(model, asked, max_tokens)
    answer_with_llama(args.gguf / args.text, args.gguf / MMPROJ_F16, asked, max_tokens, args.threads)
    agreement = report(asked)
    accepted = agreement >= REQUIRED_AGREEMENT
    verdict = "accepted" if accepted else "NOT ACCEPTED"
    print(f"{verdict}: {100 * agreement:.2f}% of the answers are the same, {100 * REQUIRED_AGREEMENT}% are required")
    return 0 if accepted else 1


if __name__ == "__main__":
    sys.exit(main())
