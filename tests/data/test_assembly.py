import jax
import ml_dtypes
import numpy as np
import pytest

from jaxdist import data
from jaxdist.data import ArraySource, CorruptExample
from jaxdist.data.assembly import (
    BadExampleError,
    BatchBuffer,
    ExampleError,
    Made,
    Recipe,
    Result,
    copy_into,
    example_random,
    make_example,
    make_rows,
    own_arrays,
    split_evenly,
    with_mask,
)
from jaxdist.data.sources.source import COUNTS

SOURCE = ArraySource({"id": np.arange(5), COUNTS: np.array([1, 0, 1, 1, 1])})


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("width", [1, 5, 8])
def test_a_mirrored_image_is_copied_as_it_is(width, channels):
    image = np.random.default_rng(0).integers(0, 255, (4, width, channels), np.uint8)
    target = np.empty_like(image)
    copy_into(target, image[:, ::-1, ::-1])
    np.testing.assert_array_equal(target, image[:, ::-1, ::-1])


def test_parts_are_ranges_of_nearly_one_size():
    assert split_evenly(7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert split_evenly(2, 5) == [(0, 1), (1, 2)]


def test_the_mask_of_a_batch_is_of_padding_bad_rows_and_examples():
    made = Made({"x": np.zeros(4), COUNTS: np.array([1, 1, 0, 1])}, {3: "bad"})
    assert with_mask(made, np.float32([1, 0, 1, 1]))["mask"].tolist() == [1, 0, 0, 0]


def test_a_field_named_like_the_packages_own_mask_is_refused():
    with pytest.raises(ValueError, match="Rename it"):
        with_mask(Made({"x": np.zeros(2), "mask": np.ones(2)}, {}), np.ones(2, np.float32))


def test_an_example_that_does_not_count_stays_so_through_a_function_that_drops_it():
    recipe = Recipe(SOURCE, lambda example, random: {"x": example["id"] * 2}, 0, "raise")
    assert make_example(recipe, 0, 1) == {"x": 2, COUNTS: 0}
    own = Recipe(SOURCE, lambda example, random: {"x": example["id"], COUNTS: np.float32(1)}, 0, "raise")
    assert make_example(own, 0, 1)[COUNTS] == 1


def add_one(example, random=None):
    example["x"] += 1
    example["kept"] = np.float32(0)
    return example


class Remembered:
    """A data set that keeps what it has made, as many do."""

    def __init__(self, kind):
        self.items = [kind(number) for number in range(6)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def tensor(number):
    import torch

    return {"x": torch.full((2,), float(number))}


SHARED = {
    "rows of an array": lambda: ArraySource({"x": np.arange(12.0).reshape(6, 2)}),
    "arrays": lambda: data.MapSource(Remembered(lambda number: {"x": np.full(2, float(number))})),
    "tuples": lambda: data.MapSource(Remembered(lambda number: (np.full(2, float(number)),)), names=("x",)),
    "tensors": lambda: data.MapSource(Remembered(tensor)),
    "a stream": lambda: data.iterable_stream(
        Remembered(lambda number: {"x": np.full(2, float(number))}).items, sizes=6
    ),
}


@pytest.mark.parametrize("wrap", [lambda source: source, lambda source: data.Filtered(source, add_one, version="1")])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.torch] if kind == "tensors" else []) for kind in SHARED]
)
def test_what_a_users_function_writes_into_an_example_is_not_written_into_the_data(kind, wrap):
    plain, source = SHARED[kind](), wrap(SHARED[kind]())
    settings = {"global_batch_size": 4, "seed": 0, "num_epochs": 3, "shuffle": False}
    expected = [batch["x"] + 1 for batch, _ in data.Loader(plain, **settings)]
    for num_threads in (0, 2):
        found = data.Loader(source, **settings, example_fn=add_one, num_threads=num_threads)
        for (batch, _), rows in zip(found, expected, strict=True):
            np.testing.assert_array_equal(batch["x"], rows)
    np.testing.assert_array_equal(np.stack([source[i]["x"] for i in range(6)]), np.concatenate(expected[:2])[:6] - 1)


def test_a_filter_that_answers_nothing_is_refused():
    source = data.Filtered(ArraySource({"x": np.arange(3)}), lambda example: None, version="1")
    with pytest.raises(TypeError, match="returned None"):
        source[0]


def test_errors_say_which_example_it_was():
    def fail(example, random):
        raise CorruptExample("broken") if example["id"] == 2 else KeyError("x")

    recipe = Recipe(SOURCE, fail, 0, "raise")
    with pytest.raises(BadExampleError, match=r"Example 2 \(epoch 4\): broken"):
        make_example(recipe, 4, 2)
    with pytest.raises(ExampleError, match=r"Example 3 \(epoch 4\): KeyError"):
        make_example(recipe, 4, 3)


