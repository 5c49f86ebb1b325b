"""The order in which llama_cpp's MTMDChatHandler calls what star_edge puts in the place of its parts."""

import inspect

import llama_cpp.mtmd_cpp as mtmd
import pytest
from helpers import stock
from helpers.chatting import DEMO, TOOL_TEMPLATE, user
from llama_cpp.llama_chat_format import MTMDChatHandler

from star_edge import refvlm

METHODS = (
    "_init_mtmd_context",
    "get_image_urls",
    "_get_chat_template",
    "_get_template_messages",
    "_postprocess_template_text",
    "load_image",
    "_create_bitmap_from_bytes",
)


class Watched:
    """libmtmd, with the names of the functions that are called noted."""

    def __init__(self, calls):
        self._calls = calls

    def __getattr__(self, name):
        value = getattr(mtmd, name)
        if not inspect.isfunction(value) and not hasattr(value, "argtypes"):
            return value

        def call(*args):
            self._calls.append(name)
            return value(*args)

        return call


@pytest.fixture(scope="module")
def calls():
    """Names of everything that one request calls, in order: libmtmd's, the handler's and the context's."""
    noted = []
    handler = MTMDChatHandler(str(refvlm.MMPROJ), verbose=False, use_gpu=False)
    handler._mtmd_cpp = Watched(noted)
    llama = stock.load(refvlm.TEXT_MODEL, False, n_ctx=512, n_threads=1)
    llama.metadata["tokenizer.chat_template"] = TOOL_TEMPLATE
    llama.chat_handler = handler
    note = lambda name, function: lambda *a, **k: noted.append(name) or function(*a, **k)
    for name in METHODS:
        setattr(handler, name, note(name, getattr(handler, name)))
    for owner, name in ((llama._ctx, "kv_cache_clear"), (llama, "reset"), (llama, "create_completion")):
        setattr(owner, name, note(name, getattr(owner, name)))
    options = {}
    create = llama.create_completion
    llama.create_completion = lambda **k: options.update(k) or create(**k)
    prompt_of = []
    llama.create_chat_completion([user(DEMO, "what?")], max_tokens=1, temperature=0.0)
    prompt_of.append(llama.input_ids[: llama.n_tokens].tolist())
    yield noted, options, prompt_of[0]
    llama.close()


def in_order(noted, *names):
    places = [noted.index(name) for name in names if name in noted]
    assert len(places) == len(names), f"not called: {set(names) - set(noted)}"
    assert places == sorted(places), [noted[p] for p in sorted(places)]


def test_the_handler_calls_every_function_of_libmtmd_through_its_attribute_mtmd_cpp(calls):
    noted, _, _ = calls
    assert {"mtmd_default_marker", "mtmd_tokenize", "mtmd_input_chunks_size", "mtmd_input_chunks_free"} <= set(noted)


def test_the_context_is_made_first_then_urls_template_messages_text_and_pixels_are_asked_for(calls):
    in_order(calls[0], *METHODS)


def test_the_cache_is_cleared_after_the_prompt_is_split_and_before_chunks_are_counted(calls):
    in_order(calls[0], "mtmd_tokenize", "reset", "kv_cache_clear", "mtmd_input_chunks_size")


def test_chunks_are_counted_once_and_just_before_they_are_evaluated(calls):
    noted, _, _ = calls
    assert noted.count("mtmd_input_chunks_size") == 1
    assert noted[noted.index("mtmd_input_chunks_size") + 1] == "mtmd_input_chunks_get"


def test_chunks_are_freed_after_they_are_evaluated_and_before_sampling(calls):
    in_order(calls[0], "mtmd_input_chunks_get", "mtmd_helper_eval_chunk_single", "mtmd_input_chunks_free")
    in_order(calls[0], "mtmd_input_chunks_free", "mtmd_bitmap_free", "create_completion")


def test_the_prompt_is_what_input_ids_holds_up_to_n_tokens(calls):
    _, options, read = calls
    prompt = options["prompt"]
    assert isinstance(prompt, list) and prompt == read[: len(prompt)] and len(prompt) > 70


def test_the_handler_has_the_attributes_that_are_set():
    handler = MTMDChatHandler(str(refvlm.MMPROJ), verbose=False, use_gpu=False)
    assert handler.mtmd_ctx is None and handler._mtmd_cpp is mtmd
    assert (handler.clip_model_path, handler.verbose, handler.use_gpu) == (str(refvlm.MMPROJ), False, False)


def test_further_keyword_arguments_of_a_request_are_variables_of_the_template():
    parameters = inspect.signature(MTMDChatHandler.__call__).parameters
    assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
    assert {"functions", "function_call", "tools", "tool_choice", "response_format", "grammar"} <= set(parameters)
