"""Arrays as a source, and the helpers that all sources share."""

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.data.sources import source as sources
from jaxdist.data.sources.source import ArraySource, checked_index, fingerprint_array, fingerprint_text


@given(size=st.integers(0, 20), index=st.integers(-30, 30))
def test_indices_are_those_of_a_list(size, index):
    try:
        expected = list(range(size))[index]
    except IndexError:
        with pytest.raises(IndexError, match=f"There is no example {index}: the source has {size}"):
            checked_index(index, size)
    else:
        assert checked_index(np.int64(index), size) == expected


@given(ids=st.lists(st.integers(0, 6), min_size=1, max_size=9))
def test_many_examples_at_once_are_the_examples_one_by_one(ids):
    source = ArraySource({"x": np.arange(14).reshape(7, 2), "label": np.arange(7, dtype=np.int8)})
    stacked = source.__getitems__(ids)
    for row, index in enumerate(ids):
        for name, value in source[index].items():
            np.testing.assert_array_equal(stacked[name][row], value)
            assert stacked[name].dtype == value.dtype
    assert all(not np.shares_memory(stacked[name], array) for name, array in source.arrays.items())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "at least one array"),
        ({"x": np.zeros(3), "y": np.zeros(2)}, r"got the sizes \{'x': 3, 'y': 2\}"),
        ({"x": np.float32(1)}, r"got the sizes \{'x': None\}"),
        ({"x": np.array(["a"], object)}, "'x' holds Python objects"),
        ({"x": [[1], [2, 3]]}, "'x' cannot become an array of numbers"),
        ({"x": scipy.sparse.eye(2)}, "'x' holds Python objects.*toarray"),
        ({0: np.zeros(2)}, "Names of fields are texts; got 0"),
        (np.zeros(2), "takes arrays by field"),
        ({"x": np.ma.masked_array([1, 2], [0, 1])}, "'x' has 1 masked elements"),
    ],
)
def test_arrays_that_are_no_examples_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        ArraySource(arrays)


@pytest.mark.torch
def test_a_tensor_that_asks_for_its_gradient_is_refused():
    import torch

    with pytest.raises(ValueError, match="'x' cannot become an array of numbers"):
        ArraySource({"x": torch.ones(2, requires_grad=True)})


def test_labels_out_of_range_are_refused_at_the_start():
    labels = np.array([0, 1, 5, 9])
    with pytest.raises(ValueError, match=r"example 2 has label 5, and so have 2 examples.*0 to 4"):
        ArraySource({"label": labels}, num_classes={"label": 5})
    with pytest.raises(ValueError, match="whole numbers"):
        ArraySource({"label": labels / 2}, num_classes={"label": 5})


def test_equal_data_have_equal_fingerprints_and_any_change_another():
    def fingerprint(**arrays):
        return ArraySource(arrays).fingerprint()

    x, label = np.arange(6, dtype=np.float32), np.arange(6)
    base = fingerprint(x=x, label=label)
    assert fingerprint(label=label.copy(), x=x[::-1][::-1]) == base
    changed = x.copy()
    changed[3] += 1
    others = [
        fingerprint(x=changed, label=label), fingerprint(x=x.astype(np.float64), label=label),
        fingerprint(x=x.reshape(6, 1), label=label), fingerprint(y=x, label=label), fingerprint(x=x),
    ]  # fmt: skip
    assert len({base, *others}) == 6


def test_a_large_array_is_sampled_from_its_first_row_to_its_last(monkeypatch):
    monkeypatch.setattr(sources, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(sources, "_SAMPLE_BYTES", 64)
    array = np.zeros((4000, 8), np.int64)
    base = fingerprint_array(array)
    for row in (0, -1):
        changed = array.copy()
        changed[row] = 1
        assert fingerprint_array(changed) != base
    assert fingerprint_array(array[:-1]) != base


def test_parts_of_a_fingerprint_stay_apart():
    assert fingerprint_text("a", "bc", "d") != fingerprint_text("a", "b", "cd")
    assert fingerprint_text("a", 1).startswith("a:")