def test_rows_of_other_shapes_and_kinds_are_refused():
    buffer = BatchBuffer(2)
    buffer.write(0, 10, {"x": np.zeros(3)})
    with pytest.raises(ValueError, match="Example 11 has"):
        buffer.write(1, 11, {"x": np.zeros(2)})
    unfit = ["text", np.datetime64("2020-01-01"), np.zeros(2, "i4,f4"), np.zeros(2, "V3"), np.longdouble(1)]
    for example, message in (
        ({}, "has no fields"),
        *(({"x": np.asarray(x)}, "which no device can hold") for x in unfit),
    ):
        with pytest.raises(ValueError, match=message):
            BatchBuffer(1).write(0, 0, example)
    with pytest.raises(ValueError, match="'x' has 1 masked elements"):
        BatchBuffer(1).write(0, 0, {"x": np.ma.masked_array([1, 2], [0, 1])})
    empty = BatchBuffer(1)
    empty.bad[0] = "bad"
    assert empty.finish() == Made({}, {0: "bad"})


def test_randomness_is_of_seed_epoch_and_example():
    draws = {example_random(*name).random() for name in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 11, 1)]}
    assert len(draws) == 5
    assert example_random(0, 0, 0).random() in draws


@pytest.mark.parametrize("example_fn", [None, lambda example, random: dict(example)])
@pytest.mark.parametrize("dtype", [">i4", ">u2", ">f8", ">f2", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, "?"])
def test_numbers_of_every_byte_order_and_width_become_a_batch(dtype, example_fn):
    values = np.arange(6).reshape(3, 2).astype(dtype)
    made = make_rows(Recipe(ArraySource({"x": values}), example_fn, 0, "raise"), 0, np.array([2, 0]))
    assert made.arrays["x"].dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(made.arrays["x"].astype(float), values[[2, 0]].astype(float))
    jax.device_put(made.arrays)


X = np.arange(48, dtype=np.float32).reshape(24, 2)
FILLED = {
    "the same array": lambda size: np.empty((size, 2), np.float32),
    "a view": lambda size: np.empty((99, 2), np.float32)[:size],
    "another view": lambda size: np.empty((size, 4), np.float32)[:, ::2],
    "big-endian": lambda size: np.empty((size, 2), ">f4"),
}


class _Filling:
    """A source that fills its own arrays in turn, one with each batch, and may keep the dict that it returns."""

    def __init__(self, make, num_arrays=1, keeps_dict=False):
        self._made = [{"x": make(8)} for _ in range(num_arrays)]
        self._turn, self._keeps_dict = 0, keeps_dict

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return {"x": X[index]}

    def fill(self, values):
        made = self._made[self._turn]
        self._turn = (self._turn + 1) % len(self._made)
        made["x"][: len(values)] = values
        array = made["x"] if len(values) == 8 else made["x"][: len(values)]
        return made if self._keeps_dict else {"x": array}

    def __getitems__(self, ids):
        return self.fill(X[ids])

    def fingerprint(self):
        return "filling"


@pytest.mark.parametrize("of_batches", [True, False], ids=["__getitems__", "batch_fn"])
@pytest.mark.parametrize("settings", [{}, {"num_arrays": 3}, {"keeps_dict": True}], ids=str)
@pytest.mark.parametrize("make", FILLED.values(), ids=FILLED)
def test_a_batch_stays_as_it_is_whatever_arrays_the_user_fills_for_the_next(make, settings, of_batches):
    filling = _Filling(make, **settings)
    changes = {} if of_batches else {"batch_fn": lambda batch, random, rows: {**batch, **filling.fill(batch["x"])}}
    source = filling if of_batches else ArraySource({"x": X})
    loader = data.Loader(source, global_batch_size=8, seed=0, shuffle=False, num_epochs=1, **changes)
    batches = [batch for batch, _ in loader]
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in batches]), X)


def test_what_a_user_makes_anew_is_not_copied():
    def own(function, given=()):
        made = []
        return own_arrays(Result.of(lambda: function(made)), given)["x"], made

    def new(made):
        array = np.ones(3)
        made.append(array.ctypes.data)
        return {"x": array}

    array, (address,) = own(new)
    assert array.ctypes.data == address
    given = np.ones(3)
    assert own(lambda made: {"x": given}, [given])[0] is given
    assert own(lambda made: {"x": given})[0] is not given


def test_masked_elements_of_a_whole_batch_are_refused():
    masked = np.ma.array(np.ones((3, 2)), mask=np.eye(3, 2))
    with pytest.raises(ValueError, match="Field 'x' has 2 masked elements"):
        own_arrays(Result.of(lambda: {"x": masked}))


class _Whole:
    """A source of whole batches, one of whose examples is corrupt, and one of another shape."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == 4:
            raise CorruptExample("it is broken")
        return {"x": np.zeros(2 if index == 5 else 1)}

    def __getitems__(self, ids):
        return {"x": np.stack([self[index]["x"] for index in ids])}


def test_what_is_wrong_in_a_batch_that_is_read_whole_is_named():
    recipe = Recipe(_Whole(), None, 0, "raise")
    assert recipe.whole
    assert make_rows(recipe, 2, np.array([0, 1])).arrays["x"].shape == (2, 1)
    with pytest.raises(BadExampleError, match=r"Example 4 \(epoch 2\): it is broken"):
        make_rows(recipe, 2, np.array([0, 4, 1]))
    with pytest.raises(ValueError, match="same shape"):
        make_rows(recipe, 2, np.array([0, 5]))
