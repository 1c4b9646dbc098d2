"""Map-style data sets of other libraries as sources."""

import numpy as np
import pandas
import pytest
from PIL import Image

from jaxdist.data import ArraySource, Loader
from jaxdist.data.sources.wrap import MapSource, as_source

IMAGE = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)


class Pairs:
    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return [self.values[index], self.values[index] + 1], self.values[index] % 2


def test_map_style_data_sets_are_wrapped():
    source = MapSource(Pairs([1, 2, 3]), names=("x", "label"))
    ((batch, _),) = Loader(source, global_batch_size=3, seed=0, shuffle=False, num_epochs=1)
    assert batch["x"].tolist() == [[1, 2], [2, 3], [3, 4]]
    assert batch["label"].tolist() == [1, 0, 1]
    assert source.fingerprint() == MapSource(Pairs([1, 2, 3]), names=("x", "label")).fingerprint()
    assert source.fingerprint() != MapSource(Pairs([1, 2, 4]), names=("x", "label")).fingerprint()
    named = MapSource(Pairs([1, 2, 4]), names=("x", "label"), fingerprint="v2")
    assert named.fingerprint() == MapSource(Pairs([5]), names=("x", "label"), fingerprint="v2").fingerprint()
    dicts = MapSource([{"a": Image.fromarray(IMAGE)}])
    np.testing.assert_array_equal(dicts[0]["a"], IMAGE)
    with pytest.raises(ValueError, match="2 values without names"):
        MapSource(Pairs([1]))[0]
    with pytest.raises(ValueError, match="generator can be iterated once only"):
        MapSource(x for x in range(3))


def test_loaders_take_map_style_data_sets_as_they_are():
    dicts = [{"x": [i, i + 1], "label": i % 2} for i in range(5)]
    loader = Loader(dicts, global_batch_size=5, seed=0, shuffle=False, num_epochs=1)
    assert next(iter(loader)).batch["label"].tolist() == [0, 1, 0, 1, 0]
    assert loader.start.fingerprint == MapSource(dicts).fingerprint()
    with pytest.raises(ValueError, match="2 values without names"):
        Loader(Pairs([1, 2]), global_batch_size=1, seed=0)


def test_a_source_is_wrapped_in_nothing():
    source = ArraySource({"x": np.arange(3)})
    assert as_source(source) is source


def test_the_fingerprint_of_a_data_set_that_has_one_is_taken():
    class Named(list):
        _fingerprint = "v1"

    items = [{"x": 1}, {"x": 2}]
    assert MapSource(Named(items)).fingerprint() == MapSource(Named(items[:1])).fingerprint()
    assert MapSource(Named(items)).fingerprint() != MapSource(items).fingerprint()
    assert MapSource(items).fingerprint() != MapSource(items[:1]).fingerprint()


def test_an_empty_data_set_is_a_source_of_nothing():
    assert len(MapSource([])) == 0


@pytest.mark.parametrize("table", [{"x": np.arange(3)}, pandas.DataFrame({"x": [1, 2]})])
def test_columns_by_name_are_no_examples_by_number(table):
    with pytest.raises(ValueError, match=r"Give it as data\.ArraySource\(columns\)"):
        MapSource(table)


def test_examples_with_fields_that_are_no_numbers_have_fingerprints():
    assert MapSource([{"x": None}]).fingerprint() != MapSource([{"x": 1}]).fingerprint()
