import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist import data, testing
from jaxdist.spmd import evaluate
from jaxdist.spmd.mesh import make_mesh
from jaxdist.spmd.metrics import Mean, masked_mean

NUM_FEATURES = 5
PARAMS = {"w": np.linspace(-1, 1, NUM_FEATURES).astype(np.float32), "b": np.float32(0.25)}
DEVICES = (1, 2, 4, 8)


def example_values(params, x, y):
    outputs = jnp.tanh(x @ params["w"]) + params["b"]
    return jnp.square(outputs - y), outputs > y


def eval_fn(params, batch, key):
    del key
    losses, above = example_values(params, batch["x"], batch["y"])
    mask = batch["mask"]
    # One of each kind: a Mean, and a plain scalar, which is a mean over the true examples (0/0 where there are none).
    return masked_mean(losses, mask), {"above": (above * mask).sum() / mask.sum()}


@functools.cache
def examples(num_examples):
    random = np.random.default_rng(num_examples)
    x = random.normal(size=(num_examples, NUM_FEATURES)).astype(np.float32)
    return {"x": x, "y": random.normal(size=num_examples).astype(np.float32)}


def expected(num_examples):
    fields = {name: values.astype(np.float64) for name, values in examples(num_examples).items()}
    outputs = np.tanh(fields["x"] @ PARAMS["w"].astype(np.float64)) + float(PARAMS["b"])
    return {"loss": np.square(outputs - fields["y"]).mean(), "above": (outputs > fields["y"]).mean()}


@functools.cache
def mesh_of(num_devices):
    return make_mesh(devices=jax.devices()[:num_devices])


def batches(num_examples, global_batch_size, num_devices):
    loader = data.Loader(
        data.ArraySource(examples(num_examples)),
        global_batch_size=global_batch_size,
        seed=0,
        shuffle=False,
        num_epochs=1,
        num_threads=0,
    )
    return [batch for batch, _ in data.feed(loader, mesh_of(num_devices))]


def placed_params(num_devices):
    sharding = jax.sharding.NamedSharding(mesh_of(num_devices), jax.sharding.PartitionSpec())
    return jax.device_put(PARAMS, sharding)


@functools.cache
def mean_step():
    return evaluate.eval_step(eval_fn)


def canonical_step(num_devices):
    return evaluate.canonical_eval_step(eval_fn, mesh_of(num_devices), logical_shards=8)


@settings(max_examples=25)
@given(num_examples=st.integers(1, 40), per_device=st.integers(1, 3), num_devices=st.sampled_from(DEVICES))
def test_equals_numpy_over_all_examples_whatever_the_batch_and_the_devices(num_examples, per_device, num_devices):
    """Ragged last batches included, also where they leave devices with padding alone."""
    found = evaluate.evaluate(
        mean_step(), placed_params(num_devices), None, batches(num_examples, per_device * num_devices, num_devices)
    )
    wanted = expected(num_examples)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    # Counts are whole numbers: nothing is rounded but the one division at the end.
    assert found["above"] * num_examples == pytest.approx(round(wanted["above"] * num_examples), abs=1e-9)


def test_canonical_evaluation_has_the_same_bits_on_every_layout():
    steps = {num_devices: canonical_step(num_devices) for num_devices in DEVICES}
    for num_examples in (15, 16, 17, 40):
        found = [
            evaluate.evaluate(step, placed_params(num_devices), None, batches(num_examples, 16, num_devices))
            for num_devices, step in steps.items()
        ]
        assert found[1:] == found[:1] * 3
        assert found[0] == pytest.approx(expected(num_examples), rel=1e-5)


def collect_fn(params, model_state, batch):
    """Rows of three kinds, among them integers that float32 does not hold."""
    assert model_state is None
    outputs = batch["x"] @ params["w"]
    return {
        "output": outputs,
        "number": (batch["y"] * 1e8).astype(jnp.int32),
        "above": outputs > batch["y"],
        "x": batch["x"],
    }


def collected(make_step, num_examples, global_batch_size, num_devices):
    """Return the rows that an evaluation hands to `compute`."""
    found = []
    step = mean_step()
    collecting = evaluate.Collecting(
        lambda *args: (step(*args), make_step(*args)),
        lambda rows: found.append(rows) or {"rows": float(len(rows["x"]))},
    )
    parts = batches(num_examples, global_batch_size, num_devices)
    values = evaluate.evaluate(step, placed_params(num_devices), None, parts, collecting)
    assert values["rows"] == num_examples
    return found[0]


def check_rows(rows, num_examples):
    fields = examples(num_examples)
    outputs = fields["x"] @ PARAMS["w"]
    np.testing.assert_array_equal(rows["x"], fields["x"])
    np.testing.assert_array_equal(rows["number"], (fields["y"] * np.float32(1e8)).astype(np.int32))
    np.testing.assert_allclose(rows["output"], outputs, rtol=1e-5, atol=1e-6)
    assert rows["above"].dtype == bool
    assert rows["above"].sum() == (outputs > fields["y"]).sum()


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_a_row_of_each_example_is_collected_in_order_whatever_the_devices(num_devices):
    mesh = mesh_of(num_devices)
    means = evaluate.collect_step(collect_fn, mesh)
    canonical = evaluate.canonical_collect_step(collect_fn, mesh, logical_shards=4)
    for num_examples in (1, 9, 16):
        check_rows(collected(means, num_examples, 8, num_devices), num_examples)
        check_rows(collected(canonical, num_examples, 8, num_devices), num_examples)


