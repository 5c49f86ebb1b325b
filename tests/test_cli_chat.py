"""star-edge chat and the options of an answer: through a pipe, at a terminal, with Ctrl-C; and what shows progress."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time

import click
import pytest
from click.testing import CliRunner

from star_edge import PruneConfig, StarVLM, refvlm
from star_edge import request as requests
from star_edge.cli import chat as chat_module
from star_edge.cli import cli
from star_edge.cli.chat import _completions
from star_edge.cli.sampling import _DEFAULTS
from star_edge.cli.waiting import Waiting
from star_edge.progress import Progress

IMAGE = str(refvlm.DEMO_IMAGE)
COLOR, PLATE = "what color is the triangle?", "what number is shown?"
GUARD = 120  # seconds after which a test that hangs has failed


@pytest.fixture(scope="module")
def vlm():
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=1024) as vlm:
        yield vlm


def talk(vlm, *turns, prune="balanced", **options):
    """Answers to turns, as `StarVLM.chat` gives them. A turn is a question, or (pictures, question)."""
    messages, answers = [], []
    for turn in turns:
        content = turn
        if isinstance(turn, tuple):
            content = [{"type": "image", "image": p} for p in turn[0]] + [{"type": "text", "text": turn[1]}]
        messages.append({"role": "user", "content": content})
        answers.append(vlm.chat(messages, prune=prune, **options))
        messages.append(answers[-1].message)
    return [answer.text.strip() for answer in answers]


# ---- through a pipe ----


def test_turns_pictures_and_commands_through_a_pipe(star_edge, vlm):
    lines = [
        f"/image {IMAGE}",
        COLOR,
        "",
        PLATE,
        "/preset fast",
        "/reset",
        f"/image '{IMAGE}'",
        PLATE,
        "/report",
        "/exit",
        "x",
    ]
    done = star_edge("chat", stdin="\n".join(lines))
    wanted = talk(vlm, ([IMAGE], COLOR), PLATE) + talk(vlm, ([IMAGE], PLATE), prune="fast")
    assert done.stdout.splitlines() == wanted
    told = done.stderr.splitlines()
    assert told[0].startswith("[picture 1 of the next question: ")
    assert "the picture not encoded again" in done.stderr and "[a new conversation]" in told
    assert sum(line.startswith("[read ") for line in told) == 3  # nothing after /exit
    assert any(re.match("first token .*144 -> [0-9]+ -> 9 from layer 4", line) for line in told)


def test_json_and_quiet(star_edge, vlm):
    done = star_edge(
        "chat",
        "--json",
        "--quiet",
        "--image",
        IMAGE,
        "--system",
        "Be brief.",
        stdin=f"{COLOR}\n/nope\n{PLATE}",
        status=3,
    )
    first, wrong, second = map(json.loads, done.stdout.splitlines())
    system = {"role": "system", "content": "Be brief."}
    question = {"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": COLOR}]}
    answer = vlm.chat([system, question])
    assert first["text"] == answer.text and first["report"]["n_text_tokens"] == answer.report.n_text_tokens
    assert second["report"]["n_cached"] == 1 and wrong["error"].startswith("there is no command '/nope'")
    assert done.stderr == ""


def test_errors_leave_the_conversation_usable(star_edge, vlm, tmp_path):
    (tmp_path / "empty.json").write_text("{}")
    lines = [
        "/image nowhere.png",
        "/imag x",
        "/preset fats",
        f"/preset {tmp_path / 'empty.json'}",
        f"/image {IMAGE}",
        "y " * 3000,  # too long for the context: the picture waits for the next question
        COLOR,
        PLATE,
    ]
    done = star_edge("chat", stdin="\n".join(lines), status=3)
    assert done.stdout.splitlines() == talk(vlm, ([IMAGE], COLOR), PLATE)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 5
    assert "nowhere.png does not exist" in errors[0] and "did you mean /image?" in errors[1]
    assert "fats" in errors[2] and "--ctx-size" in errors[4]
    assert '{"config": {"vision_keep": 0.5}}' in errors[3]  # as a file has it


def test_a_question_of_several_lines(star_edge, vlm):
    done = star_edge("chat", "--quiet", "-n", "6", stdin='"""\nis there\na red star?\n"""\n"""is it?"""\n"""\nthe end')
    assert done.stdout.splitlines() == talk(vlm, "is there\na red star?", "is it?", "the end", max_tokens=6)


