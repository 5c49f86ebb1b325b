"""Options of a model are stated once, and every front has them: names, defaults, descriptions and checks."""

import inspect

import pytest

from star_edge import StarChatHandler, StarVLM
from star_edge.cli.options import model_options
from star_edge.errors import ConfigError
from star_edge.options import AFRESH, CacheOptions, EncoderOptions, LoadOptions, describe_options, names_of

GROUPS = (LoadOptions, EncoderOptions, CacheOptions)
FRONTS = [(StarVLM, GROUPS), (StarChatHandler, (EncoderOptions, CacheOptions))]


@pytest.mark.parametrize(("front", "groups"), FRONTS)
def test_fronts_have_every_option_with_its_default(front, groups):
    parameters = inspect.signature(front).parameters
    for group in groups:
        for name in names_of(group):
            # verbose of the handler is MTMDChatHandler's
            assert parameters[name].default == getattr(group(), name), (group.__name__, name)


@pytest.mark.parametrize(("front", "groups"), FRONTS)
def test_help_says_what_the_group_says(front, groups):
    text = " ".join(inspect.getdoc(front).split())
    for group in groups:
        for entry in inspect.getdoc(group).partition("Attributes:\n")[2].partition("\n\n")[0].splitlines():
            assert " ".join(entry.split()) in text, entry
    assert not any(f"As in {group.__name__}." in text for group in groups)


def test_the_command_has_the_same_defaults():
    @model_options
    def command(**options):
        """A command with the options alone."""

    without = ("n_threads", "verbose")  # click's own default for an option and a flag
    defaults = {param.name: param.default for param in command.__click_params__ if param.name not in without}
    shared = {name: getattr(group(), name) for group in GROUPS for name in names_of(group) if name in defaults}
    assert len(shared) >= 7
    assert {name: defaults[name] for name in shared} == shared


def test_a_group_takes_its_own():
    options = {"n_ctx": 512, "reuse": False, "seed": 3}
    assert LoadOptions.take(options) == LoadOptions(n_ctx=512)
    assert CacheOptions.take(options) == CacheOptions(reuse=False) and options == {"seed": 3}
    assert CacheOptions(**AFRESH) == CacheOptions(image_cache_bytes=0, reuse=False)


@pytest.mark.parametrize(
    ("group", "values", "words"),
    [
        (LoadOptions, {"n_ctx": 1}, "n_ctx=1 has no room"),
        (LoadOptions, {"n_ubatch": 0}, "n_ubatch=0 is out of range"),
        (LoadOptions, {"flash_attn": 3}, "flash_attn=3 is a int"),
        (LoadOptions, {"type_k": 3}, "type_k=3 is not a KV cache type"),
        (LoadOptions, {"type_v": "q4_0", "flash_attn": False}, "type_v='q4_0' needs flash attention"),
        (EncoderOptions, {"encoder": "new"}, "encoder='new' is unknown"),
        (EncoderOptions, {"image_max_tokens": -2}, "image_max_tokens=-2 is out of range"),
        (EncoderOptions, {"image_min_tokens": 9, "image_max_tokens": 3}, "image_min_tokens=9 is more than"),
        (CacheOptions, {"image_cache_bytes": -1}, "image_cache_bytes=-1 is not a whole number"),
        (CacheOptions, {"image_cache_dir": ""}, "image_cache_dir='' names no directory"),
        (CacheOptions, {"reuse": "yes"}, "reuse='yes' is a str"),
    ],
)
def test_values_that_cannot_be_used(group, values, words):
    with pytest.raises(ConfigError, match=words):
        group(**values)


def test_arguments_of_llama():
    given = LoadOptions(n_threads=3, type_k="q8_0").for_llama()
    assert (given["n_threads"], given["n_threads_batch"], given["type_k"], given["type_v"]) == (3, 3, 8, 1)
    assert LoadOptions().for_llama()["n_threads"] >= 1


def test_a_description_that_is_missing_is_an_error():
    with pytest.raises(AssertionError, match="does not describe nothing"):

        @describe_options(CacheOptions)
        class Front:
            """A front.

            Args:
                nothing: As in CacheOptions.
            """
