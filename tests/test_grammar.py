"""Grammars and JSON schemas: what llama.cpp takes passes, what it hangs on or dies of is refused before it sees it."""

import json
import subprocess
import sys

import llama_cpp
import pytest
from llama_cpp import LlamaGrammar, llama_grammar

from star_edge import errors, refvlm
from star_edge.llamacpp.grammar import MAX_BYTES, MAX_DEPTH, check_grammar
from star_edge.llamacpp.json_schema import MAX_COUNT, response_grammar, schema_grammar

VOCABULARY = 500


def check(text, root="root"):
    check_grammar(text, root, VOCABULARY, lambda token: token == "<think>")


def chain(n, body, last='"a"'):
    """n rules, each made of the next."""
    return "root ::= r0\n" + "\n".join(f"r{i} ::= {body.format(f'r{i + 1}')}" for i in range(n)) + f"\nr{n} ::= {last}"


# Grammars that llama.cpp must agree about: True, it takes them; False, it does not
BOTH = {
    "literal": ('root ::= "yes" | "no"', True),
    "escapes": (r'root ::= "\x41\u00e9\U0001F600\t\r\n\\\"" [\[\]\-a-z^]', True),
    "class": ("root ::= [^a-z-] [-] [a-] []", True),
    "comment": ('# one\nroot ::= "a" # two\n  # three\n\nb ::= "c"\n', True),
    "groups": ('root ::= ("a"\n | "b" (\n"c")? )+ "d"*', True),
    "counts": ('root ::= "a"{3} "b"{0,2} "c"{2,} "d"{0} ("e" "f"){1, 3}', True),
    "any": ("root ::= . !<[4]> <[5]>", True),
    "empty": ('root ::= "a" | ', True),
    "newline": ('root ::=\n  "a" |\n  "b"', True),
    "twice": ('root ::= "a"\nroot ::= "b"', True),
    "no-rule": ("root :=", False),
    "nothing": ("", False),
    "blank": ("  \n# x\n", False),
    "unknown-rule": ("root ::= x", False),
    "no-root": ('a ::= "a"', False),
    "open-literal": ('root ::= "a', False),
    "open-class": ("root ::= [a", False),
    "open-group": ('root ::= ("a"', False),
    "closed-group": ('root ::= "a")', False),
    "escape": (r'root ::= "\q"', False),
    "short-hex": (r'root ::= "\x4"', False),
    "nothing-to-repeat": ("root ::= *", False),
    "empty-to-repeat": ('root ::= ""*', False),
    "two-on-a-line": ('root ::= "a" b ::= "c"', False),
    "count": ('root ::= "a"{x}', False),
    "count-2001": ('root ::= "a"{2001}', False),
    "product": ('root ::= "a"{100}{100}', False),
    "left": ('root ::= root "a" | "b"', False),
    "left-past-empty": ('root ::= e root "a"\ne ::= "x" | ', False),
    "open-token": ("root ::= <[5", False),
    "surplus": ("root ::= %", False),
}


@pytest.fixture(scope="module")
def vocab():
    llama = llama_cpp.Llama(str(refvlm.TEXT_MODEL), vocab_only=True, verbose=False)
    yield llama._model.vocab
    llama.close()


@pytest.mark.parametrize(("text", "accepted"), BOTH.values(), ids=BOTH)
def test_agrees_with_llama_cpp(vocab, text, accepted):
    """The oracle is llama.cpp's own parser, which takes an empty text for no grammar at all."""
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, text.encode(), b"root")
    assert bool(sampler) == (accepted or not text)
    if sampler:
        llama_cpp.llama_sampler_free(sampler)
    if accepted:
        check(text)
    else:
        with pytest.raises(errors.ConfigError, match="grammar"):
            check(text)


@pytest.mark.parametrize("name", [name for name in dir(llama_grammar) if name.endswith("_GBNF")])
def test_llama_cpps_own_grammars_pass(name):
    check(getattr(llama_grammar, name))


