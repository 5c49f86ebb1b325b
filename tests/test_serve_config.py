"""What a server is started with beyond limits: --config, configs by name, the request log, what /v1/models says."""

import json
import sys
from pathlib import Path

import click
import openai
import pytest
from helpers import pages
from helpers.serving import COLOR, DEMO, Server, message

from star_edge import errors, refvlm
from star_edge.cli import config_file
from star_edge.cli.serve import serve
from star_edge.io.configs import read_named
from star_edge.report import PruneReport
from star_edge.server.request_log import Record, RequestLog, as_text

PAGE = Path(__file__).parent.parent / "docs" / "server-conversations.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    (folder / "receipts.json").write_text('{"config": {"vision_keep": 0.5, "decoder_keep": 12}, "n": 3}')
    (folder / "all.json").write_text('{"config": null}')
    (folder / "star-edge.toml").write_text(
        'preset = "receipts"\nctx-size = 768\nmax_images = 2\nrequest-log = "requests.jsonl"\n'
        'request-log-format = "json"\nprompt-cache-bytes = 1000000\n'
        '[prune-config]\nreceipts = "receipts.json"\neverything = "all.json"\n'
    )
    return folder


@pytest.fixture(scope="module")
def server(folder):
    server = Server("--config", str(folder / "star-edge.toml"), "--max-images", "1")
    yield server
    assert server.stop()[0] == 0


def ask(client, *urls, **options):
    options = {"model": "any", "temperature": 0, "max_tokens": 4, **options}
    return client.chat.completions.create(messages=[message(COLOR, *(urls or [DEMO]))], **options)


def lines(folder):
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


# ---- configs by name, and what the models say ----


def test_tuned_configs_by_name(server):
    client = server.client()
    named = {"vision_keep": 0.5, "decoder_keep": 12}
    for options in ({}, {"extra_body": {"prune": "receipts"}}):  # it is the server's preset, too
        config = ask(client, **options).star_edge["config"]
        assert {name: config[name] for name in named} == named
    assert ask(client, extra_body={"prune": "everything"}).star_edge["config"] is None
    assert ask(client, extra_body={"prune": "fast"}).star_edge["config"]["vision_keep"] == 0.12
    for wrong in ("recipes", "receipts.json", "all.json"):
        with pytest.raises(openai.BadRequestError, match="[Uu]se one of receipts, everything, off"):
            ask(client, extra_body={"prune": wrong})


def test_models_say_what_each_supports(server):
    (model,) = server.request("GET", "/v1/models")[2]["data"]
    assert server.request("GET", f"/v1/models/{model['id']}")[2] == model
    says = model["star_edge"]
    assert set(says["stages"]) == {"redundancy", "encoder_stage", "vision_stage", "decoder_stage"}
    assert says["stages"]["vision_stage"] == says["stages"]["decoder_stage"] == "yes"
    assert says["stages"]["redundancy"].startswith("no: ") and says["stages"]["encoder_stage"].startswith("no: ")
    assert says["configs"] == {"receipts": {"vision_keep": 0.5, "decoder_keep": 12}, "everything": None}
    assert says["default"] == {"name": "receipts", "config": {"vision_keep": 0.5, "decoder_keep": 12}}
    assert says["n_ctx"] == 768 and says["images"]["max_images"] == 1 and says["images"]["remote"] is False
    assert says["prompt_cache_bytes"] == 1_000_000
    client = server.client()
    for name, config in says["presets"].items():  # each is what a request may send
        report = ask(client, max_tokens=1, extra_body={"prune": config}).star_edge
        assert report["config"] == ask(client, max_tokens=1, extra_body={"prune": name}).star_edge["config"]


def test_the_page_offers_them(server):
    """A server without a key says what it was started with; one with a key does not (test_serve.py)."""
    setup = server.request("GET", "/page/setup.json")[2]
    assert setup["presets"]["receipts"] == {"vision_keep": 0.5, "decoder_keep": 12}
    assert setup["default"] == "receipts" and "everything" not in setup["presets"] and "fast" in setup["presets"]


def test_the_file_gives_what_the_command_line_does_not(server):
    with pytest.raises(openai.BadRequestError, match="2 images: send at most 1"):
        ask(server.client(), DEMO, DEMO)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["receipts"], "is not NAME=FILE"),
        (["=a.json"], "is not a name"),
        (["a b=a.json"], "is not a name"),
        (["fast=a.json"], "the name of something else"),
        (["custom=a.json"], "the name of something else"),
        (["a=/nowhere/a.json"], "/nowhere/a.json cannot be read"),
    ],
)
def test_names_of_configs(pairs, words):
    with pytest.raises(errors.ConfigError, match=words):
        read_named(pairs)