def test_canonical_rows_have_the_same_bits_on_every_layout():
    found = [
        collected(evaluate.canonical_collect_step(collect_fn, mesh_of(n), logical_shards=4), 13, 8, n)
        for n in (1, 2, 4)
    ]
    for rows in found[1:]:
        assert all(rows[name].tobytes() == found[0][name].tobytes() for name in rows)


def check_rows_in_process():
    for make_step in (
        evaluate.collect_step(collect_fn, mesh_of(4)),
        evaluate.canonical_collect_step(collect_fn, mesh_of(4), logical_shards=4),
    ):
        for num_examples in (5, 11):
            check_rows(collected(make_step, num_examples, 8, 4), num_examples)


def test_two_processes_collect_each_example_once_too():
    testing.run_processes(check_rows_in_process, processes=2, devices=2)


def test_statistics_are_read_and_not_changed():
    def stateful(params, batch, key, model_state):
        losses, _ = example_values(params, batch["x"] - model_state["mean"][None], batch["y"])
        return masked_mean(losses, batch["mask"]), {}

    model_state = {"mean": jnp.ones(NUM_FEATURES)}
    found = evaluate.evaluate(evaluate.eval_step(stateful), placed_params(2), model_state, batches(9, 4, 2))
    fields = examples(9)
    losses, _ = example_values(PARAMS, fields["x"] - 1.0, fields["y"])
    assert found == {"loss": pytest.approx(float(losses.mean()), rel=1e-5)}


def test_a_metric_of_nothing_is_nan_and_harms_no_other():
    def with_empty_metric(params, batch, key):
        loss, _ = eval_fn(params, batch, key)
        return loss, {"rare": Mean(jnp.float32(0), jnp.float32(0))}

    found = evaluate.evaluate(evaluate.eval_step(with_empty_metric), placed_params(1), None, batches(3, 4, 1))
    assert math.isnan(found["rare"])
    assert found["loss"] == pytest.approx(expected(3)["loss"], rel=1e-5)


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="at least one example"):
        evaluate.evaluate(mean_step(), placed_params(1), None, [])


def test_only_a_few_batches_are_on_their_way_at_a_time():
    """Otherwise the whole held-out set would be on the devices at once."""
    in_flight = []

    class Fetched(np.ndarray):
        def addressable_data(self, index):
            in_flight.append(-1)
            return np.asarray(self)

    def step(params, model_state, batch):
        in_flight.append(+1)
        one = np.ones(()).view(Fetched)
        return {"loss": Mean(one, np.ones(()).view(Fetched))}

    assert evaluate.evaluate(step, None, None, [{}] * 20) == {"loss": 1.0}
    started = np.cumsum([change > 0 for change in in_flight])
    read = np.cumsum([change < 0 for change in in_flight]) // 2
    assert (started - read).max() <= 4


def test_a_scalar_that_counts_padding_is_refused():
    batch = {"x": jnp.ones(4), "mask": jnp.array([1.0, 1.0, 0.0, 0.0])}
    for found in ((lambda values: (values.mean(), {})), (lambda values: (values[0] * 0, {"own": values.mean()}))):
        step = evaluate.eval_step(lambda params, batch, key, found=found: found(params * batch["x"]))
        with pytest.raises(ValueError, match=r"the scalar '\w+' does not depend on it"):
            step(jnp.float32(1), None, batch)


def test_what_padding_holds_changes_no_evaluation_not_even_that_of_a_loss_that_multiplies_by_the_mask():
    def multiplies(params, batch, key):
        return (jnp.log(batch["x"]) * batch["mask"]).sum() / batch["mask"].sum(), {}

    batch = {"x": jnp.array([1.0, 4.0, 0.0, jnp.nan]), "mask": jnp.array([1.0, 1.0, 0.0, 0.0])}
    assert float(evaluate.eval_step(multiplies)({}, None, batch)["loss"].value) == pytest.approx(np.log(4.0) / 2)


@pytest.mark.parametrize("name", ["loss", "learning_rate"])
def test_a_metric_with_a_name_of_the_packages_own_is_refused(name):
    step = evaluate.eval_step(lambda params, batch, key: (params, {name: params}))
    with pytest.raises(ValueError, match=f"cannot be metrics of a loss or an eval_fn; got {name}"):
        step(jnp.float32(1), None, {"x": jnp.ones(4)})


def test_a_step_with_rows_computes_the_model_once():
    def model(params, batch):
        return jnp.tanh(jnp.tanh(batch["x"] @ params) @ params)

    eval_step = evaluate.eval_step(lambda params, batch, key: (masked_mean(model(params, batch)[:, 0], None), {}))
    collect_step = evaluate.collect_step(lambda params, model_state, batch: {"output": model(params, batch)})
    args = jnp.eye(64), None, {"x": jnp.ones((64, 64))}
    alone, both = (
        step.lower(*args).compile().cost_analysis()["flops"]
        for step in (eval_step, evaluate.step_with_rows(eval_step, collect_step))
    )
    assert both < 1.1 * alone
