import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.data import ArraySource, Filtered, Loader, Subset, balanced, folds, held_out


def numbers(count):
    return ArraySource({"id": np.arange(count)})


def ids_of(source):
    return [int(source[index]["id"]) for index in range(len(source))]


def test_a_subset_has_the_examples_in_the_order_asked_for():
    subset = Subset(numbers(10), [7, 0, 7])
    assert ids_of(subset) == [7, 0, 7]
    assert int(subset[-1]["id"]) == 7
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(subset)).__getitems__([1, 2])["id"], [0, 7])
    assert subset.location(0) == "example 7 of the whole"
    assert not hasattr(Subset(Filtered(numbers(3), bool, version="all"), [0]), "__getitems__")
    assert subset.fingerprint() == Subset(numbers(10), np.array([7, 0, 7], np.int32)).fingerprint()
    assert subset.fingerprint() != Subset(numbers(10), [7, 0, 6]).fingerprint()
    assert subset.fingerprint() != Subset(numbers(11), [7, 0, 7]).fingerprint()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([10], "no example 10: the source has 10"),
        ([-1], "no example -1"),
        ([True, False], "np.flatnonzero"),
        (3, "list"),
    ],
)
def test_a_choice_that_is_none_is_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        Subset(numbers(10), ids)


def test_a_subset_keeps_its_ids_when_the_callers_array_changes():
    ids = np.array([7, 0])
    subset = Subset(numbers(10), ids)
    ids[:] = 1
    assert ids_of(subset) == [7, 0]


@pytest.mark.parametrize("labels", [[0.0, np.nan, 1.0, 0.0], ["a", None, "b", "a"]])
@pytest.mark.parametrize(
    "divide",
    [
        lambda source, labels: held_out(source, 0.5, seed=0, labels=labels),
        lambda source, labels: folds(source, 2, seed=0, labels=labels),
        balanced,
    ],
)
def test_an_example_without_a_label_is_named(divide, labels):
    with pytest.raises(ValueError, match=r"example 1 has (nan|None)"):
        divide(numbers(4), labels)


def test_weights_of_classes_may_be_numpy_numbers():
    labels = [0, 1, 1, 0]
    found, same = (balanced(numbers(4), labels, weights=weights)[1] for weights in (np.array([1, 2]), (1, 2)))
    assert found == same
    assert {type(weight) for weight in found.weights} == {int}


@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=60), st.integers(0, 2**63), st.floats(0.05, 0.95))
def test_what_is_held_out_is_the_same_share_of_every_class(labels, seed, fraction):
    source, labels = numbers(len(labels)), np.array(labels)
    counts = {name: round(fraction * np.count_nonzero(labels == name)) for name in set(labels.tolist())}
    if sum(counts.values()) in (0, len(labels)):
        with pytest.raises(ValueError, match="leaves none"):
            held_out(source, fraction, seed=seed, labels=labels)
        return
    train, held = held_out(source, fraction, seed=seed, labels=labels)
    assert sorted([*ids_of(train), *ids_of(held)]) == list(range(len(labels)))
    assert {name: np.count_nonzero(labels[held.ids] == name) for name in counts} == counts
    assert ids_of(held_out(source, fraction, seed=seed, labels=labels)[1]) == ids_of(held)


def test_seeds_hold_out_different_examples_and_each_equally_often():
    times = np.zeros(20)
    for seed in range(2000):
        times[held_out(numbers(20), 0.25, seed=seed)[1].ids] += 1
    assert abs(times - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


@given(st.lists(st.integers(0, 2), min_size=3, max_size=50), st.integers(2, 3), st.integers(0, 99))
def test_each_example_is_held_out_by_one_fold_of_equal_size(labels, num_folds, seed):
    made = folds(numbers(len(labels)), num_folds, seed=seed, labels=labels)
    held = [ids_of(part) for _, part in made]
    assert sorted(itertools.chain(*held)) == list(range(len(labels)))
    assert all(sorted(ids_of(train) + ids) == list(range(len(labels))) for (train, _), ids in zip(made, held))
    assert max(map(len, held)) - min(map(len, held)) <= 1
    for label in set(labels):
        sizes = [sum(labels[id_] == label for id_ in ids) for ids in held]
        assert max(sizes) - min(sizes) <= 1


def test_a_rare_class_is_drawn_as_often_as_a_common_one():
    labels = np.array([0] * 90 + [1] * 10)
    source, order = balanced(numbers(100), labels)
    loader = Loader(source, shuffle=order, global_batch_size=20, seed=0, num_epochs=1)
    drawn = np.concatenate([batch["id"] for batch, _ in loader])
    assert np.bincount(labels[drawn]).tolist() == [50, 50]
    assert set(np.bincount(drawn[drawn >= 90])[90:]) == {5}
    assert len(set(drawn[drawn < 90].tolist())) == 50
    assert balanced(numbers(100), labels, [3, 1])[1].weights == (3, 1)


def test_bad_divisions_are_refused():
    for message, call in {
        "between 0 and 1; got 1.5": lambda: held_out(numbers(4), 1.5, seed=0),
        r"shape \(4,\); got \(3,\)": lambda: folds(numbers(4), 2, seed=0, labels=[0, 1, 2]),
        "between 2 and the number of examples, 4; got 5": lambda: folds(numbers(4), 5, seed=0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
