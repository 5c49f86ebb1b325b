"""Batches on Ray: workers share a cluster, and some of them are killed."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from helpers import batches
from helpers.batches import PICTURES, FakeEngine, command, lines, make_tasks

from star_edge import batch_ray
from star_edge.cli.options import load_engine
from star_edge.errors import ConfigError, MissingDependencyError, WorkerError


def test_how_workers_share_a_cluster():
    share_out = batch_ray.share_out
    assert share_out([{"CPU": 2}], None, False) == (1, 2, 0)
    assert share_out([{"CPU": 8, "GPU": 2}, {"CPU": 16, "GPU": 1}, {"memory": 1}], None, False) == (2, 8, 0)
    assert share_out([{"CPU": 8, "GPU": 2}, {"CPU": 16, "GPU": 1}], None, True) == (3, 4, 1)
    assert share_out([{"CPU": 3}, {"CPU": 5}], 4, True) == (4, 1, 0)  # -ngl without a GPU that Ray knows of
    assert share_out([{"CPU": 1}, {"CPU": 7}], 8, False) == (8, 1, 0)
    with pytest.raises(ConfigError, match="3 workers are more than the 2 CPUs"):
        share_out([{"CPU": 2, "GPU": 4}], 3, False)
    with pytest.raises(ConfigError, match="2 workers are more than the 1 GPUs"):
        share_out([{"CPU": 8, "GPU": 1}], 2, True)


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"star-edge\[ray\]"):
        batch_ray.run_on_ray(make_tasks("a"), FakeEngine, print)


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two CPUs in this process; workers get the tests' own code by value, since it is not installed."""
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    for module in (sys.modules[__name__], batches):
        ray.cloudpickle.register_pickle_by_value(module)
    yield ray
    ray.shutdown()


@pytest.mark.slow  # each worker that dies takes seconds to replace
def test_a_task_whose_worker_dies_is_asked_again(cluster, tmp_path):
    """One task kills its worker once, another each time: that one gets an error, and no other task is lost or done
    twice.
    """
    results = []
    tasks = make_tasks(
        *(f"p{i}" for i in range(10)), f"die once {tmp_path / 'flag'}", "die", *(f"q{i}" for i in range(10))
    )
    batch_ray.run_on_ray(tasks, FakeEngine, results.append, workers=2)
    assert sorted(r["id"] for r in results) == list(range(22))
    by_id = {r["id"]: r for r in results}
    assert by_id[11]["error"].startswith("its worker died 3 times (")
    assert all(
        by_id[i]["text"] == f"{tasks[i].prompt} 1" for i in range(22) if i != 11
    )  # 1 thread: two workers share two CPUs


@pytest.mark.slow
def test_workers_that_do_not_start(cluster):
    with pytest.raises(WorkerError, match=r"cannot load the model \(nope\.gguf does not exist"):
        batch_ray.run_on_ray(make_tasks("a"), lambda n_threads: load_engine("nope.gguf"), print, workers=1)
    with pytest.raises(WorkerError, match="end while they load"):
        batch_ray.run_on_ray(make_tasks("a"), lambda n_threads: os.kill(os.getpid(), signal.SIGKILL), print, workers=1)


def test_a_killed_worker_of_the_command(tmp_path):
    """Two engines on a local Ray; one is killed with SIGKILL while it answers."""
    out = tmp_path / "out.jsonl"
    pytest.importorskip("ray")
    args = (
        "--image",
        str(PICTURES / "00*.png"),
        "--each",
        "--out",
        str(out),
        "-n",
        "4",
        "--ray",
        "--workers",
        "2",
        "how many squares?",
    )
    process = subprocess.Popen(
        command(*args), stderr=subprocess.PIPE, text=True, env={**os.environ, "RAY_ADDRESS": "local"}
    )
    killed = []

    def kill_one():
        while process.poll() is None and not killed:
            if out.exists() and out.read_bytes().count(b"\n") >= 4:
                for child in psutil.Process(process.pid).children(recursive=True):
                    if child.name().startswith("ray::") and "answer" in " ".join(child.cmdline()):
                        child.kill()
                        killed.append(out.read_bytes().count(b"\n"))
                        break
            time.sleep(0.002)

    thread = threading.Thread(target=kill_one)
    thread.start()
    stderr = process.communicate(timeout=300)[1]
    thread.join()
    assert process.returncode == 0, stderr
    assert killed and killed[0] < 100
    results = lines(out)
    assert sorted(r["id"] for r in results) == sorted(str(path) for path in PICTURES.glob("00*.png"))
    assert all("text" in r for r in results)
