"""Settings that are numbers of something: whole and large enough, or refused by their names, never rounded."""

import numpy as np
import pytest

from jaxdist.data import (
    ArraySource,
    BlockShuffled,
    Bucketed,
    Dealt,
    Loader,
    MapSource,
    Mixed,
    Packed,
    StreamSource,
    augmentation,
    csv_source,
    folds,
    held_out,
)

SOURCE = ArraySource({"x": np.arange(10), "y": np.arange(10) % 2})
WORDS = MapSource([{"tokens": np.arange(3, dtype=np.int32)}] * 4)
LENGTHS = np.full(4, 3)


def load(**settings):
    return list(Loader(SOURCE, **{"global_batch_size": 4, "seed": 0, "num_epochs": 1} | settings))


def open_shard(shard):
    return ({"x": np.int32(each)} for each in range(9))


SETTINGS = {
    "block_size": [BlockShuffled, lambda n: Bucketed(WORDS, LENGTHS, boundaries=(4,), block_size=n)],
    "num_folds": [lambda n: folds(SOURCE, n, seed=0)],
    "seed": [lambda n: held_out(SOURCE, 0.5, seed=n), lambda n: load(seed=n)],
    "global_batch_size": [lambda n: load(global_batch_size=n)],
    "num_epochs": [lambda n: load(num_epochs=n)],
    "num_threads": [lambda n: load(num_threads=n)],
    "num_workers": [lambda n: load(num_workers=n)],
    "read_ahead": [lambda n: load(read_ahead=n)],
    "sizes": [lambda n: Dealt((n, 3)), lambda n: Mixed((n, 3), (1, 1))],
    "classes": [lambda n: ArraySource({"y": np.arange(2)}, num_classes={"y": n})],
    "boundary": [lambda n: Bucketed(WORDS, LENGTHS, boundaries=(n, 4))],
    "row_length": [lambda n: Packed(WORDS, LENGTHS, row_length=n)],
    "num_shards": [lambda n: StreamSource(open_shard, num_shards=n, examples_per_epoch=3)],
    "window": [lambda n: StreamSource(open_shard, window=n, sizes=9)],
    "skip_lines": [lambda n: csv_source("none.csv", skip_lines=n)],
    "size": [augmentation.CutOut],
}


@pytest.mark.parametrize("value", [2.5, 3.0, np.float32(3), "3", True, -1, [3]])
@pytest.mark.parametrize(("name", "make"), [(name, make) for name, each in SETTINGS.items() for make in each])
def test_what_is_no_number_of_anything_is_refused_by_the_name_of_the_setting(name, make, value):
    with pytest.raises(ValueError, match=rf"{name}.* is a whole number of at least \d; got "):
        make(value)


@pytest.mark.parametrize("make", [BlockShuffled, SETTINGS["sizes"][0], SETTINGS["sizes"][1]])
def test_a_number_of_numpy_is_that_number(make):
    assert make(np.int64(3)) == make(3)
    assert make(np.int64(3)).version == make(3).version


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "3", [3]])
def test_a_time_limit_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="timeout_seconds is finite and above 0"):
        load(timeout_seconds=value)


@pytest.mark.parametrize("value", [0, 1, 2.5, float("nan"), "0.5", None])
def test_a_fraction_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="held out is a number between 0 and 1"):
        held_out(SOURCE, value, seed=0)
