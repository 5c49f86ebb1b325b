"""agenerate and achat: the same answers, one request at a time, cancelling, and readers that stop early."""

import asyncio
import contextlib
import threading

import pytest
from helpers.chatting import COLOR, DEMO, PLATE, TOOL, TOOL_TEMPLATE, user

from star_edge import AsyncAnswerStream, StarVLM, refvlm
from star_edge.errors import ConfigError, EngineClosedError, PromptError, RequestCancelledError, RequestTimeoutError

PICTURE = refvlm.DEMO_IMAGE
GUARD = 120  # seconds after which a test that hangs has failed


def engine(**options):
    return StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, **{"n_ctx": 512, "n_threads": 1, **options})


@pytest.fixture(scope="module")
def vlm():
    with engine() as vlm:
        yield vlm


def run(coroutine):
    async def guarded():
        return await asyncio.wait_for(coroutine, GUARD)

    return asyncio.run(guarded())


class Gate:
    """A logits processor that counts, and stops at its n-th call until it is opened."""

    def __init__(self, n=1):
        self.n, self.calls = n, 0
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, tokens, scores):
        self.calls += 1
        if self.calls == self.n:
            self.reached.set()
            assert self.opened.wait(GUARD)
        return scores

    async def wait(self):
        await asyncio.to_thread(self.reached.wait, GUARD)
        assert self.reached.is_set()


def long(vlm):
    """Options of an answer that does not end by itself."""
    return {"max_tokens": 100, "logit_bias": {vlm.llama.token_eos(): -1e5}}


def test_the_same_answers(vlm):
    async def main():
        assert (await vlm.agenerate(COLOR, PICTURE, "fast", 8)).text == vlm.generate(COLOR, PICTURE, "fast", 8).text
        answer = await vlm.achat([user(DEMO, PLATE)], max_tokens=8, temperature=0.7, seed=3)
        wanted = vlm.chat([user(DEMO, PLATE)], max_tokens=8, temperature=0.7, seed=3)
        assert (answer.text, answer.finish_reason, answer.message) == (
            wanted.text,
            wanted.finish_reason,
            wanted.message,
        )
        assert answer.report.n_generated == wanted.report.n_generated
        stream = await vlm.achat([user(DEMO, PLATE)], stream=True, max_tokens=8)
        assert isinstance(stream, AsyncAnswerStream) and stream.finish_reason is None and stream.text == ""
        pieces = [piece async for piece in stream]
        wanted = vlm.chat([user(DEMO, PLATE)], max_tokens=8)
        assert "".join(pieces) == stream.text == wanted.text and stream.finish_reason == wanted.finish_reason
        assert stream.message == wanted.message and stream.report.n_image_tokens == 144
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    run(main())


