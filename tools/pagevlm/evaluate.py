"""Answers of llama.cpp (as llama-cpp-python ships it; nothing of star_edge) to held-out questions, at full size and at
half.

python tools/pagevlm/evaluate.py --gguf DIR --questions DIR [--kind q8_0] [--half] [--torch RUN] [--answers FILE]

A picture is encoded once and read once, then each question is decoded behind it. --half halves the pictures first, by
averages of 2 x 2 pixels. --torch has the trained weights answer too, and counts how often both say the same.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
from collections import defaultdict
from pathlib import Path

import llama_cpp
import numpy as np
from files import mmproj_file, text_file
from llama_cpp import Llama, mtmd_cpp
from llama_cpp._logger import llama_log_callback
from PIL import Image
from vocabulary import IM_END, MAX_ANSWER, decode, encode_prompt

Rows = list[dict]


class Stock:
    """llama.cpp with libmtmd."""

    def __init__(self, folder: Path, kind: str, threads: int):
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        mtmd_cpp.mtmd_log_set(llama_log_callback, None)
        mtmd_cpp.mtmd_helper_log_set(llama_log_callback, None)
        self.llama = Llama(
            str(folder / text_file(kind)), n_ctx=2048, n_batch=1100, n_ubatch=1100, n_threads=threads, verbose=False
        )
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu, params.print_timings, params.n_threads = False, False, threads
        self.mtmd = mtmd_cpp.mtmd_init_from_file(str(folder / mmproj_file(kind)).encode(), self.llama.model, params)
        self.memory = llama_cpp.llama_get_memory(self.llama.ctx)
        self.batch = llama_cpp.llama_batch_init(64, 0, 1)
        self.past = 0

    def read(self, image: np.ndarray) -> None:
        """Everything up to the question. image: uint8 (height, width, 3)."""
        image = np.ascontiguousarray(image)
        prompt = b"<|im_start|>user\n<__media__>"
        text = mtmd_cpp.mtmd_input_text(text=prompt, text_len=len(prompt), add_special=True, parse_special=True)
        bitmap = mtmd_cpp.mtmd_bitmap_init(
            image.shape[1], image.shape[0], image.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        )
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
        llama_cpp.llama_memory_clear(self.memory, True)
        past = llama_cpp.llama_pos(0)
        if mtmd_cpp.mtmd_tokenize(self.mtmd, chunks, ctypes.byref(text), bitmaps, 1):
            raise SystemExit("libmtmd could not prepare a picture")
        if mtmd_cpp.mtmd_helper_eval_chunks(self.mtmd, self.llama.ctx, chunks, 0, 0, 1100, True, ctypes.byref(past)):
            raise SystemExit("llama.cpp could not read a picture")
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        mtmd_cpp.mtmd_bitmap_free(bitmap)
        self.past = past.value

    def answer(self, question: str) -> str:
        """Greedy."""
        llama_cpp.llama_memory_seq_rm(self.memory, 0, self.past, -1)
        tokens, position, given = (
            list(encode_prompt(question)[1:]),
            self.past,
            [],
        )  # <|vision_end|> came with the picture
        while True:
            self._decode(tokens, position)
            position += len(tokens)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.llama.ctx, -1), (self.llama.n_vocab(),))
            tokens = [int(logits.argmax())]
            if tokens[0] == IM_END or len(given) == MAX_ANSWER + 1:
                return decode(given)
            given += tokens

    def _decode(self, tokens: list[int], position: int) -> None:
        """Text behind the picture; positions are given, as an image takes fewer of them than it has tokens."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = (
                token,
                position + i,
                1,
                i == len(tokens) - 1,
            )
            batch.seq_id[i][0] = 0
        if llama_cpp.llama_decode(self.llama.ctx, batch):
            raise SystemExit("llama.cpp could not decode a question")


class Torch:
    """The weights as trained, in float32."""

    def __init__(self, run: Path, threads: int):
        import torch
        from weights import load

        torch.set_num_threads(threads)
        self.torch = torch
        self.model, _ = load(run)
        self.model.eval()

    def answers(self, image: np.ndarray, questions: list[str]) -> list[str]:
        torch = self.torch
        grid = image.shape[0] // 28, image.shape[1] // 28
        prompts = [encode_prompt(q) for q in questions]
        length = max(map(len, prompts)) + MAX_ANSWER + 1
        ids = torch.zeros(1, len(prompts), length, dtype=torch.long)
        ends = torch.tensor([len(p) for p in prompts])
        for q, prompt in enumerate(prompts):
            ids[0, q, : len(prompt)] = torch.tensor(prompt)
        given: list[list[int]] = [[] for _ in prompts]
        with torch.no_grad():
            pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
            tokens = self.model.image_tokens(self.model.vision(pixels, torch.float32))
            for n in range(MAX_ANSWER + 1):
                best = self.model.decode(tokens, grid, ids, (ends + n - 1)[None, :, None]).argmax(-1)[0, :, 0]
                for q, token in enumerate(best.tolist()):
                    given[q].append(token)
                    ids[0, q, ends[q] + n] = token
        return [decode(g[: g.index(IM_END)] if IM_END in g else g) for g in given]


def halved(image: np.ndarray) -> np.ndarray:
    """Averages of 2 x 2 pixels. The sides stay multiples of 28, so that llama.cpp resizes nothing: 56 divides the sides
    of what is drawn.
    """
    height, width, _ = image.shape
    if height % 56 or width % 56:
        raise ValueError(f"a picture of {width}x{height} has no half of whole image tokens")
    return np.asarray(Image.fromarray(image).resize((width // 2, height // 2), Image.Resampling.BOX))


def report(rows: Rows, title: str) -> None:
    print(title)
    for key in ("category", "tokens", "kind"):
        groups: dict[str, Rows] = defaultdict(list)
        for row in rows:
            groups[f"{row['category']}: {row['kind']}" if key == "kind" else row[key]].append(row)
        for name, own in groups.items():
            right = 100 * sum(r["given"] == r["answer"] for r in own) / len(own)
            same = [r["given"] == r["by_torch"] for r in own if "by_torch" in r]
            agreement = f"{100 * sum(same) / len(same):10.2f}% as torch" if same else ""
            print(f"  {name!s:28}{len(own):6}{right:9.2f}%{agreement}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--kind", default="q8_0")
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--torch", type=Path, help="folder of part-*.npz")
    parser.add_argument("--answers", type=Path, help="JSON lines with what was answered")
    parser.add_argument("--every", type=int, default=1, help="every so many pictures")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    by_image: dict[str, Rows] = defaultdict(list)
    for line in (args.questions / "questions.jsonl").read_text().splitlines():
        row = json.loads(line)
        by_image[row["image"]].append(row)
    stock = Stock(args.gguf, args.kind, args.threads)
    torch_model = Torch(args.torch, args.threads) if args.torch else None
    done: Rows = []
    for name, rows in list(by_image.items())[:: args.every]:
        image = np.asarray(Image.open(args.questions / name).convert("RGB"))
        if args.half:
            image = halved(image)
        stock.read(image)
        for row in rows:
            row["given"] = stock.answer(row["question"])
        if torch_model:
            for row, text in zip(rows, torch_model.answers(image, [r["question"] for r in rows])):
                row["by_torch"] = text
        done += rows
    if args.answers:
        args.answers.write_text("".join(json.dumps(row) + "\n" for row in done))
    report(done, f"{len(done)} questions, {args.kind}{', pictures halved' if args.half else ''}")


if __name__ == "__main__":
    main()
