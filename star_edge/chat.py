"""A prompt in the model's chat template, with a marker where each image belongs.

Rendering is llama_cpp's; knows nothing of tokens or pixels.
"""

from __future__ import annotations

import jinja2
import llama_cpp
from llama_cpp import Llama
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from .errors import PromptError, UnsupportedModelError
from .vision.encoder import MEDIA_MARKER


class ChatFormat:
    """The chat template of a text model, or another given as Jinja source.

    exists: False when the file has none and none was given; `format` then raises.
    takes_parts: whether it takes a message's content as a list of parts, and not only as one string.

    Raises:
        UnsupportedModelError: the source is no template.
    """

    def __init__(self, llama: Llama, source: str | None = None) -> None:
        source = source or llama.metadata.get("tokenizer.chat_template")
        self.exists = bool(source)
        if not self.exists:
            return
        eos = llama_cpp.llama_vocab_get_text(llama._model.vocab, llama.token_eos())
        try:
            # the tokenizer adds BOS itself, as it does for llama_cpp's MTMDChatHandler
            self._formatter = Jinja2ChatFormatter(template=source, eos_token=(eos or b"").decode("utf-8", "replace"), bos_token="")
        except jinja2.TemplateError as error:
            raise UnsupportedModelError(f"the chat template cannot be used ({error})", "give another as chat_template") from error
        self.takes_parts = self._probe()

    def _probe(self) -> bool:
        """Whether the template takes a message's content as a list of parts, and not only as one string."""
        probe = [{"role": "user", "content": [{"type": "text", "text": "PROBE"}]}]
        try:
            text = self._formatter(messages=probe).prompt
        except Exception:  # a template may fail in any way on what it does not expect
            return False
        return "PROBE" in text and "'type'" not in text and '"type"' not in text

    def format(self, prompt: str, n_images: int) -> str:
        """The prompt as one user message; without markers of its own, its images stand first.

        Raises:
            UnsupportedModelError: there is no template. PromptError: the template refuses the message.
        """
        if not self.exists:
            raise UnsupportedModelError("the model has no chat template", "give chat_template, or chat=False and the whole prompt")
        if MEDIA_MARKER not in prompt:
            prompt = MEDIA_MARKER * n_images + prompt
        content = []
        for i, text in enumerate(prompt.split(MEDIA_MARKER)):
            if i:
                content.append({"type": "text", "text": MEDIA_MARKER})
            if text:
                content.append({"type": "text", "text": text})
        message = {"role": "user", "content": content if n_images and self.takes_parts else prompt}
        try:
            return self._formatter(messages=[message]).prompt
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise PromptError(f"the chat template refuses the prompt ({error})", "give another as chat_template, or chat=False") from error