def test_options_of_the_answer(monkeypatch, vlm, tmp_path, capsys):
    """In this process, on an engine that stays open: what `run` asks is what the same options of Python give."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("star_edge.cli.run.load_engine", lambda **model: vlm)
    monkeypatch.setattr(StarVLM, "__exit__", lambda self, *exc: None)
    (tmp_path / "g.gbnf").write_text('root ::= "yes" | "no"\n')
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    (tmp_path / "s.json").write_text(json.dumps(schema))

    def run(*args):
        assert cli.main(["run", PLATE, "--image", IMAGE, "--quiet", *args], standalone_mode=False) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out.strip()

    assert run("--grammar", "g.gbnf") in ("yes", "no")
    assert isinstance(json.loads(run("--json-schema", "s.json"))["n"], int)
    options = {
        "temperature": 1.5,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.01,
        "repeat_penalty": 1.2,
        "seed": 7,
        "max_tokens": 20,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert run(*flags) == vlm.generate(PLATE, IMAGE, **options).text.strip()
    whole = vlm.generate(PLATE, IMAGE).text
    assert len(whole) > 2 and run("--stop", whole[2:]) == whole[:2].strip()
    system = {"role": "system", "content": "Be brief."}
    question = {"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": PLATE}]}
    report = json.loads(run("--system", "Be brief.", "--json"))["report"]
    assert report["n_text_tokens"] == vlm.chat([system, question]).report.n_text_tokens


def test_a_schema_holds_in_a_conversation(monkeypatch, vlm, tmp_path, capsys):
    (tmp_path / "s.json").write_text('{"enum": ["a", "b"]}')
    assert converse(monkeypatch, vlm, "x\ny\n", "--json-schema", str(tmp_path / "s.json"), "-q") == 0
    assert {json.loads(line) for line in capsys.readouterr().out.splitlines()} <= {"a", "b"}


def test_defaults_are_those_of_llama_cpp_python():
    """Of `run` and `chat`, but for the temperature, which is that of `StarVLM.generate`."""
    for name in ("run", "chat"):
        command = cli.get_command(click.Context(cli), name)
        given = {param.name: param.default for param in command.params}
        for option in ("top_p", "top_k", "min_p", "repeat_penalty"):
            assert given[option] == _DEFAULTS[option]
        assert given["temperature"] == 0.0


def test_an_image_from_stdin(tmp_path, star_edge):
    picture = refvlm.DEMO_IMAGE.read_bytes()

    def run(*args, data=picture):
        code = "from star_edge.cli import main; main()"
        return subprocess.run([sys.executable, "-c", code, "run", *args], input=data, capture_output=True, cwd=tmp_path)

    done = run(COLOR, "--image", "-", "--quiet", "--overlay", "o.png")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, b"red", b"")
    assert (tmp_path / "o.png").stat().st_size > 1000
    done = run(COLOR, "--image", "-", data=b"xx")
    assert done.returncode == 2 and b"is not an image" in done.stderr and done.stderr.count(b"\n") == 1


# ---- wrong use ----


@pytest.fixture
def no_model(monkeypatch):
    """Runs a command that must not come to load a model: returns its error."""

    def fail(*args, **options):
        raise AssertionError("a model was loaded")

    def run(*args):
        for name in ("run", "chat"):
            monkeypatch.setattr(f"star_edge.cli.{name}.load_engine", fail)
        result = CliRunner().invoke(cli, args, input="", standalone_mode=False)
        return " ".join(str(getattr(result.exception, "message", result.exception)).split())

    return run


@pytest.mark.parametrize("command", [("run", "x"), ("chat",)], ids=lambda c: c[0])
def test_values_are_checked_before_a_model_is_loaded(no_model, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.gbnf").write_text("root ::= (")
    (tmp_path / "other.gbnf").write_text('x ::= "a"')
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "false.json").write_text("false")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for flags, words in (
        (["--top-p", "2"], "2.0 is not in the range 0<=x<=1"),
        (["--temperature", "-1"], "is not in the range"),
        (["--temp", "nan"], "not a finite number"),
        (["--top-k", "x"], "'x' is not a valid integer"),
        (["--min-p", "-0.1"], "is not in the range"),
        (["--repeat-penalty", "0"], "is not in the range"),
        (["--seed", "-1"], "is not in the range"),
        (["--stop", ""], "an empty text"),
        (["-n", "0"], "is not in the range"),
        (["--grammar", "none.gbnf"], "--grammar none.gbnf cannot be read (No such file"),
        (["--grammar", "bad.gbnf"], "--grammar bad.gbnf: "),
        (["--grammar", "other.gbnf"], "--grammar other.gbnf: the grammar has no rule 'root'"),
        (["--grammar", "binary"], "--grammar binary cannot be read"),
        (["--json-schema", "none.json"], "--json-schema none.json cannot be read (No such file"),
        (["--json-schema", "bad.json"], "--json-schema bad.json cannot be read"),
        (["--json-schema", "false.json"], "--json-schema false.json: the JSON schema is false"),
        (["--grammar", "bad.gbnf", "--json-schema", "bad.json"], "give one of them"),
        (["--preset", "fats"], "fats"),
    ):
        assert words in no_model(*command, *flags), flags


def test_what_run_and_chat_refuse(no_model, star_edge):
    for args, words in (
        (("run", "--image", "-"), "and so does the prompt"),
        (("run", "-", "--image", "-"), "and so does the prompt"),
        (("run", COLOR, "--image", "-", "--image", "-"), "--image - was given twice"),
        (("run", COLOR, "--image", "-", "--each"), "--image - is for one request"),
    ):
        assert words in no_model(*args)
    assert "--system needs the chat template" in no_model("run", "x", "--raw", "--system", "y")
    assert "--top-p is for one request" in no_model("run", "x", "--each", "--image", IMAGE, "--top-p", "0.5")
    assert "--stop is for one request" in no_model("run", "x", "--each", "--image", IMAGE, "--stop", "a")
    assert "nowhere.png does not exist" in no_model("chat", "--image", "nowhere.png")
    done = star_edge("chat", "-m", "nowhere.gguf", status=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---- at a terminal ----


class Terminal(io.StringIO):
    """Typed lines, on what says that it is a terminal."""

    def isatty(self):
        return True


def converse(monkeypatch, vlm, typed, *flags):
    """Runs `chat` in this process on an engine that stays open, as at a terminal. Returns its status."""

    monkeypatch.setattr(chat_module, "load_engine", lambda **model: vlm)
    monkeypatch.setattr(StarVLM, "__exit__", lambda self, *exc: None)
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    return cli.main(["chat", *flags], prog_name="star-edge", standalone_mode=False)


def test_ctrl_c_ends_an_answer_and_not_the_program(monkeypatch, vlm, capsys):
    """The engine stops before its next token; what came stays in the conversation."""
    calls, seen, stops = [], [], []
    ask = StarVLM.chat

    def gate(tokens, scores):
        calls.append(0)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
            deadline = time.monotonic() + GUARD
            while not stops[0]() and time.monotonic() < deadline:
                time.sleep(0.01)
        return scores

    def chat(self, messages, *args, **options):
        seen.append(messages)
        stops.append(requests.cancellation())
        more = {} if len(seen) > 1 else {"logits_processor": [gate], "logit_bias": {vlm.llama.token_eos(): -1e5}}
        return ask(self, messages, *args, **options, **more)

    monkeypatch.setattr(StarVLM, "chat", chat)
    before = signal.getsignal(signal.SIGINT)
    assert converse(monkeypatch, vlm, f"is it?\n{COLOR}\n", "--image", IMAGE) == 0
    assert signal.getsignal(signal.SIGINT) is before
    out, err = capsys.readouterr()
    assert len(calls) == 5 and "[stopped]" in err and err.count("[read ") == 2
    assert [m["role"] for m in seen[1]] == ["user", "assistant", "user"]
    assert seen[1][1]["content"].strip() and out.startswith(seen[1][1]["content"].lstrip())


def test_ctrl_c_before_the_first_token_takes_the_question_back(monkeypatch, vlm, capsys):
    seen = []
    ask = StarVLM.chat

    def chat(self, messages, *args, **options):
        seen.append(messages)
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            stopped = requests.cancellation()
            deadline = time.monotonic() + GUARD
            while not stopped() and time.monotonic() < deadline:
                time.sleep(0.01)
        return ask(self, messages, *args, **options)

    monkeypatch.setattr(StarVLM, "chat", chat)
    assert converse(monkeypatch, vlm, f"is it?\n{COLOR}\n", "--image", IMAGE) == 0
    out, err = capsys.readouterr()
    assert "[stopped: the question was taken back]" in err and out == "red\n"
    assert [m["role"] for m in seen[1]] == ["user"] and len(seen[1][0]["content"]) == 2  # with its picture


def test_ctrl_c_at_the_prompt_drops_the_line(monkeypatch, vlm, capsys):
    class Interrupted(Terminal):
        n = 0

        def readline(self, *size):
            Interrupted.n += 1
            if Interrupted.n == 2:
                raise KeyboardInterrupt
            return super().readline(*size)

    terminal = Interrupted('"""\nx\nis there a red star?\n')
    monkeypatch.setattr(sys.modules[__name__], "Terminal", lambda typed: terminal)
    terminal.seek(0)
    assert converse(monkeypatch, vlm, "", "-n", "6") == 0
    assert capsys.readouterr().out.splitlines() == talk(vlm, "x", "is there a red star?", max_tokens=6)


