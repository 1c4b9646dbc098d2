"""What a sweep tries: values and ranges as users write them, grids, and draws that stay inside and repeat."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.errors import ConfigError
from jaxdist.run.sweeps import space


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a.b=1e-3,2", space.Choices("a.b", ("1e-3", "2"))),
        ("writers=(jsonl,csv),(jsonl,)", space.Choices("writers", ("(jsonl,csv)", "(jsonl,)"))),
        ("x=1:3", space.Range("x", 1, 3, log=False, whole=True)),
        ("x=1.0:3", space.Range("x", 1, 3, log=False, whole=False)),
        ("x=1e-5:1e-2:log", space.Range("x", 1e-5, 1e-2, log=True, whole=False)),
        ("x=-1:1", space.Range("x", -1, 1, log=False, whole=True)),
        ("init_from=gs://a/b", space.Choices("init_from", ("gs://a/b",))),
    ],
)
def test_what_a_user_writes_is_values_or_a_range(text, found):
    assert space.parse([text]) == [found]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["width"], "takes NAME=VALUES"),
        (["=1"], "takes NAME=VALUES"),
        (["a="], "takes NAME=VALUES"),
        (["a=1,,2"], "is empty"),
        (["a=3:3"], "a number to a larger one"),
        (["a=1:1e999"], "a number to a larger one"),
        (["a=0:1:log"], "begins above 0"),
        (["a=1", "a=2"], "names each setting once"),
    ],
)
def test_anything_else_is_refused(texts, message):
    with pytest.raises(ConfigError, match=message):
        space.parse(texts)


def test_a_grid_has_every_combination_and_changes_what_shares_programs_fastest():
    settings = space.parse(["rate=1,2", "width=3,4,5"])
    found = space.grid(settings, last=("rate",))
    assert [list(trial) for trial in found] == [["rate", "width"]] * 6  # in the order they were named
    assert [tuple(trial.values()) for trial in found] == [
        ("1", "3"), ("2", "3"), ("1", "4"), ("2", "4"), ("1", "5"), ("2", "5")
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="width has a range"):
        space.grid(space.parse(["width=3:4"]))


RANGES = st.tuples(st.floats(1e-8, 1e4), st.floats(1.0001, 1e4), st.booleans())


@given(RANGES, st.integers(0, 5))
def test_what_is_drawn_is_in_the_range(range_, seed):
    low, factor, log = range_
    setting = space.Range("x", float(f"{low:.4g}"), float(f"{low * factor:.6g}"), log=log, whole=False)
    for text in (setting.draw(np.random.default_rng(seed)), *setting.ends):
        assert setting.low * (1 - 1e-9) <= float(text) <= setting.high * (1 + 1e-9)


def test_draws_of_a_logarithmic_range_are_as_likely_in_every_decade_and_whole_numbers_all_come_up():
    random = np.random.default_rng(0)
    drawn = [float(space.Range("x", 1e-4, 1.0, log=True, whole=False).draw(random)) for _ in range(2000)]
    decades = collections.Counter(int(np.floor(np.log10(min(value, 0.999)))) for value in drawn)
    assert all(400 < decades[decade] < 600 for decade in (-4, -3, -2, -1))
    whole = collections.Counter(space.Range("x", 2, 4, log=False, whole=True).draw(random) for _ in range(900))
    assert set(whole) == {"2", "3", "4"}
    assert min(whole.values()) > 220  # the ends as often as what is between


@given(st.integers(1, 6), st.integers(0, 3))
def test_draws_differ_and_more_of_them_begin_with_the_same(count, seed):
    settings = space.parse(["rate=1e-5:1:log", "width=1,2"])
    found = space.draws(settings, count, seed)
    assert len({tuple(trial.items()) for trial in found}) == count
    assert space.draws(settings, count + 2, seed)[:count] == found


def test_more_draws_than_there_are_trials_are_refused():
    assert len(space.draws(space.parse(["a=1,2"]), 2, 0)) == 2
    with pytest.raises(ConfigError, match="there are not 3 of them: 2"):
        space.draws(space.parse(["a=1,2"]), 3, 0)
