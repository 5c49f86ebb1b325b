"""The fixtures of tests/fixtures: files of one model family each, and what transformers says of them
(tools/fixtures).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from helpers import gpu
from helpers.stock import IS_0_3_35, skip_unless_loaded
from star_edge import StarVLM
from star_edge.decoder.prefill import Seen
from star_edge.llamacpp.context import EXPERTS_IN_HOST_MEMORY
from star_edge.llamacpp.gguf import read_gguf_info
from star_edge.pruning.selection import Selection, top_k
from star_edge.rows import Rows, Segment
from star_edge.vision.profiles import METADATA_KEYS, find_profile

FOLDER = Path(__file__).parent.parent / "fixtures"
# mode -> (flash attention, type of the KV cache)
MODES = {"f32": (False, "f32"), "f16": (False, "f16"), "fa": (True, "f16"), "q8_0": (True, "q8_0")}


# What llama.cpp in llama-cpp-python 0.3.35 does otherwise than transformers and later versions: what comes of it has no
# expected value here. tests/contract/README.md has the list.
OTHER_FEATURES = "llama-cpp-python 0.3.35: overviews shrunk by another filter, or patches normalized without a norm"
OTHER_TOKENS = "llama-cpp-python 0.3.35 puts <|img_thumbnail|> before a picture of one tile"
OTHER_MASK = "llama-cpp-python 0.3.35: rows of a Gemma 4 image see later ones in every layer, and in E2B and E4B too"

N_THREADS = 1  # waiting for each other costs threads more than these models do


@dataclass
class Case:
    """One K: what transformers keeps and says when tokens are removed at `layer`, or by the vision stage alone (None).

    vision_kept, decoder_kept: for each image, ascending indices into its tokens. decoder_scores: for each image, (n1,).
    logits: (n_vocab,). answer: (16,) greedy tokens. special: for each image, (n_tokens,) bool of tokens that stay in
        any case.
    """

    layer: int | None
    n1: int
    n2: int
    prunes_vision: bool
    vision_kept: list[np.ndarray]
    decoder_kept: list[np.ndarray]
    decoder_scores: list[np.ndarray]
    logits: np.ndarray
    answer: np.ndarray
    special: list[np.ndarray]

    def choose(self, seen: Seen, n: int) -> Selection:
        """n rows by attention, special ones in any case."""
        special = self.special[seen.image][self.vision_kept[seen.image][seen.rows]]
        return Selection(top_k(np.where(special, np.inf, seen.attention), n))

    @property
    def decoder_rows(self) -> list[np.ndarray]:
        """decoder_kept as indices into vision_kept."""
        return [np.searchsorted(v, d) for v, d in zip(self.vision_kept, self.decoder_kept)]


@dataclass
class Prompt:
    """A prompt and what transformers says of it unpruned. Arrays with a leading image dimension are lists, one for each
    image.
    """

    text: str
    pictures: list[np.ndarray]
    tokens: np.ndarray
    image_of_row: np.ndarray
    positions: np.ndarray
    next_position: int
    features: list[np.ndarray]
    encoder_scores: list[np.ndarray] | None
    logits: np.ndarray
    answer: np.ndarray
    cases: list[Case]

    def segments(
        self,
        chunks: Sequence[object],
        kept: Sequence[np.ndarray] | None = None,
        features: Sequence[np.ndarray] | None = None,
    ) -> list[Segment]:
        """The prompt as the decoder takes it, with transformers' features in place of the encoder's, or with these.

        chunks: libmtmd's, which say what is causal. kept: tokens of each image that stay, default all.
        """
        features = self.features if features is None else features
        made, at, image = [], 0, 0
        for chunk in chunks:
            is_image = hasattr(chunk, "causal")
            rows = np.arange(at, at + (chunk.n_tokens if is_image else len(chunk.tokens)))
            at += len(rows)
            if is_image:
                stay = np.arange(len(rows)) if kept is None else kept[image]
                left = Rows(self.row_positions[..., rows[stay]], embeddings=features[image][stay])
                made.append(Segment(left, image, chunk.causal, pruned=len(stay) < len(rows)))
                image += 1
            elif len(rows):
                made.append(Segment(Rows(self.row_positions[..., rows], tokens=self.tokens[rows])))
        return made

    @cached_property
    def row_positions(self) -> np.ndarray:
        """As the engine counts them: (n,), or (4, n) for M-RoPE, where a fourth section is zero if there is none."""
        p = self.positions
        return p if p.ndim == 1 or len(p) == 4 else np.concatenate([p, np.zeros_like(p[:1])])


class Fixture:
    """One folder."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.text, self.mmproj = folder / "text.gguf", folder / "mmproj.gguf"
        self.facts = json.loads((folder / "expected.json").read_text())
        self.title = self.facts.get("title", folder.name)
        self.vision_problem, self.decoder_problem = self.facts["vision_stage"], self.facts["decoder_stage"]
        in_host_memory = gpu.PLACEMENT in ("half", "encoder") and not self.decoder_problem and gpu.n_experts(self.text)
        if in_host_memory:
            self.decoder_problem = EXPERTS_IN_HOST_MEMORY
        self.repaired = self.facts["encoder"] == "repaired"
        with np.load(folder / "expected.npz") as data:
            self._arrays = dict(data)
        self.prompts = [self._prompt(i, facts) for i, facts in enumerate(self.facts["prompts"])]
        if in_host_memory:
            for prompt in self.prompts:
                prompt.cases = [case for case in prompt.cases if case.layer is None]

    @property
    def projector(self) -> str:
        return find_profile(read_gguf_info(self.mmproj, METADATA_KEYS).values)[0]

    @property
    def tokens_differ(self) -> bool:
        """Whether this libmtmd makes other tokens of the prompts."""
        return IS_0_3_35 and self.projector == "lfm2"

    @property
    def mask_differs(self) -> bool:
        """Whether rows of an image see other rows in this llama.cpp's decoder than in transformers."""
        return IS_0_3_35 and self.projector in ("gemma4v", "gemma4uv")

    def features_differ(self, prompt: Prompt) -> list[bool]:
        """For each image of a prompt, whether this llama.cpp gives other features than transformers."""
        if self.name == "glm-ocr":
            return [IS_0_3_35] * len(prompt.features)
        side = min(min(picture.shape[:2]) for picture in prompt.pictures)  # of a tile, if pictures are cut
        differ = []
        for picture in prompt.pictures:
            if len(prompt.features) == len(prompt.pictures):
                differ.append(False)
                continue
            tiles = (picture.shape[0] // side) * (picture.shape[1] // side)
            differ += [False] * tiles
            if tiles > 1 or self.projector == "idefics3":  # which repeats a picture of one tile, as it is
                differ.append(tiles > 1 and IS_0_3_35)
        assert len(differ) == len(prompt.features)
        return differ

    def _prompt(self, number: int, facts: dict) -> Prompt:
        get = lambda name: self._arrays.get(f"prompt{number}.{name}")
        owner = get("image_of_row")
        edges = np.cumsum(np.bincount(owner[owner >= 0]))[:-1]
        scores = get("encoder_scores")
        special = np.zeros(int((owner >= 0).sum()), bool) if get("special") is None else get("special")
        return Prompt(
            facts["text"],
            [self._arrays[f"image{i}"] for i in range(facts["n_pictures"])],
            get("tokens"),
            owner,
            get("positions"),
            facts["next_position"],
            np.split(get("features"), edges),
            None if scores is None else np.split(scores, edges),
            get("logits"),
            get("answer"),
            [self._case(number, i, case, np.split(special, edges)) for i, case in enumerate(facts["cases"])],
        )

    def _case(self, number: int, index: int, facts: dict, special: list[np.ndarray]) -> Case:
        n_images, n_tokens = len(special), len(special[0])
        get = lambda name: self._arrays[f"prompt{number}.case{index}.{name}"]
        split = lambda name: np.split(get(name), n_images)  # every image has as many
        return Case(
            facts["layer"],
            facts["n1"],
            facts["n2"],
            facts["n1"] < n_tokens,
            split("vision_kept"),
            split("decoder_kept"),
            split("decoder_scores"),
            get("logits"),
            get("answer"),
            special,
        )

    def engine(self, mode: str = "f32", encoder: str | None = None) -> StarVLM:
        """encoder: "stock" or "repaired"; default, whatever makes its features right."""
        flash_attn, cache = MODES[mode]
        skip_unless_loaded(self.text)
        return StarVLM(
            self.text,
            self.mmproj,
            n_ctx=1024,
            n_batch=512,
            flash_attn=flash_attn,
            type_k=cache,
            type_v=cache,
            n_threads=N_THREADS,
            encoder=encoder or self.facts["encoder"],
        )


def load_fixtures() -> dict[str, Fixture]:
    return {folder.name: Fixture(folder) for folder in sorted(FOLDER.iterdir()) if (folder / "expected.json").is_file()}


@contextmanager
def tokenized(vlm: StarVLM, prompt: Prompt):
    """libmtmd's chunks of a prompt."""
    chunks = vlm.tokenize(prompt.text, prompt.pictures, chat=False)
    try:
        yield chunks.chunks
    finally:
        chunks.close()
