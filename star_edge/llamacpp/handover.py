"""Private fields of `llama_cpp.Llama` that star_edge reads or writes."""

from __future__ import annotations

from collections.abc import Callable

import llama_cpp
import numpy as np
from llama_cpp import Llama

# Formats that a Llama without a handler guesses by itself (guess_chat_format_from_gguf_metadata)
_GUESSED = ("llama-2", "llama-3", "chatml", "mistral-instruct")


def is_open(llama: Llama) -> bool:
    return llama._model.model is not None


def keeps_logits(llama: Llama) -> bool:
    """Whether it was made with logits_all. logprobs need that."""
    return bool(llama._logits_all)


def uses_flash_attention(llama: Llama) -> bool:
    return bool(llama.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED)


def has_given_format(llama: Llama) -> bool:
    """Whether its chat_format was given, rather than guessed or read from the file."""
    name = str(llama.chat_format)
    return llama.chat_format is not None and name not in _GUESSED and not name.startswith("chat_template.")


def keep_memory_on_reset(llama: Llama) -> None:
    """Makes Llama.reset leave the memory of a hybrid decoder alone, as it does with others.

    It would clear the memory with its data, past the functions of the context that know what is kept for the next
    prompt. Whoever reads from the start again calls one of those: kv_cache_clear, or kv_cache_seq_rm(-1, 0, -1) in
    Llama.eval, which such a memory accepts.
    """
    llama._is_hybrid = False


def free_with(llama: Llama, close: Callable[[], None]) -> None:
    """Frees something when the Llama is closed, before what was registered earlier."""
    llama._stack.callback(close)


def hand_over(llama: Llama, tokens: np.ndarray, logits: np.ndarray) -> None:
    """Tells the Llama that its cache holds a prompt, so that create_completion samples from there.

    Args:
        llama: The Llama.
        tokens: Ids of the prompt, (n,). Logits processors see them, and create_completion compares its prompt with
            them.
        logits: Logits of the last row, (n_vocab,) float32.
    """
    n = len(tokens)
    llama.input_ids[:n] = tokens
    llama.n_tokens = n
    if llama._logits_all and n <= len(llama.scores):
        llama.scores[n - 1] = logits  # create_completion takes the first token's logprobs from here
    llama._requires_eval = False  # the last row's logits are there
