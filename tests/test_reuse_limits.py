"""What must not be used again: caches that were touched, decoders whose cache keeps no single tokens; and room that
others need.
"""

import contextlib
from dataclasses import replace

import llama_cpp
import numpy as np
import pytest
from helpers import stock
from helpers.chatting import COLOR, PLATE, data_url, user
from helpers.decoders import write_recurrent, write_sliding
from helpers.models import LLAMA, random_image
from helpers.reusing import QUESTIONS, cells, engine, first_tokens, fresh, same
from llama_cpp import Llama

from star_edge import PRESETS, PruneConfig, StarChatHandler, errors, refvlm
from star_edge.llamacpp.context import MAIN, N_SEQUENCES, PARKED
from star_edge.llamacpp.tap import Plan
from star_edge.rows import Rows


@pytest.mark.parametrize(("window", "has_stage"), [(24, False), (400, True)])
def test_sliding_windows_keep_nothing(families, tmp_path, window, has_stage):
    """llama.cpp gives out cells that have left the window, parked ones too. The encoder's output is kept all the
    same.
    """
    write_sliding(tmp_path / "text.gguf", replace(LLAMA, n_layers=4), window)
    models = replace(families["llama"], text=tmp_path / "text.gguf")
    with engine(models) as vlm:
        assert vlm.decoder.n_swa == window
        for i, question in enumerate((*QUESTIONS, QUESTIONS[0])):
            for preset in (None, *(replace(PRESETS[name], seen_below=False) for name in ("balanced", "star"))):
                request = (f"ab <__media__> {question}", random_image(1), preset)
                report = same(vlm.read_prompt(*request, chat=False), fresh(models, request))
                assert report.reused_tokens == 0 and (report.images[0].cached or not i)
                assert bool(report.windows) is (has_stage and preset is not None)
                assert vlm.llama._ctx.stem is None and cells(vlm)[1:] == [(-1, -1)] * (N_SEQUENCES - 1)


@pytest.mark.parametrize("swa_full", [True, False])
def test_cells_that_go_to_later_rows_have_no_count(families, tmp_path, swa_full):
    """The cache of a sliding window may be smaller than the context. A token of a long answer then gets a cell of the
    image, and must count once: the answer is that of a cache that is as large.
    """
    write_sliding(tmp_path / "text.gguf", replace(LLAMA, n_layers=4), 64)
    models = replace(families["llama"], text=tmp_path / "text.gguf")
    options = {"n_ctx": 448, "n_batch": 64, "n_ubatch": 64}
    request = ("a <__media__> b", random_image(1))
    config = PruneConfig(0.2, 0.1, decoder_layer=2)
    plain = replace(config, representatives="none", seen_below=False)

    def steps(config, **options):
        """Logits of 240 steps after the prompt, (240, n_vocab), and the report."""
        with engine(models, **options) as vlm:
            state, report = vlm.read_prompt(*request, config, chat=False)
            vlm._reader.hand_over(state)
            logits = []
            for i in range(240):
                vlm.llama.eval([97 + i % 20])
                logits.append(vlm.decoder.logits())
            return np.array(logits), report

    logits, report = steps(config, swa_full=swa_full, **options)
    assert report.windows and (report.images[0].decoder_mass is None) is not swa_full
    assert ["swa_full=False" in note for note in report.notes] == ([] if swa_full else [True, True])
    wanted, _ = steps(config if swa_full else plain, swa_full=True, **options)
    bound = 10 * np.abs(steps(None, swa_full=False, **options)[0] - steps(None, swa_full=True, **options)[0]).max()
    assert np.abs(logits - wanted).max() <= bound
    if not swa_full:
        counted, _ = steps(config, swa_full=True, **options)
        assert np.abs(counted - wanted).max() > bound


