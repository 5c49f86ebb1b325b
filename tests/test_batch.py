"""Many requests: tasks, results that a second run goes on with, and the command."""

import json
import os
import subprocess
import time

import pytest
from helpers.batches import BALANCED, PICTURES, FakeEngine, command, lines, make_tasks
from helpers.presets import kept
from PIL import Image

from star_edge import PRESETS, PruneConfig, refvlm
from star_edge.batch import (
    Settings,
    Task,
    describe_model,
    each_image,
    names_several,
    open_results,
    read_tasks,
    run_tasks,
)
from star_edge.cli import cli
from star_edge.cli.options import load_engine
from star_edge.errors import ConfigError, ImageError, OutputError

IMAGE = str(refvlm.DEMO_IMAGE)


# ---- tasks ----


@pytest.fixture
def album(tmp_path, monkeypatch):
    """Two pictures, one with a pattern for a name, a subfolder with a third, and files that are no pictures."""
    (tmp_path / "album" / "more").mkdir(parents=True)
    for name in ("b.png", "a[1].JPG", "more/c.webp"):
        Image.new("RGB", (8, 8)).save(tmp_path / "album" / name)
    for name in ("notes.txt", ".a.png"):
        (tmp_path / "album" / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "album"


def test_what_each_image_is(album):
    ids = lambda *images: [task.id for task in each_image(images, "what?", BALANCED)]
    assert ids("album") == ["album/a[1].JPG", "album/b.png"]
    assert ids("album/*.png") == ["album/b.png"]
    assert ids("album/**/*.[pw]*") == ["album/b.png", "album/more/c.webp"]
    assert ids("album/a[1].JPG") == ["album/a[1].JPG"] and not names_several("album/a[1].JPG")
    assert ids("https://host/a*.png", "album/b.png", "album") == [
        "https://host/a*.png",
        "album/b.png",
        "album/a[1].JPG",
    ]
    task = each_image(["album/b.png"], "what?", BALANCED)[0]
    assert task == Task("album/b.png", ("album/b.png",), (str(album / "b.png"),), "what?", BALANCED)
    for image in ("album/*.gif", "album/nope.png", "nope"):
        with pytest.raises(ImageError, match=r"album/|nope"):
            each_image([image], "what?", BALANCED)
    (album / "none").mkdir()
    with pytest.raises(ImageError, match="no image in album/none"):
        each_image(["album/none"], "what?", BALANCED)


def test_tasks_of_a_file(album):
    file = album / "tasks.jsonl"
    file.write_text(
        '{"image": "b.png", "prompt": "one?"}\n\n'
        '{"images": ["b.png", "https://host/x.png"], "prompt": "two?", "id": 7, "preset": "fast", "max_tokens": 5}\n'
        '{"image": "/x.png", "vision_keep": 0.25, "decoder_keep": 9, "temperature": 0.5, "seed": 3, "raw": true}\n'
        '{"id": "off", "preset": "off"}\n'
    )
    one, two, three, off = read_tasks("album/tasks.jsonl", "all?", BALANCED)
    assert one == Task(one.key, ("b.png",), (str(album / "b.png"),), "one?", BALANCED)
    assert (
        two.id == 7
        and two.sources == (str(album / "b.png"), "https://host/x.png")
        and two.settings == Settings(PRESETS["fast"], 5)
    )
    assert three.prompt == "all?" and three.sources == ("/x.png",)
    assert three.settings == Settings(PruneConfig(0.25, 9, redundancy="auto"), 256, 0.5, 3, True)
    assert off.settings.prune is None and off.images == ()
    assert len({task.key for task in (one, two, three, off)}) == 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"image": "a.png"', "not valid JSON"),
        ("[1]", "list"),
        ('{"image": "a.png"}', "no prompt"),
        ('{"prompt": "x", "picture": "a.png"}', "'picture'"),
        ('{"prompt": "x", "image": ["a.png"]}', "image=.* is a list"),
        ('{"prompt": "x", "images": ["a.png", 3]}', "not all str"),
        ('{"prompt": "x", "image": "a", "images": ["b"]}', "both"),
        ('{"prompt": "x", "preset": "zzz"}', "zzz"),
        ('{"prompt": "x", "vision_keep": 2.0}', "vision_keep=2.0"),
        ('{"prompt": "x", "max_tokens": 0}', "max_tokens"),
        ('{"prompt": "x", "max_tokens": true}', "max_tokens=true is true or false: use a whole number"),
        ('{"prompt": "x", "temperature": NaN}', "temperature"),
        ('{"prompt": "first"}', "repeats line 1"),
    ],
)
def test_a_line_that_is_no_task_is_named(tmp_path, line, words):
    file = tmp_path / "t.jsonl"
    file.write_text('{"prompt": "first"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=rf"t\.jsonl, line 2.*{words}"):
        read_tasks(file, None, BALANCED)


def test_a_file_without_tasks(tmp_path):
    for file in (tmp_path / "nope.jsonl", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_tasks(file, None, BALANCED)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="no tasks"):
        read_tasks(tmp_path / "empty.jsonl", None, BALANCED)


# ---- answers ----


def test_an_unexpected_error_ends_no_run():
    results = []
    run_tasks(make_tasks("a", "fail", "b"), FakeEngine, results.append)
    assert [r.get("text", r.get("error")) for r in results] == ["a None", "RuntimeError: something odd", "b None"]


def test_a_result_says_what_the_engine_did():
    results = []
    task = Task("x", ("demo.png",), (IMAGE,), "what digit is green?", Settings(PRESETS["fast"], 8))
    broken = Task("y", ("nope.png", IMAGE), ("nope.png", IMAGE), "two?", BALANCED)
    run_tasks([task, broken], load_engine, results.append)
    first = results[0].pop("first_token_ms")
    assert first > 0 and results[0] == {
        "id": "x",
        "image": "demo.png",
        "prompt": "what digit is green?",
        "text": " 2",
        "finish_reason": "stop",
        "image_tokens": 144,
        "average_tokens": kept("fast").average,
        "cached_images": 0,
        "reused_tokens": 0,
        "notes": [],
    }
    assert (
        results[1]["images"] == ["nope.png", IMAGE]
        and "nope.png does not exist" in results[1]["error"]
        and "text" not in results[1]
    )


# ---- results ----


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


def write(out, tasks, *results, model="m#1", **options):
    """Opens the file, adds the results given as (index, text or None for an error) and returns the ids that were done
    before.
    """
    results_file = open_results(out, tasks, model, **options)
    done = {name for (name,) in results_file.done}
    for i, text in results:
        results_file.add({"id": tasks[i].id, **({"text": text} if text is not None else {"error": "e"})})
    results_file.close()
    return done


def test_results_go_on(out):
    tasks = make_tasks("a", "b", "c")
    assert write(out, tasks, (0, "A"), (1, None)) == set()
    assert write(out, tasks, (1, "B")) == {"0"}  # the error is tried again, and has gone
    assert [line.get("text") for line in lines(out)] == ["A", "B"]
    assert lines(out)[0] == {"id": 0, "text": "A", "model": "m#1", "task": tasks[0].key}
    assert write(out, tasks[1:], (2 - 1, "C")) == {"1"}  # lines of tasks that are no longer asked for stay
    assert [line["text"] for line in lines(out)] == ["A", "B", "C"]


def test_a_line_cut_off_anywhere_is_dropped(out):
    tasks = make_tasks("a", "b")
    write(out, tasks, (0, "A"), (1, "B"))
    whole = out.read_bytes()
    start = whole.index(b"\n") + 1
    for end in range(start + 1, len(whole) - 1):
        out.write_bytes(whole[:end])
        assert write(out, tasks, (1, "B")) == {"0"}
        assert out.read_bytes() == whole
    out.write_bytes(whole[:-1])  # all of it is there but the end of the line
    assert write(out, tasks) == {"0", "1"} and out.read_bytes() == whole
    assert list(out.parent.iterdir()) == [out]


def test_results_of_something_else_are_refused_and_left_alone(out):
    tasks = make_tasks("a", "b")
    write(out, tasks, (0, "A"))
    before = out.read_bytes()
    with pytest.raises(OutputError, match=r"made with m#1, .* are m#2: .*--fresh"):
        open_results(out, tasks, "m#2")
    with pytest.raises(OutputError, match="task 0 with another image, prompt or settings: .*--fresh"):
        open_results(out, make_tasks("other"), "m#1")
    assert out.read_bytes() == before
    for foreign in (
        b"\x89PNG\r\n\x1a\n\0\0",
        b"hello",
        b'{"image": "a.png", "prompt": "x"}\n',
        before[:-5] + b"\n" + before,
    ):
        out.write_bytes(foreign)
        with pytest.raises(OutputError, match=r"out\.jsonl, line 1 is not a result"):
            open_results(out, tasks, "m#1")
        assert out.read_bytes() == foreign
    assert (
        write(out, tasks, model="m#2", fresh=True) == set() and out.read_bytes() == foreign
    )  # not before there is something new
    assert write(out, tasks, (1, "B"), model="m#2", fresh=True) == set()
    assert [line["text"] for line in lines(out)] == ["B"]


def test_two_runs_do_not_write_one_file(out):
    tasks = make_tasks("a")
    write(out, tasks, (0, None))
    first = open_results(out, tasks, "m#1")  # replaces the file, since it drops the error
    with pytest.raises(OutputError, match="another run"):
        open_results(out, tasks, "m#1")
    first.close()
    assert write(out, tasks, (0, "A")) == set()
    with pytest.raises(OutputError, match="cannot be written"):
        open_results(out.parent / "no" / "out.jsonl", tasks, "m#1")


def test_a_model_is_told_by_its_contents(tmp_path):
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    a.write_bytes(bytes(3 << 20))
    b.write_bytes(b"mmproj")
    first = describe_model(a, b, {"n_ctx": 1})
    assert first.startswith("a.gguf+b.gguf#") and describe_model(str(a), str(b), {"n_ctx": 1}) == first
    others = [describe_model(a, None, {"n_ctx": 1}), describe_model(a, b, {"n_ctx": 2})]
    for change in (b"x" + bytes((3 << 20) - 1), bytes((3 << 20) - 1) + b"x", bytes((3 << 20) + 1)):
        a.write_bytes(change)
        others.append(describe_model(a, b, {"n_ctx": 1}))
    assert len({first, *others}) == 6
    with pytest.raises(ConfigError, match=r"nope\.gguf cannot be read"):
        describe_model(tmp_path / "nope.gguf", None, {})


# ---- the command ----


def run(*args, status=0, **options):
    done = subprocess.run(command(*args), capture_output=True, text=True, **options)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_tasks_to_stdout_with_a_broken_image(tmp_path):
    (tmp_path / "broken.png").write_text("x")
    tasks = [
        {"id": "a", "image": IMAGE, "prompt": "what color is the triangle?"},
        {"id": "b", "image": "broken.png"},
        {"id": "c", "image": IMAGE, "preset": "off", "prompt": "what number is shown?"},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    done = run("--tasks", str(tmp_path / "t.jsonl"), "how many stars?", status=3)
    a, b, c = (json.loads(line) for line in done.stdout.splitlines())
    assert (
        a["text"].strip() == "red"
        and a["average_tokens"] == kept("balanced").average
        and c["text"].strip() == "0 7"
        and c["average_tokens"] == 144
    )
    assert b["prompt"] == "how many stars?" and "broken.png is not an image" in b["error"]
    counts, cause = done.stderr.splitlines()
    assert (
        counts == "2 answered, 1 failed" and cause.startswith("failed (1): ") and "broken.png is not an image" in cause
    )
    assert [line["cached_images"] for line in (a, c)] == [0, 1]  # the second time it was not encoded


def test_a_killed_run_goes_on(out):
    """SIGKILL while it answers: the second run keeps what is there, repairs the last line, and asks for the rest
    alone.
    """
    pattern, prompt = str(PICTURES / "00[0-2]*.png"), "how many squares?"
    args = ("--image", pattern, "--each", "--out", str(out), "-n", "4", prompt)
    process = subprocess.Popen(command(*args), stderr=subprocess.DEVNULL)
    while not out.exists() or out.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    killed = out.read_bytes()
    n = killed.count(b"\n")
    assert 3 <= n < 30
    out.write_bytes(
        killed + killed[:40]
    )  # a write that was cut off, which a kill between two lines does not leave by itself
    done = run(*args)
    assert done.stderr == f"{30 - n} answered, {n} done before\n"
    assert out.read_bytes().startswith(killed)
    results = lines(out)
    assert [r["id"] for r in results] == sorted(str(path) for path in PICTURES.glob("00[0-2]*.png"))
    expected = []
    run_tasks(each_image([pattern], prompt, Settings(PRESETS["balanced"], 4)), load_engine, expected.append)
    assert [r["text"] for r in results] == [r["text"] for r in expected]


def test_several_images_without_each_are_one_request(album):
    data = json.loads(run("--image", IMAGE, "--image", IMAGE, "--json", "-n", "2", "how many squares?").stdout)
    assert len(data["report"]["images"]) == 2


def test_a_bar_on_a_terminal(out):
    leader, follower = os.openpty()
    process = subprocess.Popen(
        command("--image", IMAGE, "--each", "--out", str(out), "how many squares?"), stderr=follower
    )
    os.close(follower)
    shown = b""
    try:
        while piece := os.read(leader, 4096):
            shown += piece
    except OSError:  # Linux says so when the other side has closed
        pass
    os.close(leader)
    assert process.wait() == 0
    assert b"] 0 of 1" in shown and b"#] 1 of 1" in shown and shown.endswith(b"\r\x1b[K1 answered\r\n")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--image", "album", "what?"], "album names .*--each"),
        (["--image", "album/*.png", "what?"], "--each"),
        (["--each", "what?"], "needs images"),
        (["--each", "--tasks", "t.jsonl", "--image", "album", "what?"], "exclude"),
        (["--tasks", "t.jsonl", "--image", "album"], "exclude"),
        (["--tasks", "nope.jsonl"], "nope.jsonl cannot be read"),
        (["--tasks", "t.jsonl", "--out", "t.jsonl", "--fresh"], "is the file of tasks"),
        (["--image", "album/b.png", "--out", "o.jsonl", "what?"], "--out is for many"),
        (["--image", "album/b.png", "--ray", "what?"], "--ray is for many"),
        (["--image", "album", "--each", "--fresh", "what?"], "--fresh"),
        (["--image", "album", "--each", "--workers", "2", "what?"], "--ray"),
        (["--image", "album", "--each", "--overlay", "o.png", "what?"], "--overlay"),
        (["--image", "album", "--each", "--out", "no/o.jsonl", "what?"], "no/o.jsonl cannot be written"),
        (["--image", "album", "--each", "-m", "nope.gguf", "--out", "o.jsonl", "what?"], "nope.gguf"),
        (["--image", "album", "--each", "-m", "nope.gguf", "what?"], "nope.gguf"),
    ],
)
def test_options_that_cannot_be_used(album, args, words):
    tasks = album.parent / "t.jsonl"
    tasks.write_text('{"prompt": "x"}\n')
    with pytest.raises((ConfigError, ImageError, OutputError, ValueError), match=words):
        cli.main(["run", *args], standalone_mode=False)
    assert tasks.read_text() == '{"prompt": "x"}\n'
