"""Means and deviations by channel equal numpy's over all values, are stored, and normalise to 0 and 1."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.data import ArraySource, DataStatistics, Filtered, MapSource, Normalise, field_statistics
from jaxdist.rundir import record


@settings(max_examples=20)
@given(st.integers(0, 5), st.floats(-1e6, 1e6), st.floats(1e-3, 1e3))
def test_images_of_any_sizes_have_numpys_mean_and_deviation_of_each_channel(seed, middle, width):
    random = np.random.default_rng(seed)
    images = [middle + width * random.normal(size=(*random.integers(1, 5, 2), 3)) for _ in range(7)]
    found = field_statistics(MapSource([{"image": image} for image in images], fingerprint="x"), ("image",))["image"]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images])
    np.testing.assert_allclose(found.mean, pixels.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.std, pixels.std(axis=0), rtol=1e-7)
    assert found.count == len(pixels)


def test_columns_read_in_batches_are_those_read_one_by_one_and_become_0_and_1():
    random = np.random.default_rng(0)
    arrays = {"a": random.normal(5, 3, 600), "v": random.integers(0, 9, (600, 2)), "same": np.full(600, 7.0)}
    batches, single = ArraySource(arrays), MapSource([{n: a[i] for n, a in arrays.items()} for i in range(600)])
    found, other = (field_statistics(source, ("a", "v", "same")) for source in (batches, single))
    for name, array in arrays.items():
        np.testing.assert_allclose(found[name].mean, np.atleast_1d(array.mean(axis=0)), rtol=1e-12)
        np.testing.assert_allclose(found[name].std, np.atleast_1d(array.std(axis=0)), rtol=1e-9)
        np.testing.assert_allclose(other[name].mean, found[name].mean, rtol=1e-12)
    normalised = [found.normalise()(batches[i], random) for i in range(600)]
    values = np.array([[each["a"], each["same"]] for each in normalised])
    np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(values.std(axis=0), [1, 0], atol=1e-5)


def test_examples_that_do_not_count_are_left_out_and_sounds_have_one_mean():
    sounds = MapSource([{"audio": np.full(n, n, np.float32)} for n in (1, 2, 3)])
    kept = Filtered(sounds, lambda example: len(example["audio"]) < 3, version="1")
    assert field_statistics(kept, (), over_all=("audio",))["audio"].mean == pytest.approx((5 / 3,))


def double(example, random):
    return {"x": example["x"] * 2}


def test_what_was_computed_is_read_from_its_file_until_the_data_or_the_settings_change(tmp_path):
    path, data = tmp_path / "kept" / "statistics.json", {"x": np.arange(4.0)}
    first = field_statistics(ArraySource(data), ("x",), path=path)
    changed = json.loads(path.read_text())
    changed["fields"]["x"]["mean"] = [99.0]
    path.write_text(json.dumps(changed))
    assert field_statistics(ArraySource(data), ("x",), path=path)["x"].mean == (99.0,)  # it was not computed again
    assert field_statistics(ArraySource(data), ("x",), path=path, example_fn=double)["x"].mean == (3.0,)
    other = field_statistics(ArraySource({"x": np.arange(4.0) + 1}), ("x",), path=path)
    assert other["x"].mean == (2.5,)
    assert DataStatistics.from_json(json.loads(path.read_text())["fields"]) == other
    assert first["x"] == ((1.5,), (np.arange(4.0).std(),), 4)


def test_the_run_record_holds_the_numbers():
    found = field_statistics(ArraySource({"image": np.arange(8.0).reshape(4, 2)}), ("image",))
    assert isinstance(found.normalise(), Normalise)
    assert json.loads(json.dumps(record.plain(found.normalise())))["mean"] == [3.0, 4.0]


@pytest.mark.parametrize(
    ("examples", "fields", "message"),
    [
        ([{"x": np.zeros((2, 3))}, {"x": np.zeros((2, 4))}], ("x",), "last dim of field 'x' is 4 in example 1"),
        ([{"x": np.zeros(3)}], ("y",), "no field 'y'"),
        ([{"x": np.zeros(3, complex)}], ("x",), "complex128"),
        ([{"x": np.zeros((0, 3))}], ("x",), "no values"),
        ([{"x": 1.0}, {"x": 2.0}, {"x": math.nan}], ("x",), "'x' of example 2 holds a number that is not finite"),
    ],
)
def test_what_has_no_statistics_is_named(examples, fields, message):
    with pytest.raises(ValueError, match=message):
        field_statistics(MapSource(examples), fields)


@given(st.floats(-1e9, 1e9), st.lists(st.integers(-50, 50), min_size=1, max_size=9))
def test_columns_far_from_0_keep_their_differences_and_constant_ones_become_0(middle, offsets):
    """Times in seconds, as float32, would all be one number."""
    source = ArraySource({"x": middle + np.array(offsets, np.float64)})
    normalise = field_statistics(source, ("x",)).normalise()
    found = np.array([normalise(source[number], None)["x"] for number in range(len(source))])
    values = source.arrays["x"]
    expected = (values - values.mean()) / (values.std() if len(set(values.tolist())) > 1 else np.inf)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert found.dtype == np.float32


def test_an_example_that_has_no_mean_is_named_in_a_source_that_is_read_whole():
    values = np.ones((700, 3))
    values[600, 1] = np.inf
    with pytest.raises(ValueError, match="'x' of example 600 holds"):
        field_statistics(ArraySource({"x": values}), ("x",))