def test_recurrent_decoders_keep_nothing(families, tmp_path):
    """A state that has gone on cannot be taken back. Without pruning it is stock's, and with it the report says what
    cannot be.
    """
    write_recurrent(tmp_path / "text.gguf", replace(LLAMA, n_layers=4))
    models = replace(families["llama"], text=tmp_path / "text.gguf")
    plain = stock.load(models.text, True)
    with engine(models) as vlm:
        for question in (*QUESTIONS, QUESTIONS[0]):
            for preset in (None, "balanced", "star"):
                request = (f"ab <__media__> {question}", random_image(1), preset)
                report = same(vlm.read_prompt(*request, chat=False), fresh(models, request))
                assert report.reused_tokens == 0 and not report.windows
                assert vlm.llama._ctx.stem is None
                notes = [note.split(":")[0] for note in report.notes]
                assert notes == {None: [], "star": ["no decoder stage"]}.get(
                    preset, ["no decoder stage", "no representatives"]
                )
                assert report.images[0].vision_mass is None
                n = report.n_kv_cells
                assert vlm.generate(*request, max_tokens=3, chat=False).report.n_kv_cells == n
        tokens = np.array(vlm.llama.tokenize(b"a text", special=True), np.int32)
        state, _ = vlm.read_prompt("a text", chat=False)
        assert np.array_equal(state.logits, stock.decode(plain, tokens=tokens, positions=np.arange(len(tokens))))
    plain.close()


SURPRISES = {
    "llama_memory_clear": lambda vlm: llama_cpp.llama_memory_clear(vlm.decoder.memory, True),
    "other rows": lambda vlm: (
        llama_cpp.llama_memory_clear(vlm.decoder.memory, True),
        stock.decode(vlm.llama, tokens=np.arange(300, 400), positions=np.arange(100)),
    ),
    "kv_cache_clear": lambda vlm: vlm.llama._ctx.kv_cache_clear(),
    "seq_rm": lambda vlm: vlm.llama._ctx.kv_cache_seq_rm(-1, 20, -1),
    "all sequences": lambda vlm: llama_cpp.llama_memory_seq_rm(vlm.decoder.memory, -1, 20, -1),
    "another sequence": lambda vlm: llama_cpp.llama_memory_seq_cp(vlm.decoder.memory, PARKED, 5, 0, 10),
    "shift": lambda vlm: vlm.llama._ctx.kv_cache_seq_shift(0, 10, 30, 5),
    "eval": lambda vlm: (vlm.llama.reset(), vlm.llama.eval(list(range(300, 420)))),
    "completion": lambda vlm: vlm.llama.create_completion("x" * 90, max_tokens=3),
    "state": lambda vlm: vlm.llama.load_state(vlm.llama.save_state()),
    "n_ubatch": lambda vlm: setattr(vlm.decoder, "n_ubatch", 16),
    "inspect": lambda vlm: vlm.inspect("a", random_image(2), decoder_layers=[1]),
}
OF_PARKED_ROWS = ("all sequences", "another sequence", "shift")  # hybrid decoders park none


@pytest.mark.parametrize("idle", [False, True], ids=["read", "answered"])
@pytest.mark.parametrize(
    ("family", "surprise"),
    [("llama", surprise) for surprise in SURPRISES]
    + [(family, surprise) for family in ("qwen35", "lfm2") for surprise in SURPRISES if surprise not in OF_PARKED_ROWS],
)
def test_after_a_surprise_everything_is_read(families, family, surprise, idle):
    models = families[family]
    for preset in (None, "star"):
        request = ("ab <__media__> " + QUESTIONS[0], random_image(1), preset)
        with engine(models) as vlm:
            vlm.generate(*request, max_tokens=2, chat=False) if idle else vlm.read_prompt(*request, chat=False)
            SURPRISES[surprise](vlm)
            options = {"n_ubatch": 16} if surprise == "n_ubatch" else {}
            report = same(vlm.read_prompt(*request, chat=False), fresh(models, request, **options))
            assert report.reused_tokens == 0
            assert same(vlm.read_prompt(*request, chat=False), fresh(models, request, **options)).reused_tokens > 20


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize(("family", "preset"), [("llama", "balanced"), ("qwen35", "balanced"), ("qwen35", "star")])
def test_a_prompt_without_an_answer_leaves_nothing_to_a_text(families, family, preset, reuse):
    """Masses belong to cells, and a hybrid decoder hides some: text that gets such a cell counts once, and is seen.

    The prompt is read to its end, or cancelled before each of its decodes.
    """
    models = families[family]
    text = list(range(300, 360))

    def logits(vlm):
        vlm.llama.reset()
        vlm.llama.eval(text)
        return vlm.decoder.logits()

    with engine(models, reuse=reuse) as vlm:
        expected = logits(vlm)
        request = ("ab <__media__> " + QUESTIONS[0], random_image(1), preset)
        vlm.read_prompt(*request, chat=False)
        assert np.array_equal(logits(vlm), expected)
        n_cancelled = 0
        for most in range(1, 12):
            calls = iter(range(most))
            with (
                vlm.cancellable(lambda calls=calls: next(calls, None) is None),
                contextlib.suppress(errors.RequestCancelledError),
            ):
                vlm.generate(*request, max_tokens=1, chat=False)
                continue
            n_cancelled += 1
            assert np.array_equal(logits(vlm), expected)
        assert n_cancelled > 3


