"""Conversations that take turns: what the decoder read of each waits in memory. Answers equal a fresh engine's."""

import contextlib

import numpy as np
import pytest
from helpers.models import random_image
from helpers.reusing import answers, engine, first_tokens, fresh, same

from star_edge import PruneConfig, StarVLM
from star_edge.errors import ConfigError, EngineError
from star_edge.llamacpp import saved_rows

M = "<__media__>"
ROOM = dict(prompt_cache_bytes=2**28)


def turns(picture, image, preset):
    """Two turns of a conversation, as requests."""
    first = f"system: be brief {M} what is in picture {picture}?"
    return [(first, image, preset), (f"{first} a cat. And where is it?", image, preset)]


@pytest.mark.parametrize("preset", ["off", "balanced", "pyramiddrop"])
@pytest.mark.parametrize(
    ("flash_attn", "cache"), [(False, "f16"), (True, "f16"), (True, "q8_0")], ids=["no-fa", "fa", "fa-q8_0"]
)
@pytest.mark.parametrize("family", ["llama", "qwen2vl", "qwen35", "lfm2"])
def test_conversations_that_take_turns_equal_fresh_engines(families, family, flash_attn, cache, preset):
    models = families[family]
    options = dict(flash_attn=flash_attn, type_k=cache, type_v=cache)
    a, b, c = (turns(name, random_image(i), preset) for i, name in enumerate("abc"))
    with engine(models, **options, **ROOM) as vlm:
        for i, request in enumerate([a[0], b[0], c[0], b[1], a[1], b[1], a[1]]):
            report = same(vlm.read_prompt(*request, chat=False), fresh(models, request, **options))
            assert report.in_place
            whole = to_the_image(vlm, request, report)
            assert report.reused_tokens == (whole if i >= 3 else whole - report.n_vision_kept if i else 0), i


@pytest.mark.parametrize("family", ["llama", "qwen2vl", "qwen35"])
def test_answers_after_others_equal_a_fresh_engines(families, family):
    """Token by token: cells, masses and positions of a restored prompt count while the answer is generated."""
    models = families[family]
    for preset in ("balanced", "off", PruneConfig(0.5, 0.25, 2, seen_below=True)):
        a, b = (turns(name, random_image(i), preset) for i, name in enumerate("ab"))
        with engine(models, **ROOM) as vlm:
            for request in (a[0], b[0], a[1], b[1]):
                got = answers(vlm, request, 20)
                with engine(models) as other:
                    assert np.array_equal(got, answers(other, request, 20))


def reused(vlm, request):
    return vlm.read_prompt(*request, chat=False)[1].reused_tokens


def to_the_image(vlm, request, report):
    """Rows up to the last image, of a request with one picture."""
    return len(first_tokens(vlm, request[0], [request[1]])) + report.n_vision_kept


