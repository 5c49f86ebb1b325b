"""Helpers of the tests of StarChatHandler: messages, Llamas, answers."""

import base64
import io
import itertools

import numpy as np
from llama_cpp import Llama
from PIL import Image

from helpers.models import random_image
from star_edge import StarVLM, refvlm

TEXT = "USER: is there a red star? is there a blue square? what number is shown? ASSISTANT:"
COLOR = "what color is the triangle?"
PLATE = "what number is shown?"

TOOL_TEMPLATE = (
    "{% if tools %}TOOLS: {{ tools | tojson }}\n{% endif %}{% if functions %}FUNCTIONS: {{ functions | tojson }}\n"
    "{% endif %}"
    "{% for message in messages %}{{ message['role'] }}:"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}\n{% endfor %}assistant:"
)
TOOL = {
    "name": "report",
    "description": "Report what is seen.",
    "parameters": {
        "type": "object",
        "properties": {"color": {"type": "string", "enum": ["red", "blue"]}, "n": {"type": "integer", "maximum": 9}},
        "required": ["color", "n"],
    },
}


def data_url(image=refvlm.DEMO_IMAGE):
    """A PNG: both sides decode it to the same pixels."""
    if isinstance(image, np.ndarray):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        data = buffer.getvalue()
    else:
        data = image.read_bytes()
    return "data:image/png;base64," + base64.b64encode(data).decode()


DEMO, OTHER = data_url(), data_url(random_image(3, 168, 168))


def user(*parts):
    """A message of the user: strings that begin with "data:" are images."""
    content = [
        {"type": "image_url", "image_url": {"url": p}} if p.startswith("data:") else {"type": "text", "text": p}
        for p in parts
    ]
    return {"role": "user", "content": content}


def assistant(text):
    return {"role": "assistant", "content": text}


def engine(**options):
    """A StarVLM of the reference model."""
    return StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, **{"n_ctx": 512, "n_threads": 1, **options})


def usable(vlm):
    """Whether such an engine still answers as it should."""
    return vlm.generate(COLOR, refvlm.DEMO_IMAGE, max_tokens=2).text == " red"


def load(handler, text=refvlm.TEXT_MODEL, template=None, **options):
    """A Llama built in the ordinary way."""
    options = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False, **options}
    llm = Llama(model_path=str(text), chat_handler=handler, **options)
    if options.get("logits_all"):
        llm.scores[:] = 0  # llama_cpp takes logprobs of all its rows, read or not
    if template:
        llm.metadata["tokenizer.chat_template"] = template
    return llm


def ask(llm, *messages, **options):
    options = {"temperature": 0.0, "max_tokens": 4, **options}
    return llm.create_chat_completion(list(messages) or [user(DEMO, COLOR)], **options)


def text_of(response):
    return response["choices"][0]["message"]["content"]


def streamed(chunks):
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def bare(response):
    """A response without the report and without what differs from call to call: time, and the ids of the completion and
    of tool calls.
    """
    if isinstance(response, dict):
        return {k: bare(v) for k, v in response.items() if k not in ("id", "created", "star_edge")}
    return [bare(v) for v in response] if isinstance(response, list) else response


def complete(llm):
    """Tokens of an answer to a text without images."""
    prompt = llm.tokenize(b"USER: is there a red star? ASSISTANT:", add_bos=True)
    return [int(t) for t in itertools.islice(llm.generate(prompt, temp=0.0), 6)]


def raise_it(error, *args, **options):
    """Stands for a function that fails."""
    raise error
