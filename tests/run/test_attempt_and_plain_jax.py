"""Whatever users' functions do besides computing, a run ends with the params of a loop in plain JAX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdist
from jaxdist import adapters

pytestmark = pytest.mark.usefixtures("shared_compilations")

NUM_EXAMPLES, BATCH_SIZE, STEPS, RATE = 44, 16, 5, 0.1
random = np.random.default_rng(0)
X = random.normal(size=(NUM_EXAMPLES, 8)).astype(np.float32)
Y = (X @ random.normal(size=(8, 4))).astype(np.float32)
KERNEL = random.normal(size=(8, 4)).astype(np.float32)
LAYOUTS = {
    "one device": (1, {}),
    "microbatches": (4, {"num_microbatches": 2}),
    "canonical": (2, {"reduction": "canonical"}),
    "fsdp": (4, {"strategy": "fsdp", "layout": jaxdist.LayoutSettings(min_size=1)}),
}


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return {"y": nn.Dense(4, kernel_init=lambda *_: jnp.asarray(KERNEL))(x), "extra": x}


def in_plain_jax():
    """Return the params after some steps, of which the third has a batch of fewer examples, and the mean loss."""

    def loss(params, x, y):
        return jnp.square(x @ params["kernel"] + params["bias"][None] - y).mean()

    params = {"kernel": jnp.asarray(KERNEL), "bias": jnp.zeros(4)}
    for step in range(STEPS):
        rows = slice((start := BATCH_SIZE * (step % 3)), start + BATCH_SIZE)
        grads = jax.jit(jax.grad(loss))(params, X[rows], Y[rows])
        params = jax.tree.map(lambda leaf, grad: leaf - RATE * grad, params, grads)
    return params, float(loss(params, X, Y))


def train(run_dir, model, loss, layout, **changes):
    num_devices, settings = layout
    experiment = jaxdist.Experiment(
        name="users",
        model=model,
        loss=loss,
        inputs="x",
        data=jaxdist.Data(train={"x": X, "y": Y}, eval={"x": X, "y": Y}, shuffle=False),
        optimizer=optax.sgd(RATE),
        global_batch_size=BATCH_SIZE,
        stop=jaxdist.Stop(max_steps=STEPS),
        writers=(),
        **settings,
        **changes,
    )
    return jaxdist.train(experiment, run_dir, jax.devices()[:num_devices], silent=True)


def takes_the_mask(outputs, batch):
    del batch["mask"]
    return jnp.square(outputs.pop("y") - batch.pop("y")).mean(axis=-1), {}


def counts_every_row(outputs, batch):
    batch["mask"] = jnp.ones_like(batch["mask"])
    outputs["y"] = outputs["y"] - batch["y"]
    return jnp.square(outputs["y"]).mean(axis=-1), {}


class Emptying:
    """A metric that empties what it is given; of two, the second is given as much."""

    def __init__(self, name):
        self.names = (name,)

    def collect(self, outputs, batch):
        return {"missed": outputs.pop("y") - batch.pop("y")}

    def compute(self, rows):
        return {self.names[0]: float(np.square(rows["missed"]).mean())}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("loss", [takes_the_mask, counts_every_row])
def test_a_loss_may_write_into_its_batch_and_outputs(loss, layout, tmp_path):
    metrics = jaxdist.Evaluation(metrics=(Emptying("first"), Emptying("second")))
    run = train(tmp_path / "run", Linear(), loss, layout, eval=metrics)
    params, held_out = in_plain_jax()
    for name, expected in params.items():
        np.testing.assert_allclose(run.params["Dense_0"][name], expected, rtol=1e-5, atol=1e-6)
    found = [run.record.metrics[f"eval/{name}"] for name in ("loss", "first", "second")]
    np.testing.assert_allclose(found, [held_out] * 3, rtol=1e-5)


def init_fn(key):
    params = {"kernel": jnp.asarray(KERNEL), "bias": jnp.zeros(4)}
    return params, {"calls": jnp.zeros((), jnp.int32), "means": [jnp.zeros(4)]}


def loss_fn(params, batch, key, model_state):
    """Writes into all that it is given."""
    mask = batch.pop("mask")
    model_state["means"][0] = 0.5 * model_state["means"][0] + params["bias"]
    model_state["calls"] += 1
    params["bias"] = params["bias"][None] + batch.pop("x") @ params.pop("kernel")
    values = jnp.square(params["bias"] - batch["y"]).mean(axis=-1)
    return (values * mask).sum() / mask.sum(), {}, model_state


def eval_fn(params, batch, key, model_state):
    return loss_fn(params, batch, key, model_state)[:2]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_plain_functions_may_write_into_their_arguments(layout, tmp_path):
    run = train(tmp_path / "run", adapters.Functions(init_fn, loss_fn, eval_fn), None, layout)
    params, held_out = in_plain_jax()
    for name, expected in params.items():
        np.testing.assert_allclose(run.params[name], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run.record.metrics["eval/loss"], held_out, rtol=1e-5)
    assert run.model_state["calls"] == STEPS