def test_words_that_the_tab_key_offers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "ab.png", ".hidden", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.png").touch()
    offers = lambda line: list(_completions(line, line.split(" ")[-1]))
    assert offers("/re") == ["/reset ", "/report "] and offers("what") == [] and offers("") == []
    assert offers("/preset b") == ["balanced"]
    assert offers("/image a") == ["a.png", "ab.png"] and offers("/image ") == ["a.png", "ab.png", "b.png", "sub/"]
    assert (
        offers("/image sub/") == ["sub/c.png"] and offers("/image none/x") == [] and offers("/image .h") == [".hidden"]
    )


# ---- progress ----


def on_a_terminal(arguments, typed=()):
    """Runs the command in a terminal, and types a line at each prompt. Returns its status, and what was shown."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    master, slave = pty.openpty()
    code = "from star_edge.cli import main; main()"
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}

    def take_terminal():  # so that its Ctrl-C is the process's
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=env,
        preexec_fn=take_terminal,
    )
    os.close(slave)
    killer = threading.Timer(GUARD, process.kill)
    killer.start()
    shown, typed, last, silence = b"", list(typed), b"", 0
    try:
        while True:
            ready, _, _ = select.select([master], [], [], 0.1)
            if ready:
                try:
                    piece = os.read(master, 4096)
                except OSError:  # the other end is closed
                    break
                shown += piece
            silence = 0 if ready else silence + 1
            if last.endswith(b"\x03") and silence > 20:
                # CPython's readline looks for signals before it waits for input: one in between is seen with the next
                # key
                os.write(master, last)
                silence = 0
            if typed and shown.rstrip(b"\x1b[?2004h").endswith(b"> "):
                last = typed.pop(0)
                os.write(master, last)
                shown += b"|"
    finally:
        status = process.wait(GUARD)
        killer.cancel()
        os.close(master)
    return status, shown.decode()


def test_a_conversation_at_a_terminal():
    """The prompt, line editing, Ctrl-C and Ctrl-D, as they are typed."""
    status, shown = on_a_terminal(
        ["chat", "--image", IMAGE], [b"half a line\x03", f"{COLOR}\n".encode(), b"/preset fast\n", b"\x04"]
    )
    assert status == 0 and "/help lists commands" in shown
    assert "red" in shown.split("triangle?")[-1] and "[preset fast]" in shown
    assert shown.index("loading the model") < shown.index("/help lists")


def test_run_shows_what_it_waits_for():
    status, shown = on_a_terminal(["run", COLOR, "--image", IMAGE])
    assert status == 0 and "loading the model" in shown
    assert "red" in shown.split("\x1b[2K")[-1]  # the line is gone before the answer
    assert "\x1b[?25h" in shown and shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")  # the cursor is there
    status, shown = on_a_terminal(["run", COLOR, "--image", IMAGE, "--quiet"])
    assert status == 0 and shown.strip() == "red"


def test_lines_of_progress(monkeypatch, capsys):
    """What is said of each phase, on a line that is there."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    waiting = Waiting()
    task = lambda: (
        waiting._bar.tasks[0].description,
        waiting._bar.tasks[0].fields["share"],
        waiting._bar.tasks[0].fields["left"],
    )
    with waiting:
        waiting.say("loading the model")
        assert task() == ("loading the model", "", "")
        waiting.tell(Progress("encode", 1 / 3, 2.0, 4.0, 2, 3))
        assert task() == ("encoding picture 2 of 3", "33%", "about 4 s left")
        waiting.tell(Progress("encode", 0.0, 2.0, None, 1, 1))
        assert task() == ("encoding the picture", "", "")
        waiting.tell(Progress("read", 0.4, 3.0, 150.0))
        assert task() == ("reading the prompt", "40%", "about 2 min left")
        waiting.tell(Progress("choose", 0.4, 3.0))
        assert task()[0] == "choosing image tokens"
    waiting.tell(Progress("read", 0.5, 3.0))  # after its end
    quiet = Waiting(quiet=True)
    with quiet:
        quiet.tell(Progress("read", 0.5, 3.0))
    assert quiet._bar is None


def test_nothing_is_shown_without_a_terminal(star_edge):
    done = star_edge("run", COLOR, "--image", IMAGE)
    assert done.stderr.startswith("first token ") and "\x1b" not in done.stderr + done.stdout
    done = star_edge("chat", "--image", IMAGE, stdin=COLOR)
    assert done.stderr.startswith("[read ") and "\x1b" not in done.stderr + done.stdout and "> " not in done.stdout


def test_presets_and_flags_of_chat(star_edge, vlm):
    done = star_edge(
        "chat", "--image", IMAGE, "--vision-keep", "36", "--decoder-keep", "9", "--json", "-q", stdin=COLOR
    )
    config = json.loads(done.stdout)["report"]["config"]
    assert (PruneConfig(**config).vision_keep, PruneConfig(**config).decoder_keep) == (36, 9)
