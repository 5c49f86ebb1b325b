"""Mistyped names get a suggestion everywhere, and messages are in the words of the command that was typed."""

from __future__ import annotations

import json
from dataclasses import replace

import click
import pytest

from star_edge import StarChatHandler, StarVLM, refvlm
from star_edge.batch import Settings, read_tasks
from star_edge.chat import find_template
from star_edge.cli import COMMANDS, cli
from star_edge.cli.words import cli_words, in_cli_words
from star_edge.errors import ConfigError, InputFileError, StarEdgeError
from star_edge.evaluation.configs import file_configs, parse_values
from star_edge.io.configs import load_config, resolve_prune
from star_edge.io.image_bytes import PASS_ONE_OF
from star_edge.io.questions import read_questions
from star_edge.options import EncoderOptions, LoadOptions
from star_edge.pruning.config import PruneConfig
from star_edge.pruning.presets import override
from star_edge.server.messages import suggestion
from star_edge.suggestions import did_you_mean, nearest, use_one_of

IMAGE = str(refvlm.DEMO_IMAGE)


def command(name):
    return cli.get_command(click.Context(cli), name)


@pytest.fixture
def star_edge(star_edge_here):
    """Runs the command in this process, and returns its one line on stderr."""

    def run(*args, **options):
        out, err = star_edge_here(*args, status=2, **options)
        assert not out and len(err.splitlines()) == 1 and err.startswith("error: "), err
        return err

    return run


# ---- suggestions ----


def test_nearest():
    assert nearest("balnced", ["off", "balanced", "fast"]) == "balanced"
    assert nearest("BALANCED", ["off", "balanced"]) == "balanced"
    assert (
        nearest("zzz", ["off", "balanced"]) is None and nearest("x" * 10**6, ["xx"]) is None and nearest(7, []) is None
    )
    assert use_one_of("balnced", ["off", "balanced"], ", or a file") == (
        "did you mean balanced? Use one of off, balanced, or a file"
    )
    assert use_one_of("zzz", ["off", "fast"]) == "use one of off, fast" and use_one_of(None, ["off"]) == "use off"
    assert did_you_mean("fats", ["fast"], "leave it out") == "did you mean fast?"
    assert did_you_mean("zzz", ["fast"], "leave it out") == "leave it out"


