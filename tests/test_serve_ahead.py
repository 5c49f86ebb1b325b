"""Pictures of the next request are encoded while the current answer is generated: same answers, and nothing is left."""

import threading

import numpy as np
import openai
import pytest
from helpers.models import random_image
from helpers.reusing import answers, engine, fresh, same
from helpers.serving import COLOR, DEMO, Server, data_url, message
from PIL import Image

from star_edge import PruneConfig
from star_edge.options import LoadOptions


@pytest.fixture(scope="module")
def server():
    server = Server("--encode-ahead")
    yield server
    status, stderr = server.stop()
    assert status == 0 and "Traceback" not in stderr


@pytest.fixture(scope="module")
def plain():
    server = Server("--no-encode-ahead")
    yield server
    assert server.stop()[0] == 0


def picture(tmp_path, number):
    path = tmp_path / f"{number}.png"
    pixels = np.random.default_rng(number).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return data_url(path)


def ask(client, url, **options):
    options = {"model": "any", "temperature": 0, "max_tokens": 8, **options}
    extra = {"star_edge": {"kept": True}, **options.pop("extra_body", {})}
    return client.chat.completions.create(messages=[message(COLOR, url)], extra_body=extra, **options)


class LongAnswer:
    """A stream that is under way inside the block."""

    def __init__(self, client):
        self._client = client

    def __enter__(self):
        self._stream = ask(self._client, DEMO, max_tokens=700, stream=True, extra_body={"min_tokens": 700})
        next(iter(self._stream))
        return self

    def __exit__(self, *_):
        self._stream.close()


def meanwhile(server, request):
    """What a request gives that waits while an answer is generated."""
    found = []

    def run():
        try:
            found.append(request())
        except openai.OpenAIError as error:
            found.append(error)

    with LongAnswer(server.client()):
        thread = threading.Thread(target=run)
        thread.start()
        server.wait(lambda: found or server.request("GET", "/health")[2]["waiting"] == 1)
        yield
    thread.join()
    yield found[0]


def waits(server, request):
    steps = meanwhile(server, request)
    next(steps)
    return next(steps)


def test_answers_are_the_same_and_the_report_is_honest(server, plain, tmp_path):
    for number in range(3):
        url = picture(tmp_path, number)
        got = waits(server, lambda url=url: ask(server.client(), url))
        wanted = ask(plain.client(), url)
        assert got.choices[0].message.content == wanted.choices[0].message.content
        assert got.star_edge["kept"] == wanted.star_edge["kept"]
        assert "ahead" in got.star_edge["milliseconds"] and "ahead" not in wanted.star_edge["milliseconds"]
        assert not got.star_edge["images"][0]["cached"]  # it was encoded for this request
        assert ask(server.client(), url).star_edge["images"][0]["cached"]


def test_none_is_encoded_ahead_unless_that_is_wanted(server, plain, tmp_path):
    url = picture(tmp_path, 10)
    assert "ahead" not in waits(plain, lambda: ask(plain.client(), url)).star_edge["milliseconds"]
    afresh = {"star_edge": {"afresh": True}}
    assert "ahead" not in waits(server, lambda: ask(server.client(), url, extra_body=afresh)).star_edge["milliseconds"]


def test_errors_of_pictures_come_as_ever(server):
    error = waits(server, lambda: ask(server.client(), "data:image/png;base64,AAAA"))
    assert isinstance(error, openai.BadRequestError) and error.code == "ImageError"
    assert ask(server.client(), DEMO).choices[0].message.content.strip() == "red"


def test_who_leaves_the_queue_leaves_nothing(server, tmp_path):
    with LongAnswer(server.client()):
        for number in range(20, 23):
            with pytest.raises(openai.APITimeoutError):
                ask(server.client(timeout=0.05), picture(tmp_path, number))
    quiet = {"receiving": 0, "waiting": 0, "answering": 0}
    server.wait(lambda: {name: server.request("GET", "/health")[2][name] for name in quiet} == quiet)
    assert ask(server.client(), DEMO).choices[0].message.content.strip() == "red"


@pytest.mark.parametrize("family", ["llama", "qwen2vl", "qwen35"])
def test_encoding_beside_an_answer_changes_neither(families, family):
    """The engine alone: one thread generates, another encodes."""
    models = families[family]
    asked = ("ab <__media__> what is this?", random_image(1), "balanced")
    with engine(models) as vlm:
        wanted = answers(vlm, asked, 40)
    configs = [None, PruneConfig(0.5, 0.25, 2), PruneConfig(encoder_keep=0.5), PruneConfig(redundancy="exact")]
    with engine(models) as vlm:
        for i, config in enumerate(configs):
            pictures = [random_image(10 + i), random_image(20 + i)]
            thread = threading.Thread(target=vlm._reader.encode_ahead, args=(pictures, config))
            thread.start()
            got = answers(vlm, asked, 40)
            thread.join()
            assert np.array_equal(got, wanted)
            request = ("ab <__media__> and <__media__> what?", pictures, config)
            for cached in (False, True):
                report = same(vlm.read_prompt(*request, chat=False), fresh(models, request))
                assert [image.cached for image in report.images] == [cached] * len(report.images)


def test_nothing_is_encoded_ahead_without_a_cache(families):
    with engine(families["llama"], image_cache_bytes=0) as vlm:
        vlm._reader.encode_ahead([random_image(1)], None)
        assert vlm.encoder.cache is None


def test_cores_for_both(monkeypatch):
    monkeypatch.setattr("star_edge.options._physical_cores", lambda: 8)
    assert [LoadOptions(n_threads=n).has_spare_cores for n in (None, 4, 5)] == [False, True, False]
