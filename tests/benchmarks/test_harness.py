"""What the benchmarks share."""

import pytest

from benchmarks import harness


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds):
        self.now += seconds

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(harness, "time", clock)
    return clock


def test_interleaved_gives_the_median_of_alternating_calls(clock):
    calls = []
    waits = {"quick": iter((1.0, 5.0, 2.0)), "slow": iter((20.0, 90.0, 40.0))}

    def side(name):
        calls.append(name)
        clock.sleep(next(waits[name]))

    seconds = harness.interleaved(
        {name: lambda name=name: side(name) for name in waits}, 3, warm=False
    )
    assert calls == ["quick", "slow"] * 3
    assert seconds == {"quick": 2.0, "slow": 40.0}


def test_settled_calls_are_timed_after_one_that_is_not(clock):
    # the first call of each turn is slow, as after another library's turn
    waits = iter((10.0, 1.0) * 2)
    seconds = harness.interleaved(
        {"only": lambda: clock.sleep(next(waits))}, 2, warm=False, settle=0.5
    )
    assert seconds == {"only": 1.0}
    assert clock.now == 2 * (0.5 + 10.0 + 1.0)


def test_interleaved_refuses_no_repeats():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        harness.interleaved({}, 0)
