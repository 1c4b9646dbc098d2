import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.run import stopwatch


@given(
    st.lists(
        st.tuples(st.sampled_from(["open", "close"]), st.sampled_from(stopwatch.ACCOUNTS), st.floats(0, 1e3)),
        max_size=20,
    )
)
def test_the_accounts_add_up_to_the_wall_time(events):
    now = [100.0]
    watch = stopwatch.Stopwatch(clock=lambda: now[0])
    expected = dict.fromkeys(stopwatch.ACCOUNTS, 0.0)
    entered = []
    for kind, name, passed in events:
        if kind == "open":
            account = watch.account(name)
            account.__enter__()
            entered.append((name, account))
        elif entered:
            entered.pop()[1].__exit__(None, None, None)
        now[0] += passed
        expected[entered[-1][0] if entered else "other"] += passed
    assert watch.seconds() == pytest.approx(expected)
    assert sum(watch.seconds().values()) == pytest.approx(now[0] - 100.0)


def test_the_stopwatch_counts_on_and_closes_its_account_on_an_error():
    now = [0.0]
    watch = stopwatch.Stopwatch({"compute": 10.0}, clock=lambda: now[0])
    watch.add("restart", 2.0)
    with contextlib.suppress(KeyError), watch.account("compute"):
        now[0] = 5.0
        raise KeyError
    now[0] = 6.0
    assert watch.seconds() == dict.fromkeys(stopwatch.ACCOUNTS, 0.0) | {"compute": 15.0, "restart": 2.0, "other": 1.0}
    with pytest.raises(ValueError, match="input, compute"), watch.account("lunch"):
        pass


@given(st.lists(st.floats(2e-6, 8e4), min_size=1, max_size=200), st.floats(0, 1))
def test_quantiles_are_right_to_half_a_per_cent(durations, fraction):
    times = stopwatch.StepTimes()
    for seconds in durations:
        times.add(seconds)
    exact = np.quantile(durations, fraction, method="inverted_cdf")
    assert times.quantile(fraction) == pytest.approx(exact, rel=0.0051)


def test_quantiles_of_nothing_and_of_the_extremes():
    times = stopwatch.StepTimes()
    assert times.summary() == {"p50": None, "p95": None}
    times.add(0.0)
    times.add(1e9)
    assert times.quantile(0) == pytest.approx(1e-6, rel=0.01)
    assert times.quantile(1) == pytest.approx(88e3, rel=0.01)
    with pytest.raises(ValueError, match="fraction"):
        times.quantile(95)