# What llama.cpp dies of, hangs on, or silently takes for something else: (grammar, words of the refusal)
REFUSED = {
    "token": ("root ::= <[99999999]>", "token 99999999"),
    "token-of-20-digits": (f"root ::= <[{'9' * 20}]>", "token 999"),
    "negated-token": ("root ::= !<[500]>", "token 500"),
    "no-token": ("root ::= <foo>", "not a token of the model"),
    "parentheses": ("root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000, "deep"),
    "alternatives": ("root ::= " + " | ".join(f'"{i}"' for i in range(50_000)), "alternatives"),
    "bytes": ("root ::= " + '"a" ' * 200_000, "bytes"),
    "repeated-literal": (f'root ::= "{"a" * 10_000}"' + "{2000}", "elements"),
    "backwards": ('root ::= "a"{5,2}', "maximum below its minimum"),
    "count-without-limit": ('root ::= "a"{0,5000}', "5000"),
    "deep-references": (chain(20_000, "{}"), "begin with each other"),
    "many-ways": (chain(40, "{0} | {0}"), "begin with each other"),
    "many-stacks": (chain(40, '"" {0} "x" | "" {0} "y"'), "begin with each other"),
    "optional-in-optional": ('root ::= ("a"?){1000}', "ways"),
    "hidden-left-recursion": ('root ::= e root "a" | "b"\ne ::= f\nf ::= "x" | ', "ways"),
    "nul": ('root ::= "\0"', "NUL"),
    "surrogate": ('root ::= "\ud800"', "surrogates"),
}


@pytest.mark.parametrize(("text", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_before_llama_cpp(text, words):
    with pytest.raises(errors.ConfigError, match=words) as caught:
        check(text)
    assert "\n" not in str(caught.value)


def test_bounds_leave_room():
    """What is below the bounds is taken, by llama.cpp too, on a thread's stack."""
    check("root ::= " + "(" * MAX_DEPTH + '"a"' + ")" * MAX_DEPTH)
    check("root ::= " + " | ".join(f'"{i}"' for i in range(1000)))
    check("root ::= <[499]> <think>")
    code = (
        "import threading, llama_cpp, sys; from star_edge import refvlm\n"
        "vocab = llama_cpp.Llama(str(refvlm.TEXT_MODEL), vocab_only=True, verbose=False)._model.vocab\n"
        f"text = ('root ::= ' + '(' * {MAX_DEPTH} + '\"a\"' + ')' * {MAX_DEPTH}).encode()\n"
        f"last = ('root ::= ' + '(\"a\" ' * {MAX_COUNT} + ')?' * {MAX_COUNT}).encode()\n"
        "made = []\n"
        "run = lambda: made.extend(bool(llama_cpp.llama_sampler_init_grammar(vocab, t, b'root'))"
        " for t in (text, last))\n"
        "threading.stack_size(2 << 20)\n"
        "t = threading.Thread(target=run); t.start(); t.join(); sys.exit(made != [True, True])"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- schemas ----

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 100},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/Tag"}, "maxItems": 20},
        "age": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "zip": {"type": "string", "pattern": "^[0-9]{5}(-[0-9]{4})?$"},
        "maxLength": {"type": "integer"},
    },
    "required": ["name", "tags", "age", "zip", "maxLength"],
    "additionalProperties": False,
    "$defs": {"Tag": {"type": "string", "enum": ["a", "b"]}},
}


def test_ordinary_schemas_pass():
    for schema in (
        PERSON,
        {},
        True,
        {"type": "string", "maxLength": MAX_COUNT},
        {"enum": [f"v{i}" for i in range(500)]},
    ):
        check(schema_grammar(schema)._grammar)
    many = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(100)}}
    check(schema_grammar(many)._grammar)


def test_plain_schemas_are_llama_cpps():
    assert schema_grammar(PERSON)._grammar == LlamaGrammar.from_json_schema(json.dumps(PERSON))._grammar


def doubling(n):
    """Each definition refers to the next twice; the converter finds no rule under a name with an underscore, and makes
    it again.
    """
    define = lambda i: {"type": "object", "properties": {p: {"$ref": f"#/$defs/d_{i + 1}"} for p in "ab"}}
    return {"$ref": "#/$defs/d_0", "$defs": {f"d_{i}": define(i) for i in range(n)} | {f"d_{n}": {"type": "null"}}}


def nested(n):
    schema = {"type": "null"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED_SCHEMAS = {
    "maxLength": ({"type": "string", "maxLength": 20_000}, "maxLength=20000"),
    "minLength": ({"type": "string", "minLength": 1_000_000_000}, "minLength=1000000000"),
    "minItems": ({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}, "minItems"),
    "fraction": ({"type": "string", "maxLength": 1.5}, "maxLength=1.5"),
    "negative": ({"type": "string", "maxLength": -1}, "maxLength=-1"),
    "pattern": ({"type": "string", "pattern": "^a{1,100000}$"}, "pattern repeats"),
    "pattern-of-patterns": ({"type": "string", "pattern": "^" + "(a{100})" * 20 + "$"}, "pattern repeats"),
    "groups": ({"type": "string", "pattern": "^" + "(" * 5000 + "a" + ")" * 5000 + "$"}, "groups"),
    "deep": (nested(2000), "deep"),
    "wide": ({"enum": list(range(100_000))}, "values"),
    "doubling": (doubling(60), "JSON schema"),
    "reference": ({"$ref": "#/$defs/none"}, "cannot be followed"),
    "remote": ({"$ref": "https://example.com/schema.json"}, "cannot be followed"),
    "open-pattern": ({"type": "string", "pattern": "a"}, "cannot be followed"),
    "type": ({"type": "strange"}, "cannot be followed"),
    "false": (False, "false"),
    "list": ([1], "is a list"),
}


@pytest.mark.parametrize(("schema", "words"), REFUSED_SCHEMAS.values(), ids=REFUSED_SCHEMAS)
def test_refused_schemas(schema, words):
    with pytest.raises(errors.ConfigError, match=words) as caught:
        schema_grammar(schema)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_grammar_of_a_schema_is_bounded():
    """Many small repetitions come to a large grammar, which is refused as such."""
    schema = {
        "type": "object",
        "properties": {f"p{i}": {"type": "string", "minLength": MAX_COUNT} for i in range(1000)},
    }
    with pytest.raises(errors.ConfigError, match=str(MAX_BYTES)):
        schema_grammar(schema)


def test_response_formats():
    assert response_grammar(None) is None and response_grammar({"type": "text"}) is None
    assert response_grammar({"type": "json_object"})._grammar == llama_grammar.JSON_GBNF
    wrapped = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    assert response_grammar(wrapped)._grammar == schema_grammar(PERSON)._grammar
    for bad in (
        {},
        {"type": "xml"},
        "json",
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {}},
        {"type": "text", "schema": {}},
    ):
        with pytest.raises(errors.ConfigError, match="response_format"):
            response_grammar(bad)
