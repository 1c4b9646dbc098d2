"""Images, histograms and tables as what writers take."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxdist.rundir import rich_values


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (2, 3, 3)])
def test_floats_and_bytes_become_the_same_image(shape):
    floats = np.linspace(0, 1, np.prod(shape)).reshape(shape)
    image = rich_values.Image(floats).to_bytes()
    assert (image.shape, image.dtype, image.min(), image.max()) == ((2, 3, 3), np.uint8, 0, 255)
    as_bytes = np.round(floats * 255).astype(np.uint8)
    np.testing.assert_array_equal(rich_values.Image(as_bytes).to_bytes(), image)


@pytest.mark.parametrize(
    "pixels", [np.zeros(3), np.zeros((2, 2, 4)), np.zeros((0, 2)), np.full((2, 2), 1.5), [[np.nan]]]
)
def test_what_is_no_image_is_refused(pixels):
    with pytest.raises(ValueError, match=r"[Aa]n image "):
        rich_values.Image(pixels).to_bytes()


@given(values=arrays.arrays(np.float32, st.integers(1, 200), elements=st.floats(-100, 100, width=32)))
def test_a_histogram_counts_each_finite_value_once(values):
    counts, edges = rich_values.Histogram(np.append(values, [np.nan, np.inf])).count()
    assert (counts.sum(), len(counts) + 1) == (len(values), len(edges))
    assert edges[0] <= values.min()
    assert edges[-1] >= values.max()


def test_a_histogram_of_nothing_is_refused():
    with pytest.raises(ValueError, match="needs a finite value"):
        rich_values.Histogram([np.nan]).count()


def test_a_table_is_markdown_and_its_rows_are_whole():
    table = rich_values.Table(("a", "b"), [(1, "x|y")])
    assert table.to_markdown() == "| a | b |\n| --- | --- |\n| 1 | x\\|y |"
    with pytest.raises(ValueError, match="needs 2 cells"):
        rich_values.Table(("a", "b"), [(1,)])