@pytest.mark.parametrize(
    ("raises", "meant"),
    [
        (lambda: resolve_prune("balnced"), "balanced"),
        (lambda: PruneConfig(vision_scorer="atention"), "attention"),
        (lambda: PruneConfig(decoder_scorer="txt"), "text"),
        (lambda: PruneConfig(representatives="clusters"), "cluster"),
        (lambda: PruneConfig(budget="promt"), "prompt"),
        (lambda: PruneConfig(positions="orginal"), "original"),
        (lambda: LoadOptions(type_k="q8"), "q8_0"),
        (lambda: EncoderOptions(encoder="repared"), "repaired"),
        (lambda: find_template("vicunna"), "vicuna"),
        (lambda: parse_values("vision_sahre", "1"), "vision_share"),
        (lambda: parse_values("budget", "imge"), "image"),
        (lambda: PruneConfig(vision_kep=0.5), "vision_keep"),
        (lambda: replace(PruneConfig(), decoder_leyer=2), "decoder_layer"),
        (lambda: override(None, buget="crop"), "budget"),
        (lambda: StarChatHandler(clip_model_path="x", prun="fast"), "prune"),
        (lambda: read_tasks("x", promt="?"), "prompt"),
        (lambda: StarVLM(refvlm.TEXT_MODEL, n_cxt=512), "n_ctx"),
        (lambda: StarVLM(refvlm.TEXT_MODEL, rope_freq_bse=1.0), "rope_freq_base"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_python_suggests(raises, meant):
    with pytest.raises(StarEdgeError, match=rf"did you mean {meant}\?"):
        raises()


def test_files_suggest(tmp_path):
    """Config files, lists of configs, tasks and questions. The message begins with the file."""

    def fails(name, text, read, *words):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(InputFileError) as raised:
            read(path)
        assert str(raised.value).startswith(str(path)) and all(word in str(raised.value) for word in words), (
            raised.value
        )

    tasks = lambda path: read_tasks(path, None, Settings(None))
    config = lambda path: load_config(str(path))
    fails("a.json", '{"config": {"vision_kep": 0.5}}', config, "did you mean vision_keep?")
    fails("b.json", '{"config": {"budget": "imge"}}', config, "budget='imge' is unknown", "did you mean image?")
    fails("c.json", '{"config": {"vision_keep": 2.0}}', config, "vision_keep=2.0")
    fails("d.json", '[{"name": "x", "methd": "y"}]', file_configs, "did you mean method?")
    fails("e.json", '[{"name": "x", "positions": "orginal"}]', file_configs, "did you mean original?")
    fails("t.jsonl", '{"image": "a", "promt": "?"}', tasks, "line 1", "did you mean prompt?")
    fails("u.jsonl", '{"image": "a", "prompt": "?", "preset": "fats"}', tasks, "line 1", "did you mean fast?")
    fails("v.jsonl", '{"image": "a", "prompt": "?", "max_tokens": "5"}', tasks, "a string", "use a whole number")
    fails("w.jsonl", '{"image": "a", "prompt": "?", "raw": null}', tasks, "is null", "use true or false")
    fails("q.jsonl", '{"image": "a", "qestion": "?"}', read_questions, "did you mean question by qestion?")
    fails("r.jsonl", '{"imag": "a", "question": "?"}', read_questions, "did you mean image by imag?")
    fails("s.jsonl", '{"image": "a", "answer": "?"}', read_questions, 'add "question"')


def test_the_server_suggests():
    assert suggestion("temprature", ["temperature", "top_p"]) == "did you mean temperature?"
    assert suggestion("zzz", ["temperature"]) == "leave it out"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["rnu"], ["'rnu'", "Did you mean run?", "(see star-edge --help)"]),
        (["run", "hi", "--imge", "x"], ["--imge", "--image", "(see star-edge run --help)"]),
        (["run", "hi", "-ctk", "q8"], ["Did you mean q8_0?", "(see star-edge run --help)"]),
        (["run", "hi", "--preset", "balnced"], ["did you mean balanced?"]),
        (["run", "hi", "--budget", "promt"], ["Did you mean prompt?", "(see star-edge run --help)"]),
        (["run", "hi", "--encoder", "stok"], ["Did you mean stock?"]),
        (["run", "hi", "--chat-template", "vicunna"], ["did you mean vicuna?"]),
        (["eval", "q.jsonl", "--metric", "exct"], ["Did you mean exact?", "(see star-edge eval --help)"]),
        (["eval", "q.jsonl", "--preset", "fats"], ["did you mean fast?"]),
        (["eval", "q.jsonl", "--set", "vision_sahre=1"], ["did you mean vision_share?"]),
        (["bench", "--shape", "llava-1b"], ["Did you mean llava-1.1b?", "(see star-edge bench --help)"]),
        (["bench", "--baseline", "shiped"], ["Did you mean shipped?"]),
        (["serve", "--preset", "balancd"], ["did you mean balanced?"]),
        (["completion", "bsh"], ["Did you mean bash?", "(see star-edge completion --help)"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_the_command_suggests(star_edge, tmp_path, args, words):
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": IMAGE, "question": "?"}) + "\n")
    err = star_edge(*args)
    assert all(word in err for word in words), err


def test_the_help_page_is_that_of_the_command_and_of_the_program(star_edge):
    assert "(see star-edge doctor --help)" in star_edge("doctor", "--image-size", "1x")
    assert "--image-size" in star_edge("doctor", "--image-size", "1x")
    assert "(see python -m star_edge bench --help)" in star_edge(
        "bench", "--image-size", "x", program="python -m star_edge"
    )
    assert "(see star-edge --help)" in star_edge("--nope")


# ---- words ----


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run", "n_ctx=1 has no room", "--ctx-size 1 has no room"),
        ("run", "raise n_ctx, lower vision_keep", "raise --ctx-size, lower --vision-keep"),
        ("run", "raise n_ctx (it is 256)", "raise --ctx-size (it is 256)"),
        (
            "run",
            "lower n_ctx, or quantize (type_k, type_v)",
            "lower --ctx-size, or quantize (--cache-type-k, --cache-type-v)",
        ),
        ("run", "use n_ubatch=300 or more", "use --ubatch-size 300 or more"),
        ("run", "use flash_attn=True or", "use --flash-attn or"),
        ("run", "flash_attn=False is slow", "--no-flash-attn is slow"),
        ("run", "write it, or use chat=False", "write it, or use --raw"),
        ("inspect", "write it, or use chat=False", "write it, or use --raw"),
        ("eval", "write it, or use chat=False", "write it, or use chat=False"),  # it has no such option
        ("run", "use reuse=False", "use --no-cache"),
        ("run", "prune='x' is a str", "--preset 'x' is a str"),
        ("run", "use one of off, fast, or a PruneConfig", "use one of off, fast"),
        ("run", "1.0 keeps all; an int is a count of tokens", "1.0 keeps all; a whole number is a count of tokens"),
        ("run", "use 1 to 5, or None to have it chosen", "use 1 to 5, or leave it out to have it chosen"),
        ("run", "shrink it, or raise ImageLimits(max_bytes=...)", "shrink it"),
        ("run", PASS_ONE_OF, "give a path, or a data: or http(s) URL"),
        ("run", "--vision-keep 2 is over", "--vision-keep 2 is over"),
        ("run", "/data/n_ctx/a.png and b/vision_keep.png", "/data/n_ctx/a.png and b/vision_keep.png"),
        ("run", "http://x.org/?max_tokens=5 and a?seed=1&seed=2", "http://x.org/?max_tokens=5 and a?seed=1&seed=2"),
        ("run", "C:\\n_ctx\\a and ~/n_ctx and my_n_ctx", "C:\\n_ctx\\a and ~/n_ctx and my_n_ctx"),
        ("eval", "vision_share=7.0 is not in 0..1", "--set vision_share=7.0 is not in 0..1"),
        ("eval", "--set vision_share=7.0 is not", "--set vision_share=7.0 is not"),
        ("eval", "vision_keep=0.1 leaves", "--vision-keep 0.1 leaves"),
        ("run", "vision_share=7.0 is not in 0..1", "vision_share=7.0 is not in 0..1"),
        ("doctor", "image_max_tokens=0 keeps nothing", "--image-max-tokens 0 keeps nothing"),
    ],
)
def test_every_kind_of_word(name, text, words):
    assert cli_words(text, command(name)) == words
    assert cli_words(words, command(name)) == words  # saying it twice changes nothing


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "completion"])
def test_every_option(name):
    """Of each command: name=value, and the name alone where it is no English word."""
    for param in command(name).params:
        flag = max(param.opts, key=len)
        if not isinstance(param, click.Option) or param.is_flag:
            continue
        assert cli_words(f"{param.name}=3 is wrong", command(name)) == f"{flag} 3 is wrong"
        if "_" in param.name:
            assert cli_words(f"lower {param.name}, or", command(name)) == f"lower {flag}, or"


