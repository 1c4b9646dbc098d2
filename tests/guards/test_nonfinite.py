import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.guards import nonfinite
from jaxdist.spmd.mesh import make_mesh
from jaxdist.spmd.metrics import masked_mean
from jaxdist.spmd.state import TrainState

MESH = make_mesh()
P = PartitionSpec


def make_state(params, model_state=None):
    state = TrainState(jnp.int32(6), params, model_state, (), jax.random.key(0))
    return jax.device_put(state, NamedSharding(MESH, P()))


def make_batch(x, mask=None, mesh=MESH):
    batch = {"x": np.asarray(x, np.float32)} | ({} if mask is None else {"mask": np.asarray(mask, np.float32)})
    return jax.device_put(batch, NamedSharding(mesh, P("data")))


PARAMS = {"a": jnp.zeros(()), "b": jnp.ones(3), "c": jnp.ones(())}


def row_losses(params, batch):
    # The square root has an infinite slope at zero, so rows of zeros have finite losses and no finite gradient of b.
    return jnp.sqrt(jnp.square(batch["x"] @ params["b"])) + params["c"] + params["a"]


def scalar_loss(params, batch, key):
    values = row_losses(params, batch)
    return values.mean() if "mask" not in batch else masked_mean(values, batch["mask"]).value, {}


def mean_loss(params, batch, key):
    return masked_mean(row_losses(params, batch), batch.get("mask")), {}


def stateful_loss(params, batch, key, model_state):
    return scalar_loss(params, batch, key)[0] * model_state["scale"], {}, model_state


@pytest.mark.parametrize("rows_per_device", [1, 3])
@pytest.mark.parametrize("kind", ["scalar", "mean", "stateful"])
def test_the_rows_the_leaf_and_the_step_are_named(kind, rows_per_device):
    loss_fn = {"scalar": scalar_loss, "mean": mean_loss, "stateful": stateful_loss}[kind]
    state = make_state(PARAMS, {"scale": jnp.ones(())} if kind == "stateful" else None)
    x = np.ones((8 * rows_per_device, 3))
    x[[2, 7]] = 0.0
    report = nonfinite.explain_nonfinite(loss_fn, state, make_batch(x))
    assert (report.step, report.leaf, report.positions) == (7, "params/b", (2, 7))
    assert np.isfinite(report.loss)
    assert report.fields == {}
    text = str(report)
    assert "Step 7" in text
    assert "params/b" in text
    assert "2, 7" in text


def test_a_value_of_the_input_that_is_not_finite_is_pointed_at():
    x = np.ones((8, 3))
    x[4, 1] = np.inf
    batch = make_batch(x) | {"label": jnp.arange(8) * 10, "text": jnp.zeros((8, 2), jnp.int32)}
    report = nonfinite.explain_nonfinite(mean_loss, make_state(PARAMS), batch, step=12)
    assert (report.step, report.leaf, report.positions) == (12, "params/b", (4,))
    assert report.fields == {"x": (4,)}
    assert report.integers == {"label": (40,)}
    assert "'x' holds values that are not finite in rows 4" in str(report)


def test_rows_that_are_masked_out_are_not_blamed():
    x = np.ones((8, 3))
    x[[1, 6]] = np.nan
    mask = np.ones(8)
    mask[6] = 0
    report = nonfinite.explain_nonfinite(mean_loss, make_state(PARAMS), make_batch(x, mask))
    assert report.positions == (1,)
    assert report.fields == {"x": (1,)}


def test_rows_that_overflow_only_together_are_told_apart():
    def loss_fn(params, batch, key):
        return (batch["x"] @ params["w"]).sum(), {}

    report = nonfinite.explain_nonfinite(loss_fn, make_state({"w": jnp.ones(3)}), make_batch(np.full((8, 3), 1e38)))
    assert report.positions == ()
    assert report.leaf == "params/w"
    assert "overflow together" in str(report)


def test_params_that_were_not_finite_before_the_step_are_named():
    report = nonfinite.explain_nonfinite(
        mean_loss, make_state(PARAMS | {"c": jnp.float32(jnp.nan)}), make_batch(np.ones((8, 3)))
    )
    assert report.params == ("params/c",)
    assert "Already not finite before the step: params/c" in str(report)


