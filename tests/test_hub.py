"""-hf: which files are chosen, and fetching them from a stand-in for the hub, in processes of their own."""

import contextlib
import fcntl
import json
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from helpers import pages
from helpers.hub_server import COMMIT, Hub, Repository

from star_edge import refvlm
from star_edge.cli import cli
from star_edge.errors import ConfigError, HubError
from star_edge.io.hub import choose_mmproj, choose_model, fetch

IMAGE = str(refvlm.DEMO_IMAGE)
TEXT, MMPROJ = refvlm.TEXT_MODEL, refvlm.MMPROJ

# ---- which files: names alone ----


@pytest.mark.parametrize(
    ("quant", "names", "expected"),
    [
        ("", ["a-F16.gguf", "a-Q4_K_M.gguf", "a-Q8_0.gguf"], "a-Q4_K_M.gguf"),
        ("", ["a-F16.gguf", "a-Q2_K.gguf", "a-Q8_0.gguf"], "a-Q8_0.gguf"),
        ("", ["b-Q5_K.gguf", "a-F16.gguf", "README.md"], "a-F16.gguf"),
        ("q5_k_m", ["a-Q5_K_S.gguf", "a.Q5_K_M.gguf"], "a.Q5_K_M.gguf"),
        ("Q4_K", ["ggml-model-q4_k.gguf", "a-Q4_K_M.gguf"], "ggml-model-q4_k.gguf"),
        ("F16", ["a-BF16.gguf", "a-F16.gguf"], "a-F16.gguf"),
        ("Q4_0", ["a-IQ4_0.gguf", "z-Q4_0.gguf"], "z-Q4_0.gguf"),
        ("Q8_0", ["mmproj-a-Q8_0.gguf", "mtp-a-Q8_0.gguf", "imatrix-Q8_0.gguf", "sub/z-Q8_0.gguf"], "sub/z-Q8_0.gguf"),
        ("UD-Q4_K_XL", ["a-Q4_K_XL.gguf", "a-UD-Q4_K_XL.gguf"], "a-UD-Q4_K_XL.gguf"),
    ],
)
def test_the_text_model(quant, names, expected):
    assert choose_model(names, quant, "o/r") == [expected]