def test_memory_is_bounded_and_the_least_recently_used_goes_first(families):
    models = families["llama"]
    a, b, c, d = (turns(name, random_image(i), "off") for i, name in enumerate("abcd"))
    with engine(models, **ROOM) as vlm:
        saved = vlm._reader.saved
        for first, _ in (a, b):
            reused(vlm, first)
        one = saved.used
        assert len(saved) == 1 and one > 0
    with engine(models, prompt_cache_bytes=2 * one + one // 2) as vlm:
        saved = vlm._reader.saved
        for first, _ in (a, b, c):
            reused(vlm, first)
        assert len(saved) == 2 and saved.used == 2 * one
        n_stem = vlm.read_prompt(*a[1], chat=False)[1].reused_tokens  # a comes back, c waits, b is older than c
        reused(vlm, d[0])  # a waits, b goes
        assert len(saved) == 2 and saved.used == 2 * one
        assert reused(vlm, c[1]) == n_stem and reused(vlm, a[1]) == n_stem > reused(vlm, b[1])


def test_nothing_is_copied_while_one_conversation_goes_on(families, monkeypatch):
    a = turns("a", random_image(1), "balanced")
    with engine(families["llama"], **ROOM) as vlm:
        monkeypatch.setattr(saved_rows, "save_rows", lambda *_: pytest.fail("rows were copied"))
        reused(vlm, a[0])
        assert reused(vlm, a[1]) > 0
        more = (a[1][0] + f" there. And in {M} this one?", [a[0][1], random_image(2)], "balanced")
        assert reused(vlm, more) > 0
        assert len(vlm._reader.saved) == 0


def test_nothing_waits_unless_there_is_room_for_it(families):
    a, b = (turns(name, random_image(i), "balanced") for i, name in enumerate("ab"))
    for options in ({}, {"prompt_cache_bytes": 1000}, {"reuse": False, **ROOM}):
        with engine(families["llama"], **options) as vlm:
            for request in (a[0], b[0], a[1]):
                report = same(vlm.read_prompt(*request, chat=False), fresh(families["llama"], request))
                assert report.reused_tokens < to_the_image(vlm, request, report) and len(vlm._reader.saved) == 0
    for wrong in (-1, 1.5, "1"):
        with pytest.raises(ConfigError, match="^prompt_cache_bytes="):
            StarVLM(families["llama"].text, prompt_cache_bytes=wrong)


def test_one_picture_with_several_configs(families):
    """Rows of other budgets are other rows. Those of the same config come back."""
    image = random_image(1)
    with engine(families["llama"], **ROOM) as vlm:
        for i in range(2):
            for preset in ("off", "balanced", "fast", PruneConfig(1.0, 0.25, 2)):
                request = (f"one {M} two?", image, preset)
                report = same(vlm.read_prompt(*request, chat=False), fresh(families["llama"], request))
                assert (report.reused_tokens == to_the_image(vlm, request, report)) == bool(i), preset


def test_a_saved_prompt_of_which_a_part_is_used_still_waits(families):
    a, b = turns("a", random_image(1), "off"), ("another beginning", [], None)
    only_text = (a[0][0].replace(M, "no picture"), [], None)
    with engine(families["qwen35"], **ROOM) as vlm:
        for request in (a[0], b, only_text, b, a[1]):
            report = same(vlm.read_prompt(*request, chat=False), fresh(families["qwen35"], request))
        assert report.reused_tokens == to_the_image(vlm, a[1], report)
    other_picture = (a[0][0], random_image(2), "off")
    with engine(families["llama"], **ROOM) as vlm:
        for request in (a[0], b, other_picture, b, a[1]):
            report = same(vlm.read_prompt(*request, chat=False), fresh(families["llama"], request))
        assert report.reused_tokens == to_the_image(vlm, a[1], report)


@pytest.mark.parametrize("family", ["llama", "qwen35"])
def test_an_answer_that_needs_the_cells_leaves_the_prompt_in_memory(families, family):
    a = turns("a", random_image(1), PruneConfig(1.0, 0.25, 3, representatives="none"))
    options = dict(n_ctx=256)
    with engine(families[family], **options, **ROOM) as vlm:
        _, report = vlm.read_prompt(*a[0], chat=False)
        n_left = 256 - report.n_kv_cells
        got = answers(vlm, a[0], n_left - 1)
        assert vlm.llama._ctx.stem is None and len(vlm._reader.saved) == 1
        with engine(families[family], **options) as other:
            assert np.array_equal(got, answers(other, a[0], n_left - 1))
        report = same(vlm.read_prompt(*a[1], chat=False), fresh(families[family], a[1], **options))
        assert report.reused_tokens == to_the_image(vlm, a[1], report)


def test_a_prompt_read_afresh_uses_none_and_loses_none(families):
    a, b = (turns(name, random_image(i), "balanced") for i, name in enumerate("ab"))
    with engine(families["llama"], **ROOM) as vlm:
        for request in (a[0], b[0]):
            reused(vlm, request)
        with vlm._reader.afresh():
            assert reused(vlm, a[1]) == 0
        for request in (a[1], b[1]):
            report = same(vlm.read_prompt(*request, chat=False), fresh(families["llama"], request))
            assert report.reused_tokens == to_the_image(vlm, request, report)


@pytest.mark.parametrize("family", ["llama", "qwen35"])
def test_what_llama_cpp_does_not_take_back_is_read_again(families, family, monkeypatch):
    a, b = (turns(name, random_image(i), "balanced") for i, name in enumerate("ab"))

    def refuse(*_):
        raise EngineError("llama.cpp did not take the rows of a prompt back")

    with engine(families[family], **ROOM) as vlm:
        for request in (a[0], b[0]):
            reused(vlm, request)
        with monkeypatch.context() as patch:
            patch.setattr(saved_rows, "restore_rows", refuse)
            assert same(vlm.read_prompt(*a[1], chat=False), fresh(families[family], a[1])).reused_tokens == 0
        for request in (b[1], a[1]):
            report = same(vlm.read_prompt(*request, chat=False), fresh(families[family], request))
            assert report.reused_tokens == to_the_image(vlm, request, report)


def test_rows_that_come_back_to_other_cells_are_read_again(families, monkeypatch):
    """A mutant of the cache: what is restored does not begin at the first cell."""
    a, b = (turns(name, random_image(i), "off") for i, name in enumerate("ab"))
    with engine(families["llama"], **ROOM) as vlm:
        for request in (a[0], b[0]):
            reused(vlm, request)
        restore = saved_rows.restore_rows

        def elsewhere(llama, sequence, data):
            with contextlib.suppress(EngineError):
                restore(llama, sequence + 1, data)
            restore(llama, sequence, data)
            vlm.decoder.remove(sequence + 1, 0)

        monkeypatch.setattr(saved_rows, "restore_rows", elsewhere)
        report = same(vlm.read_prompt(*a[1], chat=False), fresh(families["llama"], a[1]))
        assert report.reused_tokens == 0
