"""A vocabulary of bytes for random text models, with the special tokens that vision projectors put around images."""

from __future__ import annotations

from collections.abc import Sequence

import gguf

# Every image becomes the media marker; the text of one message follows its images, as in LLaVA-1.5's prompts.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER:"
    "{% if message['content'] is string %} {{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% elif message['role'] == 'assistant' %} ASSISTANT: {{ message['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)

# What libmtmd looks for or writes around images (mtmd_context::init_vision), by the kind of encoder
_SPECIAL = {
    "qwen2vl": ("<|vision_start|>", "<|vision_end|>"),
    "qwen2.5vl": ("<|vision_start|>", "<|vision_end|>"),
    "qwen3vl": ("<|vision_start|>", "<|vision_end|>"),
    "qwen3.5": ("<|vision_start|>", "<|vision_end|>"),
    "gemma3": ("<start_of_image>", "<end_of_image>"),
    "idefics3": (
        "\n\n",
        "<fake_token_around_image>",
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 9) for column in range(1, 9)),
    ),
}
_FIRST_FREE = 259


def special_tokens(encoder_kind: str) -> tuple[str, ...]:
    """Tokens of a real model of that kind which stand around its images and between their tiles."""
    return _SPECIAL.get(encoder_kind, ())


def add_tokenizer(w: gguf.GGUFWriter, n_vocab: int, special: Sequence[str] = ()) -> None:
    """A SentencePiece vocabulary of bytes: any text has tokens, one for each byte. The rest of the vocabulary is
    unused.

    Raises:
        ValueError: n_vocab does not hold them.
    """
    if n_vocab < max(260, _FIRST_FREE + len(special)):
        raise ValueError(
            f"a byte vocabulary needs at least {max(260, _FIRST_FREE + len(special))} tokens, not {n_vocab}"
        )
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [gguf.TokenType.BYTE] * 256
    tokens += special
    kinds += [gguf.TokenType.USER_DEFINED] * len(special)
    tokens += [f"<t{i}>" for i in range(len(tokens), n_vocab)]
    kinds += [gguf.TokenType.NORMAL] * (n_vocab - len(kinds))
    w.add_tokenizer_model("llama")
    w.add_token_list([t.encode() for t in tokens])
    w.add_token_scores([0.0] * n_vocab)
    w.add_token_types([int(k) for k in kinds])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(False)
    w.add_chat_template(CHAT_TEMPLATE)