def test_a_state_of_another_image_is_no_stem(families):
    """Llama.load_state brings back cells of the same sequences and positions."""
    ask = lambda vlm, seed: vlm.read_prompt("ab <__media__> c", random_image(seed), "star", chat=False)
    with engine(families["llama"]) as vlm:
        first = ask(vlm, 1)
        n_prefix = len(first_tokens(vlm, "ab <__media__> c", [random_image(1)]))
        saved = vlm.llama.save_state()
        ask(vlm, 2)
        vlm.llama.load_state(saved)
        assert (
            same(ask(vlm, 2), fresh(families["llama"], ("ab <__media__> c", random_image(2), "star"))).reused_tokens
            == 0
        )
        assert same(ask(vlm, 1), first).reused_tokens == n_prefix


def test_rows_that_move_are_read_again(families, monkeypatch):
    """llama.cpp gives other cells than expected: found out, and read from the beginning."""
    models = families["llama"]
    for preset in ("star", None):
        requests = [(f"ab <__media__> {q}", random_image(1), preset) for q in QUESTIONS]
        with engine(models) as vlm:
            vlm.read_prompt(*requests[0], chat=False)
            remove = type(vlm.decoder).remove
            n_calls = []

            def leave_one(self, sequence, start, stop=-1, remove=remove, n_calls=n_calls):
                remove(self, sequence, start, stop)
                if sequence == PARKED and start == 0 and not n_calls:  # a cell in the way of the rows that come next
                    n_calls.append(1)
                    at = llama_cpp.llama_memory_seq_pos_max(self.memory, MAIN) + 1
                    one = np.array([300], np.int32)
                    self.decode(Rows(np.arange(at, at + 1), tokens=one), at, Plan(), "in the way")
                    self.copy(MAIN, 5, at)
                    remove(self, MAIN, at)

            monkeypatch.setattr(type(vlm.decoder), "remove", leave_one)
            got = vlm.read_prompt(*requests[1], chat=False)
            assert n_calls
            monkeypatch.undo()
            assert same(got, fresh(models, requests[1])).reused_tokens == 0
            assert "fallback" in got[1].milliseconds
            assert same(vlm.read_prompt(*requests[0], chat=False), fresh(models, requests[0])).reused_tokens > 20


def test_nothing_is_left_when_it_is_off(families):
    with engine(families["llama"], reuse=False) as vlm:
        for _ in range(2):
            state, report = vlm.read_prompt("a", random_image(1), replace(PRESETS["star"], seen_below=False))
            assert report.reused_tokens == 0
        assert cells(vlm) == [(0, state.n_cells - 1)] + [(-1, -1)] * (N_SEQUENCES - 1)


