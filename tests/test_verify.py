"""--verify: every Nth pruned answer beside the unpruned one, in batches and on the server, where nobody waits."""

import asyncio
import json
import types

import anyio
import pytest
from helpers.serving import DEMO, Server, message

from star_edge import PruneConfig, StarVLM, refvlm
from star_edge.batch import Settings, Task, mark_every, run_tasks
from star_edge.errors import ConfigError, RequestCancelledError
from star_edge.server.metrics import Metrics
from star_edge.server.settings import Policy
from star_edge.server.verifying import Verifier
from star_edge.verify import Agreement, answer_text, compare

IMAGE = str(refvlm.DEMO_IMAGE)
QUESTIONS = [question["question"] for question in refvlm.demo_questions()]
ONE_TOKEN = PruneConfig(vision_keep=1)  # most answers are lost
KEEP_ALL = PruneConfig()  # computes the same as no config, and counts as one


def test_every_nth():
    agreement = Agreement(3)
    assert [agreement.is_due() for _ in range(7)] == [False, False, True, False, False, True, False]
    assert agreement.to_dict()["share"] is None
    for result in ("same", "same", "different", "skipped", "failed"):
        agreement.count(result)
    assert agreement.to_dict() == {
        "every": 3,
        "same": 2,
        "different": 1,
        "skipped": 1,
        "failed": 1,
        "share": pytest.approx(2 / 3),
    }


def test_texts():
    assert compare("red ", " red") == "same" and compare("red", "Red") == "different"
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    assert answer_text([{"message": {"content": None, "tool_calls": [call]}}]) == 'f{"a": 1}'
    pieces = [{"content": "re"}, {"content": "d"}, {}, {"tool_calls": [call]}]
    assert "".join(answer_text([{"delta": piece}]) for piece in pieces) == 'redf{"a": 1}'
    assert answer_text([]) == ""


# ---- batches ----


def make_tasks(prune, n, **settings):
    settings = Settings(prune, **{"max_tokens": 4, **settings})
    return [Task(str(i), (IMAGE,), (IMAGE,), QUESTIONS[i % len(QUESTIONS)], settings) for i in range(n)]


def test_which_tasks_are_verified():
    tasks = [*make_tasks(None, 2), *make_tasks(ONE_TOKEN, 5), Task("text", (), (), "hi", Settings(ONE_TOKEN))]
    assert [task.verify for task in mark_every(tasks, 2)] == [False, False, False, True, False, True, False, False]
    assert not any(task.verify for task in mark_every(tasks, None))
    assert [task.key for task in mark_every(tasks, 1)] == [task.key for task in tasks]  # results of other runs fit


@pytest.fixture(scope="module")
def vlm():
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_threads=1) as engine:
        yield engine


def results_of(vlm, tasks):
    class Open:  # run_tasks closes its engine, and this one is shared
        def __enter__(self):
            return vlm

        def __exit__(self, *exc):
            pass

    results = []
    run_tasks(tasks, Open, results.append)
    return results


def test_lines_of_a_batch(vlm):
    tasks = make_tasks(ONE_TOKEN, len(QUESTIONS))
    plain, verified = results_of(vlm, tasks), results_of(vlm, mark_every(tasks, 2))
    found = set()
    for i, (before, line) in enumerate(zip(plain, verified)):
        assert line["text"] == before["text"]
        assert ("verified" in line) == (i % 2 == 1)
        if "verified" in line:
            unpruned = vlm.generate(tasks[i].prompt, IMAGE, None, 4).text
            assert line["verified"]["text"] == unpruned and line["verified"]["first_token_ms"] >= 0
            assert line["verified"]["result"] == ("same" if unpruned.strip() == line["text"].strip() else "different")
            found.add(line["verified"]["result"])
    assert "different" in found


@pytest.mark.parametrize("temperature, seed", [(0.0, None), (1.0, None), (1.0, 7)])
def test_sampled_answers_have_one_seed(vlm, monkeypatch, temperature, seed):
    """Both answers of a request: its own seed, or one drawn for it."""
    seeds = []
    generate = vlm.generate

    def spy(*args, **options):
        seeds.append(options["seed"])
        return generate(*args, **options)

    monkeypatch.setattr(vlm, "generate", spy)
    results_of(vlm, mark_every(make_tasks(KEEP_ALL, 2, temperature=temperature, seed=seed), 1))
    assert len(seeds) == 4 and seeds[0] == seeds[1] and seeds[2] == seeds[3]
    if temperature and seed is None:
        assert None not in seeds and seeds[0] != seeds[2]
    else:
        assert seeds[0] == seeds[2] == seed


def test_an_unpruned_answer_that_fails(vlm, monkeypatch):
    generate = vlm.generate

    def without_room(prompt, images, prune, *args, **options):
        if prune is None:
            raise ConfigError("the prompt takes too much", "raise n_ctx")
        return generate(prompt, images, prune, *args, **options)

    monkeypatch.setattr(vlm, "generate", without_room)
    (line,) = results_of(vlm, mark_every(make_tasks(ONE_TOKEN, 1), 1))
    assert line["verified"]["result"] == "failed" and "takes too much" in line["verified"]["error"]
    assert "text" in line