def test_a_split_model_is_all_of_its_parts():
    names = [f"{q}/m-{q}-{i:05}-of-00003.gguf" for q in ("Q8_0", "Q4_K_M") for i in (3, 1, 2)]
    assert choose_model(names, "", "o/r") == [f"Q4_K_M/m-Q4_K_M-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    names.remove("Q4_K_M/m-Q4_K_M-00002-of-00003.gguf")
    with pytest.raises(HubError, match="2 of the 3 parts"):
        choose_model(names, "q4_k_m", "o/r")


@pytest.mark.parametrize(
    ("model", "names", "expected"),
    [
        (
            "a.gguf",
            ["mmproj-a-Q8_0.gguf", "mmproj-a-BF16.gguf", "mmproj-a-F16.gguf", "mmproj-a-F32.gguf"],
            "mmproj-a-F16.gguf",
        ),
        ("a.gguf", ["mmproj-a-Q8_0.gguf", "mmproj-a-f32.gguf", "mmproj-a-bf16.gguf"], "mmproj-a-bf16.gguf"),
        ("a.gguf", ["mmproj-a-Q8_0.gguf", "mmproj-a-F32.gguf"], "mmproj-a-F32.gguf"),
        ("a.gguf", ["a-MMPROJ.gguf"], "a-MMPROJ.gguf"),
        ("x/y/a.gguf", ["mmproj-f16.gguf", "x/mmproj-q8_0.gguf", "x/z/mmproj-f16.gguf"], "x/mmproj-q8_0.gguf"),
        ("x/y/a.gguf", ["mmproj-f16.gguf", "x/z/mmproj-f16.gguf"], "mmproj-f16.gguf"),
    ],
)
def test_the_mmproj(model, names, expected):
    assert choose_mmproj([model, *names], model, "o/r") == expected


def test_what_is_not_there_is_an_error_that_names_what_is():
    names = [
        "a-Q4_K_M.gguf",
        "a-Q8_0-00001-of-00002.gguf",
        "a-Q8_0-00002-of-00002.gguf",
        "vision/mmproj-F16.gguf",
        "odd.gguf",
    ]
    with pytest.raises(HubError, match=r"o/r has no Q6_K: it has Q4_K_M, Q8_0, odd\.gguf$"):
        choose_model(names, "Q6_K", "o/r")
    with pytest.raises(
        HubError, match=r"no mmproj beside a-Q4_K_M\.gguf: there is vision/mmproj-F16\.gguf: `hf download o/r vision/mm"
    ):
        choose_mmproj(names, names[0], "o/r")
    with pytest.raises(HubError, match=r"has no mmproj: it has a-Q4_K_M\.gguf: .*--no-mmproj"):
        choose_mmproj(names[:1], names[0], "o/r")
    with pytest.raises(HubError, match=r"no text model in GGUF form: it has config\.json"):
        choose_model(["config.json"], "", "o/r")


@pytest.mark.parametrize(
    "spec", ["", "refvlm", "a/b/c", "o/r:", "o/r:Q4 K", "o/r:x:y", "https://hub/o/r", "o/r/a.gguf"]
)
def test_a_spec_of_another_form(spec):
    with pytest.raises(ConfigError, match="owner/repo"):
        fetch(spec)


# ---- from a hub ----


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """The reference model's text model in parts."""
    folder = tmp_path_factory.mktemp("split")
    reader = GGUFReader(TEXT)
    writer = GGUFWriter(folder / "refvlm-Q8_0.gguf", "llama", split_max_tensors=25)
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, *inner = entry.types
            writer.add_key_value(
                name, entry.contents(), kind, sub_type=inner[-1] if kind == GGUFValueType.ARRAY else None
            )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(folder.iterdir())
    assert len(parts) == 3
    return {part.name: part for part in parts}


@pytest.fixture
def hub(split):
    single = {"refvlm-Q8_0.gguf": TEXT, "mmproj-refvlm-F16.gguf": MMPROJ, "README.md": refvlm._FOLDER / "demo.jsonl"}
    hub = Hub(
        {
            "local/refvlm": Repository(single),
            "local/split": Repository({**split, "mmproj-F16.gguf": MMPROJ}),
            "local/sub": Repository({"gguf/q8/refvlm-Q8_0.gguf": TEXT, "gguf/mmproj-F16.gguf": MMPROJ}),
            "local/two": Repository(
                {"m-Q8_0.gguf": MMPROJ, "m-Q4_K_M.gguf": TEXT, "mmproj-BF16.gguf": TEXT, "mmproj-F16.gguf": MMPROJ}
            ),
            "local/text": Repository({"refvlm-Q8_0.gguf": TEXT}),
            "local/gated": Repository(single, gated=True),
            "local/private": Repository(single, token="secret"),
            "local/down": Repository({}, status=503),
            "local/refuses": Repository({}, status=403),
        }
    )
    yield hub
    hub.close()


@pytest.fixture
def python(hub, tmp_path):
    """Runs code in a process whose hub is the stand-in and whose cache is empty at first: huggingface_hub reads both at
    import.
    """

    def run(code, *args, status=0, **environment):
        base = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        env = {
            **base,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "NO_PROXY": "*",
            "COLUMNS": "200",
            **environment,
        }
        done = subprocess.run(
            [sys.executable, "-c", code, *args], cwd=tmp_path, capture_output=True, text=True, env=env
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


FETCH = """
import json, sys
from star_edge.errors import StarEdgeError
from star_edge.io.hub import fetch
for spec in sys.argv[1:]:
    try:
        print(json.dumps([str(path) for path in fetch(spec)]))
    except StarEdgeError as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""


@pytest.fixture
def fetch_all(python):
    return lambda *specs, **env: [json.loads(line) for line in python(FETCH, *specs, **env).stdout.splitlines()]


def test_fetch_every_layout(fetch_all, hub, split):
    single, parts, sub, two, quant = fetch_all(
        "local/refvlm", "local/split", "local/sub", "local/two", "local/two:q8_0"
    )
    contents = lambda paths: [Path(path).read_bytes() for path in paths]
    both = [TEXT.read_bytes(), MMPROJ.read_bytes()]
    assert contents(single) == contents(sub) == contents(two) == both
    assert contents(quant) == [MMPROJ.read_bytes()] * 2  # this layout's Q8_0 is another file on purpose
    assert contents(parts) == [split["refvlm-Q8_0-00001-of-00003.gguf"].read_bytes(), both[1]]
    for name, part in split.items():  # all parts lie beside the first, where llama.cpp looks
        assert Path(parts[0]).with_name(name).read_bytes() == part.read_bytes()
    bodies = lambda: [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
    first = bodies()
    assert len(first) == 10 and not any("README" in path or "BF16" in path for path in first)
    assert fetch_all("local/refvlm", "local/split") == [single, parts] and bodies() == first


def test_errors_of_the_hub(fetch_all, hub):
    specs = "local/nope", "local/gated", "local/private", "local/two:Q6_K", "local/text", "local/down", "local/refuses"
    missing, gated, private, quant, mmproj, down, refuses = fetch_all(*specs)
    assert missing.startswith(f"HubError: {hub.url} has no model local/nope, or it is private: ")
    assert "HF_TOKEN" in missing and "HF_TOKEN" in private
    assert gated.startswith("HubError: local/gated is gated: ask for access at ") and "HF_TOKEN" in gated
    assert quant == "HubError: local/two has no Q6_K: it has Q4_K_M, Q8_0"
    assert "local/text has no mmproj: it has refvlm-Q8_0.gguf" in mmproj and "--no-mmproj" in mmproj
    assert down.startswith("HubError: local/down is not in the cache, and the hub cannot be reached: ")
    assert "refuses access to local/refuses (HTTP 403): check HF_TOKEN" in refuses
    assert fetch_all("local/private", HF_TOKEN="secret")[0][0].endswith("refvlm-Q8_0.gguf")


def test_offline_only_the_cache_counts(fetch_all, hub, python, tmp_path):
    online = fetch_all("local/refvlm", "local/two:Q8_0")
    for repository in hub.repositories.values():
        repository.status = 503
    begun = tmp_path / "hf" / "hub" / "models--local--sub"  # what a first download that was cut off leaves
    (begun / "snapshots" / COMMIT).mkdir(parents=True)
    (begun / "refs").mkdir()
    (begun / "refs" / "main").write_text(COMMIT)
    hub.requests.clear()
    done = python(
        FETCH, "local/refvlm", "local/refvlm:Q8_0", "local/two", "local/two:Q4_K_M", "local/sub", "local/text"
    )
    offline = [json.loads(line) for line in done.stdout.splitlines()]
    assert offline[:3] == [online[0], online[0], online[1]]
    assert offline[3] == "HubError: local/two (cached files only) has no Q4_K_M: it has Q8_0"
    for repo, error in zip(("local/sub", "local/text"), offline[4:]):
        assert error.startswith(f"HubError: {repo} is not in the cache, and the hub cannot be reached: ")
    assert f"{hub.url} gives no answer" in done.stderr
    assert not any("/resolve/" in path for _, path, _ in hub.requests)
    hub.close()
    assert fetch_all("local/refvlm") == [online[0]]
    silent = python(FETCH, "local/refvlm", HF_HUB_OFFLINE="1")
    assert json.loads(silent.stdout) == online[0] and not silent.stderr


def test_a_broken_download_goes_on_where_it_stopped(fetch_all, hub, tmp_path):
    big = tmp_path / "big.gguf"
    big.write_bytes(os.urandom(1 << 20) * 24)  # huggingface_hub keeps steps of 10 MB
    hub.repositories["local/big"] = Repository({"big-Q8_0.gguf": big, "mmproj-F16.gguf": MMPROJ})
    hub.cut = [15_000_000]
    fetch_all("local/big")  # huggingface_hub before 2.0 goes on in the next run
    assert Path(fetch_all("local/big")[0][0]).read_bytes() == big.read_bytes()
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and path.endswith("big-Q8_0.gguf")]
    assert len(ranges) == 2 and ranges[0] is None and int(ranges[1].removeprefix("bytes=").rstrip("-")) >= 10_000_000


def test_without_huggingface_hub(python):
    blocked = "import sys; sys.modules['huggingface_hub'] = None\n"
    assert json.loads(python(blocked + FETCH, "local/refvlm").stdout) == (
        'MissingDependencyError: models from the hub need huggingface_hub: pip install "star-edge[hub]"'
    )


# ---- the command ----

MAIN = "from star_edge.cli import main; main()"


def test_run_hf(python):
    """The whole path, for one file and for a split model: download, load, answer."""
    for spec in ("local/refvlm", "local/split:q8_0"):
        done = python(MAIN, "run", "-hf", spec, "-c", "1024", "--image", IMAGE, "how many squares?")
        assert done.stdout.strip() == "1"
        assert len(done.stderr.splitlines()) == 1  # the summary: no progress bar without a terminal


def test_the_text_model_alone_is_enough_to_inspect(python):
    data = json.loads(
        python(MAIN, "inspect", "-hf", "local/text", "--no-mmproj", "--json", "is there a red star?").stdout
    )
    assert data["arrays"]["decoder_3"]


def test_a_missing_repository_is_one_line(python):
    done = python(MAIN, "doctor", "-hf", "local/nope", status=2)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1 and "local/nope" in done.stderr


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["-hf", "o/r", "-m", "x.gguf"], "-m and -hf"),
        (["-hf", "refvlm"], "owner/repo"),
        (["--no-mmproj"], "--no-mmproj"),
    ],
)
def test_options_that_cannot_be_used(args, word):
    for command in ("run", "inspect", "doctor"):
        with pytest.raises(ConfigError, match=word):
            cli.main([command, *args, *([] if command == "doctor" else ["hi"])], standalone_mode=False)


def test_progress_on_a_terminal(hub, tmp_path):
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))  # the bar is as wide as the terminal
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
    env.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)  # a command with --quiet that ran in this process has set it
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, "local/refvlm"], stdout=subprocess.DEVNULL, stderr=follower, env=env
    )
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # Linux says so when the other side has closed
        while piece := os.read(leader, 4096):
            shown += piece
    os.close(leader)
    assert process.wait(timeout=300) == 0
    assert b"refvlm-Q8_0.gguf" in shown and b"100%" in shown


def test_commands_of_the_page(python, tmp_path):
    """The block runs as it stands, but for the name of the repository."""
    (block,) = pages.executed("docs/hub.md", "hub")
    pages.with_users_files(tmp_path)
    code = "import subprocess, sys; sys.exit(subprocess.run(['bash', '-exc', sys.argv[1]]).returncode)"
    commands = block.replace("owner/repo", "local/refvlm")
    done = python(code, commands, PATH=pages.shell_environment()["PATH"])
    assert done.stderr.count("+ star-edge ") == len(block.splitlines()) == 2
