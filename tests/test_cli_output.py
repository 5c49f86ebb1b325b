"""What the command prints beside its tables: JSON of one line, help pages, silence where it is asked for, and the
status that it ends with.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from helpers.presets import kept

from star_edge import cli, refvlm
from star_edge.cli import COMMANDS, EXIT_STATUSES

IMAGE = str(refvlm.DEMO_IMAGE)
QUESTION = "what color is the triangle?"
LLAVA = Path(__file__).parent / "fixtures" / "llava"


def command(*args, **options):
    """Runs `python -m star_edge` in a process of its own."""
    options = {"capture_output": True, "text": True, "timeout": 600, **options}
    return subprocess.run([sys.executable, "-m", "star_edge", *args], **options)


@pytest.fixture
def star_edge(star_edge_here, monkeypatch):
    """As on a pipe, which has no width."""
    monkeypatch.delenv("COLUMNS")
    return star_edge_here


# ---- JSON ----


def test_json_is_one_line_and_has_arrays_only_if_they_are_asked_for(star_edge):
    ask = ("run", QUESTION, "--image", IMAGE, "-n", "2", "--json")
    out, err = star_edge(*ask)
    assert out.count("\n") == 1 and len(out) < 2500 and not err
    short = json.loads(out)
    assert short["report"]["pictures"][0]["n_decoder_kept"] == kept("balanced").decoder
    out, _ = star_edge(*ask, "--kept")
    whole = json.loads(out)
    assert out.count("\n") == 1
    assert len(whole["report"]["images"][0]["vision_kept"]) == kept("balanced").vision
    assert set(whole) == set(short) and set(whole["report"]) == set(short["report"])
    images = [data["report"]["images"][0] for data in (short, whole)]
    assert set(images[0]) < set(images[1])
    longest = max((value for value in walk(short) if isinstance(value, list)), key=len)
    assert len(longest) < 10


def walk(value):
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(inner)


DOCUMENTED = Path(__file__).parent.parent / "docs" / "command-line-reference.md"


def documented(section):
    """Names of fields in the table of a section of the page."""
    text = DOCUMENTED.read_text(encoding="utf-8")
    part = text.split(f"\n### {section}\n")[1].split("\n#")[0]
    rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    return {name.strip(" `") for row in rows for name in row.split(",")}


def test_documented_fields_of_run_inspect_doctor_and_demo(star_edge):
    out, _ = star_edge("run", QUESTION, "--image", IMAGE, "-n", "2", "--json")
    data = json.loads(out)
    assert documented("run") == set(data)
    assert documented("The report") == set(data["report"])
    out, _ = star_edge("inspect", QUESTION, "--image", IMAGE, "--json")
    assert documented("inspect") == set(json.loads(out))
    out, _ = star_edge("doctor", "--json")
    assert documented("doctor") == set(json.loads(out))
    out, _ = star_edge("demo", "--repeats", "1", "--json")
    assert documented("demo") == set(json.loads(out))


def test_documented_fields_of_eval_bench_and_batches(star_edge, tmp_path):
    lines = [{"image": IMAGE, "question": q["question"], "answer": q["answer"]} for q in refvlm.demo_questions()[:2]]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, err = star_edge("eval", "q.jsonl", "--preset", "fast", "--json")
    data = json.loads(out)
    assert out.count("\n") == 1 and not err
    assert documented("eval") == set(data) and documented("A config of eval") == set(data["configs"][0])
    out, _ = star_edge("bench", "-r", "1", "--preset", "fast", "--baseline", "none", "--no-memory", "--json")
    data = json.loads(out)
    assert out.count("\n") == 1
    assert documented("bench") == set(data) and documented("A side of bench") == set(data["sides"][0])
    out, _ = star_edge("run", "?", "--image", IMAGE, "--each", "-n", "2")
    (tmp_path / "broken.png").write_bytes(b"no image")
    failed, _ = star_edge("run", "?", "--image", "broken.png", "--each", "-n", "2", status=3)
    assert documented("A line of a batch") - {"images"} == set(json.loads(out)) | set(json.loads(failed))


# ---- silence ----


def test_llama_cpp_says_nothing_without_verbose():
    """ "n_ctx_seq (4096) > n_ctx_train (2048)" is a warning, and was printed as an error."""
    ask = ("run", "hi", "--raw", "-m", str(LLAVA / "text.gguf"), "-n", "1", "-c", "4096")
    assert "n_ctx" not in command(*ask, "-q").stderr
    assert command(*ask, "-q").stderr == ""
    assert "n_ctx_seq (4096) > n_ctx_train (2048)" in command(*ask, "--verbose").stderr


def test_doctor_tells_the_context_of_training_from_the_one_used(star_edge):
    model = ("-m", str(LLAVA / "text.gguf"), "--no-check")
    data = json.loads(star_edge("doctor", *model, "--json")[0])["model"]
    assert (data["context_trained"], data["context_used"]) == (2048, 4096)
    out, _ = star_edge("doctor", *model)
    assert "4096 tokens here (--ctx-size), 2048 in training" in " ".join(out.split())


def test_doctor_plans_for_a_smaller_picture(star_edge):
    """Where fewer pixels make fewer tokens, the plan counts those; elsewhere it stays."""
    folder = LLAVA.parent / "qwen2-vl"
    model = ("-m", str(folder / "text.gguf"), "--mmproj", str(folder / "mmproj.gguf"), "--no-check", "--json")
    plans = [
        json.loads(star_edge("doctor", *model, "--image-size", "448x448", *more)[0])["plan"]
        for more in ((), ("--image-max-tokens", "0.25"))
    ]
    assert plans[0]["image_tokens"] == plans[0]["full_tokens"] == plans[1]["full_tokens"] == 256
    assert plans[1]["image_tokens"] == 64 and plans[1]["presets"]["off"]["vision_kept"] == 64


@pytest.mark.parametrize(
    "args",
    [
        ["run", QUESTION, "--image", IMAGE, "-n", "2", "--overlay", "o.png"],
        ["run", QUESTION, "--image", IMAGE, "-n", "2", "--each"],
        ["inspect", QUESTION],
        ["demo", "--repeats", "1"],
        ["bench", "-r", "1", "--preset", "fast", "--baseline", "none", "--no-memory"],
    ],
    ids=lambda args: " ".join(args)[:5] + args[-1],
)
def test_quiet(star_edge, args):
    out, err = star_edge(*args, "--quiet")
    assert err == "" and bool(out) == (args[0] != "inspect")


# ---- help pages ----


@pytest.mark.parametrize("name", [*COMMANDS, None])
def test_help_pages(name):
    group = click.Context(cli.cli, info_name="star-edge")
    shown = cli.cli.get_command(group, name) if name else cli.cli
    context = click.Context(shown, info_name=name or "star-edge", parent=group if name else None, terminal_width=80)
    page = shown.get_help(context)
    assert max(map(len, page.splitlines())) <= 80
    if name is None:
        assert all(f"  {status} " in page and meaning[:20] in page for status, meaning in EXIT_STATUSES.items())
        return
    examples = page.split("Example")[1]
    assert f"  star-edge {name}" in examples or f"$(star-edge {name}" in examples
    without = [p.opts for p in shown.params if isinstance(p, click.Option) and not p.help and not p.is_flag]
    assert not [opts for opts in without if name not in ("serve", "run")], without


def test_documented_exit_statuses():
    text = DOCUMENTED.read_text(encoding="utf-8").split("| exit status |")[1].split("\n\n")[0]
    assert [int(line.split("|")[1]) for line in text.splitlines()[2:]] == list(EXIT_STATUSES)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_examples_name_options_that_exist(name):
    """Each option in an example is one of the command's."""
    shown = cli.cli.get_command(click.Context(cli.cli), name)
    known = {opt for param in shown.params for opt in (*param.opts, *param.secondary_opts)}
    used = {word for word in shown.epilog.split() if word.startswith("-") and len(word) > 1}
    assert used <= known


