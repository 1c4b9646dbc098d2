"""`jaxdist verify`: a promise that is kept, and promises broken on purpose."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import pytest
import tiny_experiment

import jaxdist
from jaxdist import adapters, errors
from jaxdist.cli import main, selected_experiment
from jaxdist.launch.joining import runtime
from jaxdist.run.preflight import losses_and_metrics
from jaxdist.run.use import verify
from jaxdist.spmd import reduce

pytestmark = pytest.mark.usefixtures("shared_compilations")


def linear(loss_fn, **settings):
    """Return the tiny experiment with a model of one matrix, and `loss_fn(outputs, batch, key)` as its loss."""

    def mean_loss(params, batch, key):
        return loss_fn(batch["image"] @ params["w"], batch, key), {}

    functions = adapters.Functions(lambda key: {"w": jax.random.normal(key, (6,))}, mean_loss, mean_loss)
    return dataclasses.replace(tiny_experiment.get_config(), model=functions, loss=None, **settings)


def squares(outputs, batch, key=None):
    del key
    return jaxdist.masked_mean((outputs - batch["label"]) ** 2, batch["mask"])


def check(experiment, num_devices=2):
    return verify.verify(experiment, devices=jax.devices()[:num_devices], num_steps=3)


@pytest.mark.parametrize("strategy", ["data-parallel", "zero1", "fsdp"])
def test_the_mean_is_kept_up_to_rounding(strategy):
    report = check(linear(squares, strategy=strategy), num_devices=4)
    assert report.kept
    assert [row.num_devices for row in report.rows] == [1, 2, 4]
    assert {row.verdict for row in report.rows} <= {"identical", "equal"}


def test_where_each_device_draws_its_own_nothing_is_promised():
    report = check(linear(lambda outputs, batch, key: squares(outputs + jax.random.normal(key), batch)))
    assert report.kept
    assert [row.verdict for row in report.rows] == ["identical", "apart"]
    assert "Nothing is promised here: dropout" in str(report)


def test_a_loss_that_depends_on_the_devices_breaks_the_mean():
    """It divides by the root of the number of a device's examples."""

    def rooted(outputs, batch, key):
        del key
        return jnp.sum(batch["mask"] * (outputs - batch["label"]) ** 2) / jnp.sqrt(jnp.sum(batch["mask"]))

    report = check(linear(rooted))
    assert not report.kept
    assert [row.verdict for row in report.rows] == ["identical", "BROKEN: too far apart"]
    assert report.rows[1].largest_difference > 0.01
    assert "Promise broken on [2] devices." in str(report)


@pytest.fixture
def traces_unchecked(monkeypatch):
    """A model may be another each time that it is traced: what verify compares differs as if the compiler did it."""

    def shapes(what, function, args, *, same_bits):
        return jax.eval_shape(function, *args)

    monkeypatch.setattr(losses_and_metrics, "check_same_trace", shapes)


@pytest.mark.usefixtures("traces_unchecked")
@pytest.mark.parametrize("broken", [False, True])
def test_the_status_says_whether_the_canonical_bits_are_the_same(broken, capsys, monkeypatch):
    """If broken, the model differs each time it is compiled, by the smallest difference of float32."""
    times_compiled = itertools.count()

    def drifting(outputs, batch, key):
        del key
        return squares(outputs * (1.0 + 2.0**-23 * (next(times_compiled) if broken else 0)), batch)

    monkeypatch.setattr(runtime, "start", lambda num_devices=None, threads=None: jax.devices()[: num_devices or 1])
    monkeypatch.setattr(selected_experiment, "load", lambda options: linear(drifting, reduction="canonical"))
    assert main.run(["verify", "any.py", "--devices", "2", "--json"]) == (1 if broken else 0)
    report = json.loads(capsys.readouterr().out)
    assert [row["verdict"] for row in report["rows"]] == ["identical", "BROKEN: other bits" if broken else "identical"]
    assert len({row["params_sha256"] for row in report["rows"]}) == (2 if broken else 1)


def test_a_loss_that_is_not_finite_keeps_no_promise():
    """No update is made then, so that the params are the same on every layout."""
    experiment = linear(lambda outputs, batch, key: squares(outputs * jnp.nan, batch))
    with pytest.raises(errors.UserError, match="not finite within 3 steps on 1 devices"):
        check(experiment)


def planted(init_fn, loss_fn, **settings):
    functions = adapters.Functions(init_fn, loss_fn, loss_fn)
    return dataclasses.replace(tiny_experiment.get_config(), model=functions, loss=None, **settings)


def test_a_difference_in_an_imaginary_part_is_found():
    def loss_fn(params, batch, key):
        del key
        # The gradient of the imaginary part alone adds up a device's examples.
        outputs = batch["image"] @ params["w"].real
        return squares(outputs, batch).value + jnp.sum(batch["mask"] * params["w"].imag.sum()) / 16, {}

    report = check(planted(lambda key: {"w": jnp.ones(6, jnp.complex64)}, loss_fn))
    assert [row.verdict for row in report.rows] == ["identical", "BROKEN: too far apart"]


@pytest.mark.usefixtures("traces_unchecked")
def test_a_difference_in_the_model_state_alone_breaks_the_canonical_bits():
    times_compiled = itertools.count()

    def loss_fn(params, batch, key, model_state):
        drift = next(times_compiled) * 2.0**-20
        return squares(batch["image"] @ params["w"], batch), {}, {"seen": model_state["seen"] * 0.5 + 1.0 + drift}

    def eval_fn(params, batch, key, model_state):
        return squares(batch["image"] @ params["w"], batch), {}

    functions = adapters.Functions(lambda key: ({"w": jnp.ones(6)}, {"seen": jnp.ones(())}), loss_fn, eval_fn)
    report = check(dataclasses.replace(linear(squares, reduction="canonical"), model=functions))
    assert [row.verdict for row in report.rows] == ["identical", "BROKEN: other bits"]
    assert len({row.params_sha256 for row in report.rows}) == 1


@pytest.mark.parametrize(
    ("strategy", "name", "faulty"),
    [
        ("data-parallel", "mean_over_axis", lambda sums, axis: sums),
        ("zero1", "sum_over_axes", lambda grad, axes, **specs: grad),
        ("fsdp", "sum_over_axes", lambda grad, axes, **specs: grad),
    ],
)
def test_gradients_that_are_not_added_up_over_the_devices_break_the_mean(strategy, name, faulty, monkeypatch):
    monkeypatch.setattr(reduce, name, faulty)
    report = check(linear(squares, strategy=strategy))
    assert not report.kept
    assert report.rows[-1].verdict == "BROKEN: too far apart"