def test_a_long_answer_takes_the_cells_of_the_stem(families):
    """The context is as large as without reuse, and before it is full nobody pays."""
    models = families["llama"]
    with engine(models, n_ctx=256) as vlm:
        request = ("ab <__media__> " + "c" * 140, random_image(1), PruneConfig(1.0, 4, 2))
        free = 256 - 4 - vlm.read_prompt(*request, chat=False)[1].n_text_tokens
        assert vlm.llama._ctx.n_parked == 45 < free
        unwanted = [
            vlm.llama.token_eos(),
            *range(3 + 0x80, 3 + 0x100),
        ]  # after part of a character there is more than max_tokens
        ask = lambda n: vlm.generate(*request, max_tokens=n, chat=False, logit_bias=dict.fromkeys(unwanted, -100.0))
        assert ask(free - 45).finish_reason == "length" and vlm.llama._ctx.n_parked == 45
        assert same(vlm.read_prompt(*request, chat=False), fresh(models, request, n_ctx=256)).reused_tokens > 49
        answer = ask(None)
        assert answer.finish_reason == "length" and vlm.llama._ctx.n_parked == 0
        assert answer.report.n_kv_cells + answer.report.n_generated >= 256
        assert same(vlm.read_prompt(*request, chat=False), fresh(models, request, n_ctx=256)).reused_tokens == 0
        with pytest.raises(errors.ContextLengthError):
            vlm.read_prompt("x" * 300, chat=False)
        assert vlm.read_prompt(*request, chat=False)[1].reused_tokens > 49
        assert vlm.read_prompt("y" * 240, chat=False)[0].n_cells > 240  # does not fit beside the stem


def test_an_owner_finds_the_llama_as_if_nothing_had_been_asked(families):
    models = families["llama"]
    with engine(models, n_ctx=256) as vlm:
        expected = vlm.llama.create_completion("x" * 100, max_tokens=100, temperature=0.0)["choices"][0]["text"]
        vlm.generate("ab <__media__> c", random_image(1), "star", max_tokens=3, chat=False)
        assert [first for first, _ in cells(vlm)] == [-1, 0, -1, -1, -1, -1, -1]
        assert vlm.llama.create_completion("x" * 100, max_tokens=100, temperature=0.0)["choices"][0]["text"] == expected
        assert [first for first, _ in cells(vlm)] == [0, -1, -1, -1, -1, -1, -1]
        vlm.generate("ab <__media__> c", random_image(1), "star", max_tokens=3, chat=False)
        state = vlm.llama.save_state()
        vlm.llama.load_state(state)
        assert vlm.llama.create_completion("x" * 200, max_tokens=40)


@pytest.mark.parametrize("preset", ["off", "star"])
def test_chat_handler(families, preset):
    """Questions about one image through Llama.create_chat_completion, with other uses of the Llama between."""
    image = random_image(3, 168, 168)
    ask = lambda llm, question, **options: llm.create_chat_completion(
        [user(data_url(image), question)], max_tokens=8, temperature=0.0, **options
    )
    text = lambda response: response["choices"][0]["message"]["content"]
    make = lambda **options: Llama(
        str(refvlm.TEXT_MODEL),
        n_ctx=1024,
        n_threads=1,
        verbose=False,
        flash_attn=True,
        chat_handler=StarChatHandler(str(refvlm.MMPROJ), verbose=False, prune=preset, **options),
    )
    llm, plain = make(), make(reuse=False, image_cache_bytes=0)
    expected = {q: text(ask(plain, q)) for q in (COLOR, PLATE)}
    reused = []
    for i, question in enumerate((COLOR, PLATE, PLATE, COLOR, PLATE, COLOR)):
        if i == 2:
            llm.create_completion("USER: is there a star?", max_tokens=3)
        if i == 3:
            next(ask(llm, PLATE, stream=True))
        if i == 4:
            with pytest.raises(errors.StarEdgeError):
                llm.create_chat_completion([user("data:image/png;base64,AAAA", COLOR)])
        response = ask(llm, question)
        assert text(response) == expected[question]
        reused.append(response["star_edge"]["reused_tokens"] > 50)
        assert response["star_edge"]["images"][0]["cached"] is (i > 0)
    assert reused == [False, True, False, True, True, True]
    llm.close()
    plain.close()
