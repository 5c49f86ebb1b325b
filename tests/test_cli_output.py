"""What the command prints: tables at any width, JSON of one line, help pages, silence where it is asked for, and the
status that it ends with.
"""

from __future__ import annotations

import io
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
from rich.console import Console

from star_edge import cli, refvlm
from star_edge.benchmarking.plots import save as save_bench_plot
from star_edge.benchmarking.sides import STAGES
from star_edge.benchmarking.summary import tables as bench_tables
from star_edge.cli import COMMANDS, EXIT_STATUSES
from star_edge.cli.tables import STAY_LONGEST, make_console, print_table
from star_edge.evaluation import plots
from star_edge.evaluation.configs import OFF
from star_edge.evaluation.summary import tables as eval_tables

IMAGE = str(refvlm.DEMO_IMAGE)
QUESTION = "what color is the triangle?"
LLAVA = Path(__file__).parent / "fixtures" / "llava"
NAMES = ["off", "quality", "a name with several words that is longer than half of a narrow terminal", "x" * 70]


def command(*args, **options):
    """Runs `python -m star_edge` in a process of its own."""
    options = {"capture_output": True, "text": True, "timeout": 600, **options}
    return subprocess.run([sys.executable, "-m", "star_edge", *args], **options)


@pytest.fixture
def star_edge(monkeypatch, capsys, tmp_path):
    """Runs the command in this process; returns what it printed on stdout and stderr."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.chdir(tmp_path)

    def run(*args, status=0):
        monkeypatch.setattr(sys, "argv", ["star-edge", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == status, err
        return out, err

    yield run
    signal.signal(signal.SIGINT, before)


# ---- tables ----


def printed(width, table, **options):
    console = Console(width=width, file=io.StringIO(), **options)
    print_table(console, *table)
    return console.file.getvalue()


def eval_summary(names=NAMES, categories=("color", "count", "digit", "exist", "number", "where")):
    row = {
        "accuracy_by_category": dict.fromkeys(categories, 0.5),
        "group_accuracy": None,
        "interval": (-0.125, 0.0625),
        "mcnemar_p": 0.0123,
        "n_scored": 12345,
        "accuracy": 0.75,
        "pope": {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5},
        "average_tokens": 1234.5,
        "relative_accuracy": 0.99,
        "agreement": 0.98,
        "kl": 0.001,
        "first_token_ms": 12345.6,
        "speed_up": 12.34,
        "n_errors": 7,
    }
    rows = [{"name": name, "method": name, **row} for name in names]
    return {"metric": "pope", "n_tasks": 3, "n_images": 2, "configs": rows}


def bench_result(names=NAMES):
    spread = {"median": 12345.6, "min": 11111.1, "max": 22222.2}
    row = {
        "kind": "star_edge",
        "image_tokens": 4096,
        "average_tokens": 1234.5,
        "first_token_ms": spread,
        "stages_ms": dict.fromkeys(STAGES, 1543.2),
        "tokens_per_s": spread,
        "selection_share": 0.001,
        **dict.fromkeys(("speed_up", "ideal", "decoder_speed_up", "of_ideal"), 1.23),
        **dict.fromkeys(("kv_bytes", "kv_bytes_needed", "peak_rss_bytes", "device_bytes"), 2**30),
        **dict.fromkeys(("kv_cells", "n_ctx_needed"), 4096),
    }
    return {"title": "a model", "reference": names[0], "sides": [{"name": name, **row} for name in names]}


TABLES = [
    *((t.title, t.header, t.rows) for t in eval_tables(eval_summary())),
    *((t.title, t.header, t.rows) for t in bench_tables(bench_result())),
]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table[0][:20])
@pytest.mark.parametrize("width", [40, 80, 100, 200, 100_000])
def test_tables_fit(table, width):
    """No line is wider; names and figures are whole; a figure stands in the row of its name; and what is missing is
    named, in the stated order.
    """
    _, header, rows = table
    out = printed(width, table)
    lines = out.splitlines()
    assert max(map(len, lines)) <= width and "…" not in out
    body = [line.strip("│").split("│") for line in lines if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in body]
    # A long name goes on in further lines, whose other cells are empty
    names = []
    for row in cells:
        if row[1:] and not any(row[1:]):
            names[-1] += row[0]
        else:
            names.append(row[0])
    squeezed = lambda text: text.replace(" ", "")
    assert [squeezed(name) for name in names] == [squeezed(row[0]) for row in rows]
    footer = " ".join(out.split()).partition("Not shown at this width: ")[2].partition(". A wider")[0]
    shown = [i for i, title in enumerate(header) if title not in footer.split("; ")]
    assert len(shown) >= 2 and 0 in shown
    figures = [row[1:] for row in cells if any(row[1:])]
    assert figures == [[row[i] for i in shown[1:]] for row in rows]
    rank = lambda i: STAY_LONGEST.index(header[i]) if header[i] in STAY_LONGEST else len(STAY_LONGEST) + i
    gone = [i for i in range(len(header)) if i not in shown]
    assert not gone or max(map(rank, shown[1:])) < min(map(rank, gone))
    assert (not gone) == (width == 100_000) or width == 200


def test_what_the_table_test_catches():
    """rich alone cuts or wraps cells where a terminal is narrow."""
    table = ("", ["config", *("n" * 9 for _ in range(12))], [["a", *("123456789" for _ in range(12))]])
    assert "Not shown" in printed(80, table) and "Not shown" not in printed(200, table)


def test_columns_are_ranked_once():
    assert len(set(STAY_LONGEST)) == len(STAY_LONGEST)


def test_a_pipe_has_no_width(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console().width > 10_000
    monkeypatch.setenv("COLUMNS", "72")
    assert make_console().width == 72


@pytest.mark.skipif(sys.platform == "win32", reason="pty")
@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_has_its_width(columns):
    """On a real terminal of that width."""
    import fcntl
    import pty
    import struct
    import termios

    code = (
        "from star_edge.cli.tables import make_console, print_table; "
        "print_table(make_console(), 't', ['name', *('column %d' % i for i in range(30))], [['x', *['12345'] * 30]])"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, env={**env, "TERM": "dumb"}
    ) as process:
        os.close(theirs)
        out = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end was closed
                break
            if not part:
                break
            out += part
        assert process.wait(60) == 0
    os.close(ours)
    lines = out.decode().splitlines()
    assert columns // 2 < max(map(len, lines)) <= columns and "Not shown at this width" in out.decode()


# ---- plots ----


def legend_of(monkeypatch, draw):
    """(legend's, figure's, its pictures') boxes in pixels, and the legend's texts, when the file is written."""
    import matplotlib.figure

    seen = []
    save = matplotlib.figure.Figure.savefig

    def watched(figure, *args, **options):
        figure.canvas.draw()
        legend = figure.legends[0]
        seen.append(
            (
                legend.get_window_extent(),
                figure.bbox.frozen(),
                [axis.get_tightbbox() for axis in figure.axes],
                [text.get_text() for text in legend.get_texts()],
            )
        )
        return save(figure, *args, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", watched)
    draw()
    return seen[0]


@pytest.mark.parametrize(
    "names",
    [
        ["quality", "fast"],
        [f"grid vision {i / 10} picture 0.{i} vision_scorer=attention decoder_share=0.5" for i in range(9)],
        ["a very long name " * 20, "short"],
    ],
    ids=["two", "nine long", "one very long"],
)
def test_legends_are_whole(monkeypatch, tmp_path, names):
    """The legend lies within the picture and beside the axes, and has every name."""
    pytest.importorskip("matplotlib")
    summary = eval_summary([OFF.name, *names])
    for draw in (
        lambda: plots.save({**summary, "metric": "exact"}, str(tmp_path / "a.png")),
        lambda: save_bench_plot(bench_result([name[:100] for name in names]), str(tmp_path / "b.png")),
    ):
        legend, figure, axes, _ = legend_of(monkeypatch, draw)
        assert figure.x0 <= legend.x0 and legend.x1 <= figure.x1 and figure.y0 <= legend.y0
        assert all(box.y0 >= legend.y1 - 1 and box.height > 100 for box in axes)
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_legends_have_all_names(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    names = ["a very long name " * 20, "short"]
    summary = {**eval_summary([OFF.name, *names]), "metric": "exact"}
    *_, texts = legend_of(monkeypatch, lambda: plots.save(summary, str(tmp_path / "a.svg")))
    assert [" ".join(text.split()) for text in texts] == [" ".join(name.split()) for name in names]


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
