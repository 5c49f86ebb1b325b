"""The form of an answer, wherever it is asked for: grammars, JSON schemas and tools hold, or are refused."""

import json

import pytest
from helpers.chatting import TOOL, TOOL_TEMPLATE, engine, text_of, usable
from helpers.chatting import ask as chat
from llama_cpp import Llama, LlamaGrammar

from star_edge import errors, refvlm
from star_edge.llamacpp.guarded import guard

grammar = LlamaGrammar.from_string


@pytest.fixture(scope="module")
def vlm():
    with engine() as vlm:
        yield vlm


@pytest.fixture
def ask(vlm):
    """Asks; afterwards the engine is as good as before."""
    yield lambda prompt="x", **options: vlm.generate(prompt, **{"max_tokens": 5, **options})
    assert usable(vlm)


# ---- grammars, where StarVLM, the handler and Llama's own completions pass ----

BAD_GRAMMARS = {"root :=": "cannot be parsed", "root ::= <[99999999]>": "token 99999999", "": "empty"}


@pytest.mark.parametrize(("text", "words"), BAD_GRAMMARS.items())
def test_bad_grammars(ask, llm, refuses, text, words):
    with pytest.raises(errors.ConfigError, match=words):
        ask(grammar=grammar(text))
    refuses(errors.ConfigError, words, grammar=grammar(text))
    with pytest.raises(errors.ConfigError, match=words):
        llm.create_completion("x", grammar=grammar(text))
    with pytest.raises(errors.ConfigError, match=words):
        next(llm.generate([1], grammar=grammar(text)))


DEAD_ENDS = ["root ::= [z-a]", 'root ::= "r" [z-a]', 'root ::= "r" "\\U0010FFFF"+ [z-a]']


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("text", DEAD_ENDS)
def test_grammars_that_allow_no_token(ask, text, temperature):
    """llama.cpp samples a token all the same, and ends the process where the grammar cannot accept it."""
    try:
        assert (
            ask(grammar=grammar(text), temperature=temperature, seed=1, max_tokens=8).finish_reason == "length"
        )  # it never got there
    except errors.ConfigError as error:
        assert "allows no token" in str(error)
    if text == DEAD_ENDS[0]:
        with pytest.raises(errors.ConfigError, match="allows no token"):
            ask(grammar=grammar(text), temperature=temperature)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "seed": 4}, {"temperature": 2.0, "mirostat_mode": 2}, {"logit_bias": {5: 1.0}}]
)
def test_grammars_hold_as_on_stock(options):
    """The grammar's place in the chain of samplers is llama_cpp's: the tokens are those of a Llama without guards."""
    stock, guarded = (Llama(str(refvlm.TEXT_MODEL), n_ctx=512, n_threads=1, verbose=False) for _ in range(2))
    guard(guarded)
    text = 'root ::= [a-z]+ (" " [a-z]+)* "."'
    options = {"max_tokens": 12, "seed": 4, "grammar": grammar(text), **options}
    prompt = "USER: what number is shown? ASSISTANT:"
    expected = stock.create_completion(prompt, **options)["choices"][0]["text"]
    assert guarded.create_completion(prompt, **options)["choices"][0]["text"] == expected
    assert expected.strip() and type(stock) is Llama
    stock.close()
    guarded.close()


# ---- schemas and tools ----

SCHEMA = {
    "type": "object",
    "properties": {'say "é"': {"type": "string", "enum": ['a"b\\c\n']}, "n": {"type": "boolean"}},
    "required": ['say "é"', "n"],
    "additionalProperties": False,
}


def test_json_schema_is_honoured(llm):
    for response_format in (
        {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}},
        {"type": "json_object", "schema": SCHEMA},
    ):
        answer = json.loads(text_of(chat(llm, response_format=response_format, max_tokens=80)))
        assert answer == {'say "é"': 'a"b\\c\n', "n": answer["n"]} and isinstance(answer["n"], bool)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "string", "maxLength": 20_000}, "maxLength=20000"),
        ({"type": "string", "pattern": "^a{1,100000}$"}, "pattern"),
        ({"type": "string", "minLength": 1_000_000_000}, "minLength"),
    ],
)
def test_large_schemas(refuses, schema, words):
    refuses(errors.ConfigError, words, response_format={"type": "json_object", "schema": schema})
    refuses(
        errors.ConfigError,
        words,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    choice = {"type": "function", "function": {"name": "f"}}
    refuses(errors.ConfigError, words, tools=[tool], tool_choice=choice)
    refuses(errors.ConfigError, words, functions=[tool["function"]], function_call={"name": "f"})


def test_required_tools(llm, refuses, monkeypatch):
    monkeypatch.setitem(llm.metadata, "tokenizer.chat_template", TOOL_TEMPLATE)
    tools = [{"type": "function", "function": TOOL}]
    call = chat(llm, tools=tools, tool_choice="required", max_tokens=64)["choices"][0]["message"]["tool_calls"][0]
    assert call["function"]["name"] == TOOL["name"]
    bare = [{"type": "function", "function": {"name": "look"}}]
    call = chat(llm, tools=bare, tool_choice="required", max_tokens=64)["choices"][0]["message"]["tool_calls"][0]
    assert call["function"]["name"] == "look" and call["function"]["arguments"].replace(" ", "") == "{}"
    with pytest.raises(errors.ConfigError, match="with 2 tools"):
        chat(llm, tools=tools + bare, tool_choice="required")
    with pytest.raises(errors.ConfigError, match="tool_choice='some'"):
        chat(llm, tools=tools, tool_choice="some")


def test_tools_of_a_schema_with_quotes(llm):
    tools = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    for stream in (False, True):
        answer = chat(llm, tools=tools, tool_choice="required", max_tokens=80, stream=stream)
        if stream:
            deltas = [chunk["choices"][0]["delta"] for chunk in answer]
            arguments = "".join(
                call["function"]["arguments"] or "" for d in deltas for call in d.get("tool_calls") or ()
            )
        else:
            arguments = answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
        assert json.loads(arguments)['say "é"'] == 'a"b\\c\n'


def test_one_form_of_the_answer(refuses):
    refuses(
        errors.ConfigError, "give one of them", grammar=grammar('root ::= "a"'), response_format={"type": "json_object"}
    )