def test_a_name_twice(folder):
    pair = f"a={folder / 'all.json'}"
    assert read_named([pair]) == {"a": None}
    with pytest.raises(errors.ConfigError, match="'a' is there twice"):
        read_named([pair, pair])


# ---- the file ----

PATHS = {"model": "file", "chat_template": "maybe", "prune_configs": "named", "request_log": "file"}


def read(path, text, ending=".toml"):
    file = path / f"config{ending}"
    file.write_text(text)
    context = click.Context(serve)
    return config_file.read_config(context, str(file), PATHS, frozenset({"as_json", "config"}))


def test_values_of_a_file(tmp_path):
    (tmp_path / "template.jinja").write_text("x")
    text = """
        model = "models/a.gguf"
        chat-template = "template.jinja"
        prune_config = ["a=tuned.json", "b=/tuned.json"]
        request-log = "-"
        body-seconds = 5
        no-mmproj = true
        cors-origin = "https://a.example"
        flash-attn = false
    """
    assert read(tmp_path, text) == {
        "model": str(tmp_path / "models/a.gguf"),
        "chat_template": str(tmp_path / "template.jinja"),
        "prune_configs": [f"a={tmp_path / 'tuned.json'}", "b=/tuned.json"],
        "request_log": "-",
        "body_seconds": 5,
        "no_mmproj": True,
        "cors_origins": ["https://a.example"],
        "flash_attn": False,
    }
    assert read(tmp_path, '{"chat-template": "vicuna", "port": 0}', ".json") == {"chat_template": "vicuna", "port": 0}


WRONG_FILES = [
    ("prot = 1", "prot is not an option: did you mean port?"),
    ("json = true", "json is not an option"),
    ("no-flash-attn = true", "no-flash-attn is not an option: write flash-attn = false"),
    ("port = '8000'", "port = '8000' is not a number"),
    ("port = true", "port = True is a bool"),
    ("port = 8000.5", "port = 8000.5 is not a whole number"),
    ("port = 70000", "port = 70000: 70000 is not in the range"),
    ("host = 5", "host = 5 is not text"),
    ("flash-attn = 1", "flash-attn = 1 is neither true nor false"),
    ("cache-type-k = 'q9'", "cache-type-k = 'q9': 'q9' is not one of"),
    ("cors-origin = [1]", r"cors-origin = \[1\] is not text"),
    ("model = ['a']", r"model = \['a'\] is a list"),
    ("max-images = 1\nmax_images = 2", "max_images is there twice"),
    ("port = ", "is not valid TOML"),
    ("when = 2026-11-26", "when is not an option"),
]


@pytest.mark.parametrize(("text", "words"), WRONG_FILES, ids=[text for text, _ in WRONG_FILES])
def test_an_error_names_the_key(tmp_path, text, words):
    with pytest.raises(errors.ConfigError, match=words):
        read(tmp_path, text)


@pytest.mark.parametrize(("text", "words"), [("[1]", "is a JSON list"), ("{", "is not valid JSON"), ("\0", "JSON")])
def test_wrong_json(tmp_path, text, words):
    with pytest.raises(errors.ConfigError, match=words):
        read(tmp_path, text, ".json")


@pytest.mark.parametrize("pair", ["receipts", "receipts=", "=a.json"])
def test_a_pair_that_is_none_stays_as_it_is(tmp_path, pair):
    """It is read_named that says what is wrong with it."""
    (found,) = read(tmp_path, f"prune-config = [{json.dumps(pair)}]")["prune_configs"]
    with pytest.raises(errors.ConfigError, match="is not NAME=FILE|is not a name"):
        read_named([found])


def test_no_file(tmp_path):
    with pytest.raises(errors.ConfigError, match="nothing.toml cannot be read"):
        serve.main(["--config", str(tmp_path / "nothing.toml")], standalone_mode=False)


def test_every_option_may_be_in_a_file():
    """By its long name. Those of the process alone are left out."""
    context = click.Context(serve)
    names = {max(p.opts, key=len).lstrip("-") for p in serve.params if isinstance(p, click.Option)}
    for name in names - {"config", "json"}:
        param = next(p for p in serve.params if f"--{name}" in p.opts)
        assert param.name and not name.startswith("no-flash") and context.lookup_default(param.name) is None


# ---- the request log ----


