"""The stopwatch of a request: steps add up, whatever lies inside what."""

import pytest

from star_edge import PruneConfig, StarVLM, refvlm, stopwatch


@pytest.fixture
def watch(monkeypatch):
    """A stopwatch whose clock a test sets."""
    watch = stopwatch.Stopwatch()
    watch.now = 100.0
    monkeypatch.setattr(stopwatch, "perf_counter", lambda: watch.now)
    return watch


def test_a_step_inside_another_takes_its_time_from_it(watch):
    with watch.step("outer"):
        watch.now += 1
        with watch.step("inner"):
            watch.now += 10
        watch.now += 2
    watch.now += 1000  # no step
    with watch.step("outer"):
        watch.now += 4
    assert watch.seconds == {"outer": 7, "inner": 10}


def test_a_part_that_something_else_measured(watch):
    with watch.step("probe"):
        watch.now += 5
        watch.take("scores", 2)
        watch.take("scores", 1)
        watch.now += 5
    assert watch.seconds == {"probe": 7, "scores": 3}


def test_an_error_ends_its_step_alone(watch):
    with watch.step("outer"):
        with pytest.raises(ValueError), watch.step("inner"):
            watch.now += 1
            raise ValueError
        watch.now += 2
    assert watch.seconds == {"outer": 2, "inner": 1}


@pytest.mark.parametrize("config", [None, "balanced", PruneConfig(0.5, windows=((2, 0.4), (4, 0.2)))])
def test_steps_of_a_request_are_no_more_than_its_first_token(config):
    """Were a step counted in another one too, their sum could be more than the whole."""
    with StarVLM(refvlm.TEXT_MODEL, refvlm.MMPROJ, n_ctx=512, n_threads=1) as vlm:
        ms = dict(vlm.read_prompt("what number is shown?", refvlm.DEMO_IMAGE, config)[1].milliseconds)
    whole = ms.pop("first_token")
    assert {"preprocess", "encode", "vision_stage"} < set(ms)
    assert min(ms.values()) >= 0 and sum(ms.values()) <= whole