def test_the_command(star_edge, tmp_path):
    lines = [{"image": IMAGE, "prompt": question} for question in QUESTIONS[:3]]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = star_edge("run", "--tasks", "tasks.jsonl", "-n", "4", "-t", "1", "--verify", "1")
    results = [json.loads(line)["verified"]["result"] for line in done.stdout.splitlines()]
    assert len(results) == 3
    same, different = results.count("same"), results.count("different")
    assert f"verified: {same} the same as unpruned ({100 * same / 3:.1f}%), {different} different" in done.stderr
    assert "--verify" in star_edge("run", "hi", "--verify", "2", status=2).stderr


# ---- the server ----


class Host:
    """What a verifier asks of the engine."""

    def __init__(self):
        self.waiting, self.turn, self.jobs = 0, anyio.Lock(), set()
        self.metrics = Metrics(lambda: 0)

    async def in_thread(self, function):
        return await anyio.to_thread.run_sync(function)


class Again:
    def __init__(self, answer):
        self.is_stopped, self._answer = False, answer
        self.asked = 0

    def answer_alone(self):
        self.asked += 1
        if isinstance(self._answer, Exception):
            raise self._answer
        return {"choices": [{"message": {"content": self._answer}}]}


def verified(again, *, waiting=0, meanwhile=lambda host: None):
    """The counts after one request was verified, whose pruned answer was "red"."""

    async def run():
        host = Host()
        verifier = Verifier(host, 1)
        assert verifier.takes()
        host.waiting = waiting
        again.scope = anyio.CancelScope()
        verifier.verify(again, "red")
        assert again in host.jobs  # the server's end waits for it
        meanwhile(host)
        while host.jobs:
            await asyncio.sleep(0.001)
        assert not verifier.is_busy
        return {name: n for name, n in verifier.agreement.to_dict().items() if n and name not in ("every", "share")}

    return asyncio.run(run())


def test_what_is_counted():
    assert verified(Again("red")) == {"same": 1}
    assert verified(Again("blue")) == {"different": 1}
    assert verified(Again(ValueError("no"))) == {"failed": 1}
    assert verified(Again(RequestCancelledError("somebody waits"))) == {"skipped": 1}


def test_nobody_waits_for_it():
    again = Again("red")
    assert verified(again, waiting=1) == {"skipped": 1} and not again.asked
    again = Again("red")
    assert verified(again, meanwhile=lambda host: setattr(host, "waiting", 1)) == {"skipped": 1} and not again.asked
    again = Again("red")
    assert verified(again, meanwhile=lambda host: again.scope.cancel()) == {"skipped": 1} and not again.asked


def test_one_request_is_kept_at_a_time():
    verifier = Verifier(Host(), 1)
    assert verifier.takes() and not verifier.takes()
    verifier.skip()
    assert verifier.agreement.to_dict()["skipped"] == 2 and verifier.takes()


def test_a_request_that_waits_ends_it():
    """The second answer of a job, asked before each decode."""
    from star_edge.server.jobs import Job

    engine = types.SimpleNamespace(waiting=0, jobs=set())
    body = types.SimpleNamespace(model_copy=lambda update: types.SimpleNamespace(**update))

    async def run():
        again = Job(engine, body, [], None, {}, 0.0, lambda: None, None).unpruned()
        assert again._config is None and again._body.stream is False
        assert not again._is_cancelled()
        engine.waiting = 1
        assert again._is_cancelled()
        engine.waiting = 0
        again.stop()
        assert again._is_cancelled()

    asyncio.run(run())


def test_the_server(vlm):
    two_tokens = PruneConfig(vision_keep=2)
    texts = {q: [vlm.generate(q, IMAGE, prune, 4).text.strip() for prune in (two_tokens, None)] for q in QUESTIONS}
    wrong = next(question for question, (pruned, unpruned) in texts.items() if pruned != unpruned)
    server = Server("--verify", "2")
    counts = lambda: server.request("GET", "/health")[2]["verified"]
    assert counts() == {"every": 2, "same": 0, "different": 0, "skipped": 0, "failed": 0, "share": None}

    def ask(question, n, prune, **options):
        """Several times; every second request is verified before the next one."""
        for i in range(n):
            before = counts()
            client = server.client().chat.completions
            body = {"model": "m", "messages": [message(question, DEMO)], "max_tokens": 4, **options}
            answer = client.create(**body, extra_body={"prune": prune, "min_p": 0.0, "top_k": 0})
            if options.get("stream"):
                for _ in answer:
                    pass
            if i % 2 and prune is not None:
                server.wait(lambda before=before: counts() != before)

    fields = {"seed": 1}  # keeps all
    ask(QUESTIONS[0], 2, fields, temperature=0)
    assert counts()["same"] == 1
    # one seed for both answers, which are drawn from the whole vocabulary
    ask(QUESTIONS[0], 4, {**fields}, temperature=50.0, top_p=1.0, stream=True)
    assert counts()["same"] == 3
    ask(QUESTIONS[0], 2, None)  # not pruned: not counted
    before = counts()["different"]
    ask(wrong, 2, {"vision_keep": 2}, temperature=0)
    assert counts()["different"] == before + 1
    seen = counts()
    for name in ("same", "different"):
        assert server.metric(f'star_edge_verified_total{{result="{name}"}}') == seen[name]
    status, stderr = server.stop()
    assert status == 0 and "verified: different" in stderr


def test_a_setting_that_verifies_nothing():
    with pytest.raises(ConfigError, match="--verify 0"):
        Policy(verify=0)