def test_the_optimizer_and_no_row_is_blamed_for_params_that_were_not_finite():
    bad = PARAMS | {"b": PARAMS["b"] * jnp.nan}
    report = nonfinite.explain_nonfinite(mean_loss, make_state(bad), make_batch(np.ones((8, 3))), step=7)
    text = str(report)
    assert report.positions == tuple(range(8))
    assert "Rows of the batch" not in text
    assert "The loss and the gradients of step 6 were finite" in text
    assert "Correct the optimizer" in text


def test_a_row_is_blamed_where_an_infinity_belongs_to_the_params():
    def loss_fn(params, batch, key):
        return masked_mean(
            jnp.where(jnp.isfinite(params["m"]), params["m"], 0.0) + params["w"][0] * batch["x"][:, 0], None
        ), {}

    x = np.ones((8, 3))
    x[2] = np.nan
    params = {"w": jnp.ones(3), "m": jnp.float32(-jnp.inf)}
    text = str(nonfinite.explain_nonfinite(loss_fn, make_state(params), make_batch(x), step=7))
    assert "Rows of the batch whose own loss or gradient is not finite: 2." in text
    assert "Already not finite before the step: params/m" in text
    assert "optimizer" not in text


def test_leaves_with_a_nan_are_found_by_name():
    params = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.array(-jnp.inf), "c": jnp.array(1), "d": jnp.ones(2)}
    assert nonfinite.leaves_with_nan(params) == ("params/a",)
    assert nonfinite.leaves_with_nan(jnp.float32(jnp.nan)) == ("params",)


def test_a_fault_that_does_not_show_again_is_said_not_to():
    report = nonfinite.explain_nonfinite(mean_loss, make_state(PARAMS), make_batch(np.ones((8, 3))))
    assert not report.found
    assert "computing it again gives finite" in str(report)


def test_rows_that_several_devices_hold_a_part_of_are_examined_whole():
    mesh = make_mesh({"data": 4, "model": 2})
    x = np.ones((8, 4), np.float32)
    x[5] = 0.0
    batch = jax.device_put({"x": x}, NamedSharding(mesh, P("data", "model")))
    state = TrainState(jnp.int32(0), PARAMS | {"b": jnp.ones(4)}, None, (), jax.random.key(0))
    report = nonfinite.explain_nonfinite(mean_loss, jax.device_put(state, NamedSharding(mesh, P())), batch)
    assert (report.leaf, report.positions) == ("params/b", (5,))


def test_a_batch_on_one_device_is_examined_too():
    state = TrainState(jnp.int32(0), PARAMS, None, (), jax.random.key(0))
    report = nonfinite.explain_nonfinite(mean_loss, state, {"x": jnp.ones((4, 3)).at[3].set(0)})
    assert (report.step, report.positions) == (1, (3,))


@pytest.mark.parametrize(
    ("count", "end"), [(1, "0."), (16, "14, 15."), (17, "14, 15 and 1 more."), (40, "14, 15 and 24 more.")]
)
def test_of_many_rows_and_leaves_the_first_are_shown_and_the_others_counted(count, end):
    rows, leaves = tuple(range(count)), tuple(map(str, range(count)))
    report = nonfinite.NonFiniteReport(3, math.nan, None, rows, {"image": rows}, {"label": rows}, leaves)
    shown = [line for line in str(report).splitlines() if " 0" in line]
    assert len(shown) == 4
    assert all(line.endswith(end) for line in shown)
    assert report.found


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, False),
        ({"loss": math.inf}, True),
        ({"leaf": "params/w"}, True),
        ({"positions": (0,)}, True),
        ({"params": ("params/w",)}, True),
    ],
)
def test_one_value_that_is_not_finite_is_enough(changes, found):
    sound = nonfinite.NonFiniteReport(3, 1.0, None, (), {}, {}, ())
    report = dataclasses.replace(sound, **changes)
    assert report.found == found
    assert ("computing it again gives finite ones" in str(report)) != found


def test_inputs_that_are_not_finite_are_named_also_where_the_fault_does_not_show_again():
    """Dropout may have kept in the step what it drops here."""
    report = str(nonfinite.NonFiniteReport(3, 1.0, None, (), {"image": (5,)}, {}, ()))
    assert "computing it again gives finite ones" in report
    assert "'image' holds values that are not finite in rows 5." in report
