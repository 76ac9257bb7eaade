"""Seconds by name, by a clock that advances one second each time it is read."""

import itertools

import pytest

from rnp.clock import Clock, timed


@pytest.fixture(autouse=True)
def ticks(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("rnp.clock.now", lambda: float(next(clock)))


def test_equal_names_are_added_up():
    clock = Clock()
    for name in ("recover", "prune", "recover"):
        with clock(name):
            pass
    assert clock.seconds == {"recover": 2.0, "prune": 1.0}
    assert set(clock.cpu) == {"recover", "prune"}
    assert all(seconds >= 0 for seconds in clock.cpu.values())


def test_interrupted_work_has_no_seconds():
    clock = Clock()
    with pytest.raises(RuntimeError), clock("unlearn"):
        raise RuntimeError
    assert clock.seconds == {} == clock.cpu


def test_a_function_is_timed():
    assert timed(lambda: "result") == ("result", 1.0)
