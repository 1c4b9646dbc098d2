import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxdist.data import order

sizes = st.integers(1, 200) | st.integers(201, 5000)


@hypothesis.given(sizes, st.integers(-(2**40), 2**70), st.integers(0, 1000))
def test_shuffled_order_is_a_permutation(num_examples, seed, epoch):
    ids = order.Shuffled()(num_examples, seed, epoch, 0, num_examples)
    assert ids.dtype == np.int64
    assert sorted(ids) == list(range(num_examples))


@pytest.mark.parametrize("num_examples", range(1, 201))
def test_every_size_to_200_is_a_permutation(num_examples):
    ids = order.Shuffled()(num_examples, 0, 0, 0, num_examples)
    assert sorted(ids) == list(range(num_examples))


@hypothesis.given(sizes, st.data())
def test_any_part_of_the_order_is_found_alone(num_examples, data):
    start = data.draw(st.integers(0, num_examples))
    stop = data.draw(st.integers(start, num_examples))
    for scheme in (order.Shuffled(), order.Sequential()):
        np.testing.assert_array_equal(
            scheme(num_examples, 3, 1, start, stop), scheme(num_examples, 3, 1, 0, num_examples)[start:stop]
        )


@hypothesis.given(st.integers(1, 2**62), st.data())
def test_inverse_finds_the_position(size, data):
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    permutation = order.Permutation.make(size, "test", 5)
    ids = permutation(positions)
    assert ((ids >= 0) & (ids < size)).all()
    np.testing.assert_array_equal(permutation.inverse(ids), positions)


def test_epochs_and_seeds_differ():
    def ids(seed, epoch):
        return order.Shuffled()(1000, seed, epoch, 0, 1000).tolist()

    seen = [ids(seed, epoch) for seed in range(-1, 4) for epoch in range(4)]
    assert len({tuple(one) for one in seen}) == len(seen)
    # Not even shifted: neighbours of one order are not neighbours of another more often than chance has it.
    pairs = [set(itertools.pairwise(one)) for one in seen]
    assert max(len(a & b) for i, a in enumerate(pairs) for b in pairs[:i]) < 12


def test_every_example_is_equally_likely_at_every_position():
    for size in (3, 10, 100):
        ids = np.stack([order.Shuffled()(size, seed, 0, 0, size) for seed in range(4000)])
        counts = np.stack([np.bincount(column, minlength=size) for column in ids.T])
        expected = 4000 / size
        # The chi-square statistic has mean (size - 1)**2 and variance about twice that.
        chi_square = ((counts - expected) ** 2 / expected).sum()
        freedom = (size - 1) ** 2
        assert abs(chi_square - freedom) < 6 * np.sqrt(2 * freedom)


def test_neighbours_are_unrelated():
    """The distance of two neighbouring positions is spread like that of two random ids."""
    size = 4096
    ids = order.Shuffled()(size, 1, 0, 0, size)
    distance = np.abs(np.diff(ids))
    assert abs(distance.mean() / (size / 3) - 1) < 0.05


def test_the_scheme_has_not_changed():
    """If this fails, stored positions would be misread: raise ORDER_VERSION, then renew these numbers."""
    assert order.ORDER_VERSION == 1
    assert order.Shuffled()(1000, 7, 3, 500, 506).tolist() == GOLDEN
    assert order.Shuffled().version == "shuffled-1"


GOLDEN = [498, 463, 379, 705, 706, 1]


@pytest.mark.parametrize(
    ("start", "stop", "epoch"),
    [(-1, 3, 0), (4, 3, 0), (0, 11, 0), (0, 3, -1)],
    ids=["start", "swapped", "stop", "epoch"],
)
def test_positions_outside_the_epoch_are_refused(start, stop, epoch):
    with pytest.raises(ValueError, match=r"start|epoch"):
        order.Shuffled()(10, 0, epoch, start, stop)
