"""What the decoders are asked with, and where their answers end. Knows no model."""

from __future__ import annotations

import re

MAX_ANSWER = 14  # tokens
# By the architecture's name in GGUF files. A chat model gets its template, a base model (Gemma 3 270M) plain text
PROMPTS = {
    "llama": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n",
        "\n\n{question} Answer briefly.<|im_end|>\n<|im_start|>assistant\n{lead}",
    ),
    "gemma3": ("", "\n\nQuestion: {question}\nAnswer: {lead}"),
}


def sentence(text: str) -> str:
    """The text up to the end of its first sentence or line, or of the turn."""
    return re.split(r"[.\n|]|<\|im_end\|>|<\|endoftext\|>|<eos>|<end_of_turn>", text, maxsplit=1)[0]