def test_a_line_for_each_request(server, folder):
    client = server.client()
    n = len(lines(folder))
    raw = client.chat.completions.with_raw_response.create(
        model="mine", messages=[message(COLOR, DEMO)], max_tokens=4, temperature=0
    )
    answer = raw.parse()
    list(ask(client, stream=True, extra_body={"prune": {"vision_keep": 0.25}}))
    with pytest.raises(openai.BadRequestError):
        ask(client, "data:image/png;base64,AAAA")
    server.request("POST", "/v1/chat/completions", "{")
    server.wait(lambda: len(lines(folder)) == n + 4)
    whole, stream, picture, no_json = lines(folder)[n:]
    report = answer.star_edge
    assert whole["id"] == raw.headers["x-request-id"] and whole["client"] == "127.0.0.1"
    assert (whole["model"], whole["status"], whole["prune"], whole["stream"]) == ("mine", 200, "receipts", False)
    assert (whole["image_tokens"], whole["after_vision"], whole["after_decoder"]) == (144, 72, 12)
    assert whole["average_tokens"] == pytest.approx(report["average_tokens"], abs=0.05)
    assert whole["cached_images"] == report["n_cached"] and whole["reused_tokens"] == report["reused_tokens"]
    assert whole["tokens"] == answer.usage.completion_tokens and whole["finish_reason"] == "stop"
    assert 0 < whole["first_token_ms"] <= whole["total_ms"]
    assert stream["prune"] == "custom" and stream["stream"] and stream["after_vision"] == 36 and stream["tokens"] >= 1
    assert picture["status"] == 400 and picture["error"] == "ImageError" and "tokens" not in picture
    assert no_json["status"] == 400 and no_json["error"] == "PromptError" and "model" not in no_json
    assert len({line["id"] for line in lines(folder)}) == len(lines(folder))
    text = (folder / "requests.jsonl").read_text()
    assert COLOR not in text and "base64" not in text


def test_a_client_that_leaves_has_a_line(server, folder):
    n = len(lines(folder))
    stream = ask(server.client(), stream=True, max_tokens=600, extra_body={"min_tokens": 600})
    next(iter(stream))
    stream.close()
    server.wait(lambda: len(lines(folder)) == n + 1)
    assert lines(folder)[-1]["error"] == "ClientLeft" and "finish_reason" not in lines(folder)[-1]


def test_prompts_are_logged_where_that_is_asked_for(tmp_path):
    log = tmp_path / "requests.log"
    server = Server("--request-log", str(log), "--request-log-prompts", "--request-log-format", "json")
    try:
        ask(server.client())
    finally:
        assert server.stop()[0] == 0
    (line,) = map(json.loads, log.read_text().splitlines())
    parts = line["messages"][0]["content"]
    assert parts == [
        {"type": "image_url", "image_url": {"url": "image-0"}},
        {"type": "text", "text": COLOR},
    ]


def test_text_lines_cannot_be_forged():
    record = Record("10.0.0.1", "/v1/chat/completions")
    record.asked('x" status=500\ntime=', "fast", False)
    text = as_text(record.line(200))
    assert "\n" not in text and text.count("\n") == 0 and ' model="x\\" status=500\\ntime=" ' in text
    assert " status=200 " in text and " prune=fast " in text and " stream=false " in text


def test_a_log_that_cannot_be_written(tmp_path, capsys):
    with pytest.raises(errors.ConfigError, match="^request_log="):
        RequestLog(str(tmp_path / "no" / "log"), "text")
    log = RequestLog("/dev/full", "text") if sys.platform == "linux" else None
    if log is not None:
        for _ in range(2):
            log.write({"id": "x"})
        assert capsys.readouterr().err.count("cannot be written") == 1


def test_times_of_a_record():
    report = PruneReport(None, [], 6, [], 9, 9, {"first_token": 250.0})
    record = Record(None, "/")
    record.read(report, 1.5)
    assert record.facts["queue_ms"] == 1500 and record.facts["first_token_ms"] == 1750


# ---- the page ----


def test_the_page_s_client(server, tmp_path, monkeypatch, capsys):
    """The block after the marker runs as it is, but for the port, against the reference model."""
    (code,) = pages.executed("docs/server-conversations.md", "conversations")
    assert "http://127.0.0.1:8000" in code
    (tmp_path / "receipt.png").symlink_to(refvlm.DEMO_IMAGE)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("http://127.0.0.1:8000", server.url), str(PAGE), "exec"), {})
    n, _, words = capsys.readouterr().out.strip().splitlines()[-1].partition(" ")
    assert int(n) > 50 and words.startswith("rows")


def test_the_page_s_file_of_options(tmp_path):
    text = PAGE.read_text().split("```toml\n", 1)[1].split("```", 1)[0]
    values = read(tmp_path, text)
    assert values["n_ctx"] == 8192 and values["cors_origins"] == ["https://example.org"]
    assert values["model"] == str(tmp_path / "models/text.gguf")
    assert values["prune_configs"][1] == f"charts={tmp_path / 'tuned/charts.json'}"
