import jax
import numpy as np
import optax
import pytest

import jaxdist
from jaxdist import data, stop
from jaxdist.data.streams import foreign_batches


def mesh(devices=2):
    return jaxdist.make_mesh({"data": -1}, devices=jax.devices()[:devices])


def rows(*counts):
    numbers = np.split(np.arange(sum(counts), dtype=np.float32), np.cumsum(counts)[:-1])
    return [{"x": part[:, None], "y": 2 * part} for part in numbers]


def test_batches_have_a_mask_and_the_last_is_padded():
    (first, _), (last, place) = data.batches(rows(4, 3), mesh())
    np.testing.assert_array_equal(first["mask"], np.ones(4))
    np.testing.assert_array_equal(last["mask"], [1, 1, 1, 0])
    np.testing.assert_array_equal(last["x"][:, 0], [4, 5, 6, 4])
    assert len(first["x"].sharding.device_set) == 2
    assert (place.epoch, place.position, place.num_examples) == (0, 7, foreign_batches.UNKNOWN)


def test_fit_learns_from_a_generator_and_each_example_counts_once():
    def init_fn(key):
        return {"w": jax.numpy.zeros(1)}

    def loss_fn(params, batch, key):
        error = batch["x"] @ params["w"] - batch["y"]
        return jaxdist.masked_mean(error**2, batch["mask"]), {}

    optimizer = optax.sgd(0.01)
    state = jaxdist.create_state(init_fn, optimizer, mesh=mesh(), seed=0)
    step = jaxdist.data_parallel_step(loss_fn, optimizer, mesh())
    made = (batch for batch in rows(4, 3))
    result = jaxdist.fit(step, state, data.batches(made, mesh()), stop=stop.max_steps(9))
    assert (result.end_reason, result.progress.step, result.progress.examples_seen) == ("max_epochs", 2, 7)
    w = 0.0
    for batch in rows(4, 3):
        w -= 0.01 * float(np.mean(2 * (batch["x"][:, 0] * w - batch["y"]) * batch["x"][:, 0]))
    np.testing.assert_allclose(result.state.params["w"], [w], rtol=1e-5)


class Loader(list):
    """As torch's: it can be iterated again, and knows its data set."""

    dataset = range(7)


def test_epochs_are_counted_where_their_length_is_known():
    made = Loader((batch["x"], batch["y"]) for batch in rows(4, 3))
    places = [place for _, place in data.batches(made, mesh(), fields=("x", "y"), num_epochs=2)]
    assert [(place.epoch, place.position, place.num_examples) for place in places] == [
        (0, 4, 7),
        (0, 7, 7),
        (1, 4, 7),
        (1, 7, 7),
    ]


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        ([(1, 2)], {}, "got a tuple of 2"),
        ([([1.0], [1.0], [1.0])], {"fields": ("x", "y")}, "tuple of 3"),
        ([{"x": np.ones(2), "y": np.ones(3)}], {}, "lengths"),
        ([{"x": np.ones(2), "mask": np.ones(2)}], {}, "Rename yours"),
        (rows(2, 4), {}, "larger than the first"),
        (rows(3), {}, "multiple|divi"),
        ([*rows(2), {"x": np.ones((2, 1)), "y": np.array([1, 2**40])}], {}, "'y' of example 3 holds 1099511627776"),
        ([{"x": np.array([1e39, 1.0])}], {}, "'x' of example 0 holds 1e.39.*would become infinite"),
        ([{"x": np.ma.array([1.0, 2.0], mask=[0, 1])}], {}, "'x' has 1 masked elements"),
        ([{"x": np.array(["a", "b"])}], {}, "'x' of example 0 has the dtype <U1"),
        (iter(rows(2)), {"num_epochs": 2}, "iterated once"),
    ],
    ids=[
        *("no names", "other names", "ragged", "mask", "larger", "indivisible"),
        *("whole numbers", "floats", "masked", "texts", "generator"),
    ],
)
def test_what_is_no_batch_is_refused(made, options, message):
    with pytest.raises(ValueError, match=message):
        list(data.batches(made, mesh(), **options))


def test_numbers_of_any_byte_order_are_taken():
    ((batch, _),) = data.batches([{"x": np.array([1.5, 2.5], ">f8")}], mesh())
    np.testing.assert_array_equal(batch["x"], [1.5, 2.5])


@pytest.mark.torch
def test_a_dataloader_of_torch_feeds_fit():
    torch = pytest.importorskip("torch")
    x = torch.arange(7.0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:, None], 2 * x), batch_size=4)
    (first, _), (last, place) = data.batches(loader, mesh(), fields=("x", "y"))
    np.testing.assert_array_equal(first["y"], [0, 2, 4, 6])
    np.testing.assert_array_equal(last["mask"], [1, 1, 1, 0])
    assert place.num_examples == 7