def test_names_of_a_file_stay():
    assert cli_words("max_tokens=0, n_ctx=1", command("run"), keep=("max_tokens",)) == "max_tokens=0, --ctx-size 1"
    assert cli_words("n_ctx=1") == "n_ctx=1"  # no command runs
    with pytest.raises(InputFileError, match="vision_keep=2.0"), in_cli_words(lambda: command("run")):
        raise InputFileError("a.json: vision_keep=2.0 is not in (0, 1]")
    with pytest.raises(ConfigError, match="--vision-keep 2.0"), in_cli_words(lambda: command("run")):
        raise ConfigError("vision_keep=2.0 is not in (0, 1]")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "hi", "--preset", "mine.json"], ["mine.json: vision_keep=2.0"]),
        (["eval", "q.jsonl", "--preset", "mine.json"], ["mine.json: vision_keep=2.0"]),
        (["eval", "q.jsonl", "--configs", "list.json"], ["list.json: 'a': vision_keep=2.0"]),
        (["eval", "q.jsonl", "--vision-keep", "2.0"], ["dropped vision 2.0: --vision-keep 2.0"]),
        (["bench", "--set", "seen_below=7"], ["--set seen_below='7'"]),
        (["doctor", "--image-max-tokens", "0"], ["--image-max-tokens 0 keeps nothing"]),
        (["tune", "q.jsonl", "-c", "1"], ["--ctx-size 1"]),
        (["serve", "-c", "1"], ["--ctx-size 1"]),
        (["inspect", "hi", "--image", IMAGE, "-c", "64", "--preset", "off"], ["raise --ctx-size"]),
    ],
    ids=lambda value: " ".join(value)[:50].replace("/", "_") if isinstance(value, list) else "",
)
def test_commands_say_what_was_typed(star_edge, tmp_path, args, words):
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": IMAGE, "question": "?"}) + "\n")
    (tmp_path / "mine.json").write_text('{"config": {"vision_keep": 2.0}}')
    (tmp_path / "list.json").write_text('[{"name": "a", "vision_keep": 2.0}]')
    err = star_edge(*args)
    assert all(word in err for word in words), err