# ---- completion ----


def completed(*words):
    env = {**os.environ, "_STAR_EDGE_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words)}
    env["COMP_CWORD"] = str(len(words) - 1)
    done = subprocess.run(
        [sys.executable, "-c", "from star_edge.cli import main; main()"], env=env, capture_output=True, text=True
    )
    return [tuple(line.split(",", 1)) for line in done.stdout.splitlines()]


def test_completion():
    assert completed("star-edge", "d") == [("plain", "demo"), ("plain", "doctor")]
    assert ("plain", "--vision-keep") in completed("star-edge", "run", "--vis")
    assert completed("star-edge", "eval", "--preset", "ba") == [("plain", "balanced")]
    assert completed("star-edge", "run", "--image", "x") == [("file", "x")]
    assert completed("star-edge", "run", "-m", "x") == [("file", "x")]
    assert completed("star-edge", "run", "-ctk", "q8") == [("plain", "q8_0")]


def test_completion_knows_config_files(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "balance-mine.json").write_text("{}")
    found = cli.cli.get_command(click.Context(cli.cli), "run")
    [preset] = [param for param in found.params if param.name == "preset"]
    assert [item.value for item in preset.shell_complete(click.Context(found), "bala")] == [
        "balanced",
        "balance-mine.json",
    ]


@pytest.mark.parametrize(("shell", "words"), [("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --no")])
def test_completion_scripts(star_edge, shell, words):
    out, _ = star_edge("completion", shell)
    assert words in out and "_STAR_EDGE_COMPLETE" in out and "star-edge" in out


# ---- tasks on stdin ----


def test_tasks_on_stdin(tmp_path):
    """Paths are relative to the current folder, and messages say where the line is."""
    os.link(IMAGE, tmp_path / "a.png")
    tasks = [{"id": 1, "image": "a.png", "prompt": QUESTION}, {"id": "zwei", "image": "no.png", "prompt": "é?"}]
    text = "".join(json.dumps(task, ensure_ascii=False) + "\n" for task in tasks)
    done = command("run", "--tasks", "-", "-n", "2", cwd=tmp_path, input=text, encoding="utf-8")
    assert done.returncode == 3
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["text"].strip() == "red" and second["prompt"] == "é?" and "no.png" in second["error"]
    assert "1 answered, 1 failed" in done.stderr and "failed (1): " in done.stderr and "no.png" in done.stderr
    done = command("run", "--tasks", "-", cwd=tmp_path, input='{"promt": "x"}\n')
    assert done.returncode == 2 and "standard input, line 1" in done.stderr and "did you mean prompt?" in done.stderr
    done = command("run", "-", "--tasks", "-", cwd=tmp_path, input=text, encoding="utf-8")
    assert done.returncode == 2 and "both read stdin" in done.stderr


def test_questions_on_stdin(tmp_path):
    os.link(IMAGE, tmp_path / "a.png")
    question = json.dumps({"image": "a.png", "question": QUESTION, "answer": "red"}) + "\n"
    done = command("eval", "-", "--preset", "fast", "--json", cwd=tmp_path, input=question)
    assert [row["accuracy"] for row in json.loads(done.stdout)["configs"]] == [1, 1]
    done = command("eval", "-", cwd=tmp_path, input="{}\n")
    assert done.returncode == 2 and "standard input, line 1" in done.stderr


def test_errors_of_a_batch_are_in_the_words_of_who_wrote_them(star_edge, tmp_path):
    """--each: the command line's. A task's own field keeps its name."""
    out, err = star_edge("run", "?", "--image", IMAGE, "--each", "--vision-keep", "5000", status=3)
    assert "--vision-keep 5000" in json.loads(out)["error"] and "--vision-keep 5000" in err
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": IMAGE, "prompt": "?", "vision_keep": 5000}) + "\n")
    out, err = star_edge("run", "--tasks", "t.jsonl", status=3)
    assert "vision_keep=5000" in json.loads(out)["error"]
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": IMAGE, "prompt": "?", "preset": "off"}) + "\n")
    out, _ = star_edge("run", "--tasks", "t.jsonl", "-c", "64", status=3)
    assert "raise --ctx-size" in json.loads(out)["error"]


# ---- how it ends ----


def test_python_m_is_the_command():
    done = command("run", "--nope")
    assert done.returncode == 2 and "(see python -m star_edge run --help)" in done.stderr
    assert command("--help").stdout.startswith("Usage: python -m star_edge [OPTIONS] COMMAND")
    assert command("eval", "--help").stdout.startswith("Usage: python -m star_edge eval ")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's $?")
def test_ctrl_c_is_130_in_a_shell(tmp_path):
    """The process ends by the signal, so that a shell's loop ends too. $? is 130; lines that were written are whole."""
    tasks = "".join(json.dumps({"id": i, "image": IMAGE, "prompt": QUESTION}) + "\n" for i in range(500))
    (tmp_path / "t.jsonl").write_text(tasks)
    script = f'"{sys.executable}" -m star_edge run --tasks t.jsonl --out r.jsonl & echo $!; wait $!; echo "status $?"'
    process = subprocess.Popen(
        ["bash", "-c", "set -m; " + script],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    pid = int(process.stdout.readline())
    results = tmp_path / "r.jsonl"
    deadline = time.monotonic() + 300
    while not (results.exists() and results.read_text().count("\n") > 1) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out.endswith("status 130\n") and "Traceback" not in err
    assert all(json.loads(line) for line in results.read_text().splitlines())


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of a shell")
@pytest.mark.parametrize(
    "args",
    [
        ["demo", "--repeats", "1"],
        ["--help"],
        ["run", QUESTION, "--image", IMAGE, "--image", IMAGE, "--each", "-n", "1"],
        ["doctor", "--no-check"],
    ],
    ids=lambda args: args[0],
)
def test_a_closed_pipe_is_no_traceback(tmp_path, args):
    """The reader goes before anything is written."""
    with subprocess.Popen(
        [sys.executable, "-m", "star_edge", *args], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        err = process.stderr.read().decode()
        assert process.wait(300) == 1
    assert "Traceback" not in err and "BrokenPipe" not in err and "Exception" not in err