def test_a_chosen_tool():
    options = {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required", "max_tokens": 64}

    async def main(vlm):
        wanted = vlm.chat([user(DEMO, "report")], **options)
        answer = await vlm.achat([user(DEMO, "report")], **options)
        stream = await vlm.achat([user(DEMO, "report")], stream=True, **options)
        assert stream.tool_calls == []
        assert "".join([piece async for piece in stream]) == wanted.text
        for got in (answer, stream):
            assert [call["function"] for call in got.tool_calls] == [call["function"] for call in wanted.tool_calls]
            assert got.finish_reason == "tool_calls" and got.message["content"] is None

    with engine(chat_template=TOOL_TEMPLATE) as vlm:
        run(main(vlm))


def test_one_at_a_time_in_order(vlm):
    """Streams, whole answers and another thread's requests: none begins within another, and none ends another."""
    wanted = {n: vlm.generate("a" * n, max_tokens=12).text for n in range(1, 9)}
    running, order = [], []

    def watch(n):
        def step(tokens, scores):
            if not order or order[-1] != n:
                order.append(n)
            running.append(n)
            assert running == [n]
            running.remove(n)
            return scores

        return [step]

    async def ask(n):
        if n % 2:
            return n, (await vlm.agenerate("a" * n, max_tokens=12, logits_processor=watch(n))).text
        stream = await vlm.agenerate("a" * n, max_tokens=12, stream=True, logits_processor=watch(n))
        await asyncio.sleep(0.01)
        return n, "".join([piece async for piece in stream])

    async def main():
        thread = asyncio.to_thread(vlm.generate, "a" * 8, max_tokens=12, logits_processor=watch(8))
        *results, other = await asyncio.gather(*(ask(n) for n in range(1, 8)), thread)
        assert dict(results) == {n: wanted[n] for n in range(1, 8)} and other.text == wanted[8]

    run(main())
    assert sorted(order) == list(range(1, 9))  # each ran as one
    assert [n for n in order if n != 8] == list(range(1, 8))  # in order of arrival


def test_the_loop_goes_on_meanwhile(vlm):
    gate = Gate()

    async def main():
        task = asyncio.create_task(vlm.agenerate(COLOR, PICTURE, logits_processor=[gate]))
        await gate.wait()
        assert not task.done()
        gate.opened.set()
        assert (await task).text == " red"

    run(main())


# ---- cancelling ----


def test_a_cancelled_task_ends_its_answer(vlm):
    gate = Gate(3)

    async def main():
        task = asyncio.create_task(vlm.agenerate("x", logits_processor=[gate], **long(vlm)))
        await gate.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()
        assert (await vlm.agenerate(COLOR, PICTURE)).text == " red"

    run(main())
    assert gate.calls == 3  # no token after it


def test_a_cancelled_task_ends_the_reading():
    reads, reached, opened = [], threading.Event(), threading.Event()

    def progress(p):
        if p.phase == "read" and p.done > 0:
            reads.append(p.done)
            reached.set()
            assert opened.wait(GUARD)

    async def main(vlm):
        for stream in (False, True):
            reads.clear(), reached.clear(), opened.clear()
            task = asyncio.create_task(vlm.achat([user(DEMO, PLATE)], progress=progress, stream=stream))
            await asyncio.to_thread(reached.wait, GUARD)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            opened.set()
            assert (await vlm.agenerate(COLOR, PICTURE)).text == " red"
            assert len(reads) == 1  # no decode after it

    with engine(n_ubatch=16, n_batch=16, reuse=False) as vlm:
        run(main(vlm))


def test_a_cancelled_task_that_waits_never_begins(vlm):
    gate, begun = Gate(), []

    async def main():
        first = asyncio.create_task(vlm.agenerate("x", max_tokens=2, logits_processor=[gate]))
        await gate.wait()
        second = asyncio.create_task(vlm.agenerate("y", max_tokens=2, progress=begun.append))
        third = asyncio.create_task(vlm.agenerate(COLOR, PICTURE))
        await asyncio.sleep(0.01)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert not third.done()
        gate.opened.set()
        await first
        assert (await third).text == " red"

    run(main())
    assert begun == []


def test_a_task_that_is_cancelled_while_it_reads_a_stream(vlm):
    gate = Gate(3)

    async def reader():
        async for _ in await vlm.agenerate("x", stream=True, logits_processor=[gate], **long(vlm)):
            pass

    async def main():
        task = asyncio.create_task(reader())
        await gate.wait()
        await asyncio.sleep(0.01)  # the reader waits for the third piece
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()
        assert (await vlm.agenerate(COLOR, PICTURE)).text == " red"

    run(main())
    assert gate.calls == 3


def test_cancellable_blocks_hold_for_tasks(vlm):
    stop = threading.Event()

    async def main():
        with vlm.cancellable(stop.is_set):
            assert (await vlm.agenerate(COLOR, PICTURE)).text == " red"
            stop.set()
            with pytest.raises(RequestCancelledError):
                await vlm.agenerate(COLOR, PICTURE)
        assert (await vlm.agenerate(COLOR, PICTURE)).text == " red"

    run(main())


# ---- readers that stop early ----


def test_a_reader_that_stops_and_keeps_the_stream(vlm):
    """The answer runs to its end without it, and the next request comes after that."""

    async def main():
        stream = await vlm.agenerate("x", stream=True, max_tokens=24, logit_bias=long(vlm)["logit_bias"])
        async for _ in stream:
            break
        assert (await vlm.agenerate(COLOR, PICTURE)).text == " red"
        assert stream.report.n_generated == 24 and stream.finish_reason is None
        rest = [piece async for piece in stream]  # the pieces are still there
        assert rest and stream.finish_reason == "length"

    run(main())


@pytest.mark.parametrize("how", ["aclose", "with", "drop"])
def test_a_reader_that_ends_the_stream(vlm, how):
    gate = Gate(4)

    async def main():
        stream = await vlm.agenerate("x", stream=True, logits_processor=[gate], **long(vlm))
        await gate.wait()
        threading.Timer(0.05, gate.opened.set).start()
        if how == "aclose":
            await anext(stream)
            await stream.aclose()
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        elif how == "with":
            with contextlib.suppress(KeyError):
                async with stream:
                    raise KeyError
        else:
            del stream
        assert (await vlm.agenerate(COLOR, PICTURE)).text == " red"

    run(main())
    assert gate.calls == 4


def test_a_loop_that_ends_before_its_stream(vlm):
    """asyncio.run returns while the answer is under way: the engine is free again."""
    gate, kept = Gate(2), []

    async def main():
        kept.append(await vlm.agenerate("x", stream=True, logits_processor=[gate], **long(vlm)))
        await gate.wait()

    run(main())
    gate.opened.set()
    assert vlm.generate(COLOR, PICTURE).text == " red"
    assert gate.calls < 100


def test_closing_the_engine_ends_its_streams():
    gate = Gate(2)

    async def main():
        vlm = engine()
        stream = await vlm.agenerate("x", stream=True, logits_processor=[gate], **long(vlm))
        await gate.wait()
        threading.Timer(0.05, gate.opened.set).start()
        vlm.close()
        with pytest.raises(RequestCancelledError):
            async for _ in stream:
                pass
        with pytest.raises(EngineClosedError):
            await vlm.agenerate("x")

    run(main())
    assert gate.calls == 2


# ---- errors ----


def test_errors_come_out_of_await(vlm):
    async def main():
        for stream in (False, True):
            with pytest.raises(ConfigError, match="did you mean images="):
                await vlm.agenerate("x", image=PICTURE, stream=stream)
            with pytest.raises(PromptError):
                await vlm.achat([], stream=stream)
            with pytest.raises(ConfigError, match="timeout=0"):
                await vlm.achat([user("x")], timeout=0, stream=stream)
        with pytest.raises(ConfigError, match="stream='yes'"):
            await vlm.agenerate("x", stream="yes")
        stream = await vlm.agenerate("x", stream=True, logits_processor=[lambda tokens, scores: 1 / 0])
        with pytest.raises(ZeroDivisionError):
            await anext(stream)
        assert (await vlm.agenerate(COLOR, PICTURE)).text == " red"

    run(main())


def test_timeouts(vlm):
    """While it waits for its turn, and while it answers. The engine is free afterwards."""
    gate, late = Gate(), Gate(2)

    async def main():
        first = asyncio.create_task(vlm.agenerate("x", max_tokens=2, logits_processor=[gate]))
        await gate.wait()
        with pytest.raises(
            RequestTimeoutError, match="timeout=0.05 seconds have passed before the request's turn came"
        ):
            await vlm.agenerate("x", timeout=0.05)
        gate.opened.set()
        await first
        threading.Timer(2.5, late.opened.set).start()
        with pytest.raises(RequestTimeoutError, match="timeout=2 seconds have passed"):
            await vlm.agenerate("x", timeout=2, logits_processor=[late], **long(vlm))
        assert (await vlm.agenerate(COLOR, PICTURE)).text == " red"

    run(main())
