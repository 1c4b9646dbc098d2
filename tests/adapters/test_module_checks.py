"""What is refused of a module and of its loss's shapes before training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from small_cnns import EXAMPLE, make_batch

from jaxdist import adapters, losses
from jaxdist.errors import ConfigError
from jaxdist.models import cnn, cnn_nnx, gpt


class _NoMask(nn.Module):
    @nn.compact
    def __call__(self, image, *, train):
        return nn.BatchNorm(use_running_average=not train)(image)


class _NNXNoMask(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(1, rngs=rngs)

    def __call__(self, image, train):
        return self.norm(image, use_running_average=not train)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: adapters.linen(_NoMask(), losses.classification, EXAMPLE), "_NoMask.*padding.*'mask'"),
        (lambda: adapters.nnx(_NNXNoMask, losses.classification, EXAMPLE), "_NNXNoMask.*padding.*'mask'"),
        (lambda: adapters.linen(cnn.CNN(10), losses.classification, EXAMPLE, inputs="pixels"), "'pixels'.*'image'"),
        (lambda: adapters.nnx(cnn_nnx.CNN(10), losses.classification, EXAMPLE, inputs="pixels"), "'pixels'.*'image'"),
    ],
)
def test_a_module_that_breaks_the_contract_is_refused_at_once(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def column_target(outputs, batch):
    return jnp.square(outputs - batch["label"]), {}


class _Column(nn.Module):
    @nn.compact
    def __call__(self, image, *, train):
        return nn.Dense(1)(image.reshape(image.shape[0], -1))


class _Tokens(nn.Module):
    @nn.compact
    def __call__(self, tokens, *, train):
        return nn.Embed(7, 7)(tokens)


def test_a_target_that_broadcasts_against_the_outputs_is_refused():
    jax.config.update("jax_numpy_rank_promotion", "allow")
    try:
        with pytest.raises(ValueError, match=r"'loss' has shape \(6, 6\) for 6 examples, and dim 0 and dim 1 of it"):
            adapters.linen(_Column(), column_target, EXAMPLE)
    finally:
        jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_a_loss_per_token_is_accepted_also_where_length_and_batch_are_equal(rows):
    batch = {"tokens": jax.ShapeDtypeStruct((rows, 4), jnp.int32)}
    fns = adapters.linen(_Tokens(), losses.next_token, batch, inputs="tokens")
    params, tokens = fns.init_fn(jax.random.key(0)), jnp.zeros((rows, 4), jnp.int32)
    assert fns.loss_fn(params, {"tokens": tokens}, jax.random.key(0))[0].count == 3 * rows


def test_a_loss_that_gives_a_value_for_the_batch_in_place_of_its_examples_is_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 10\) for 6 examples, and no dim of it follows"):
        adapters.linen(cnn.CNN(10, width=2), lambda outputs, batch: (outputs.mean(axis=0, keepdims=True), {}), EXAMPLE)


@pytest.mark.parametrize("name", ["loss", "learning_rate", "grad_norm", "nonfinite_leaf", "empty_batches"])
def test_a_metric_with_a_name_of_the_package_s_own_is_refused(name):
    def loss(outputs, batch):
        return outputs.sum(axis=1), {name: outputs.sum(axis=1)}

    with pytest.raises(ValueError, match=f"cannot be metrics of a loss or an eval_fn; got {name}"):
        adapters.linen(cnn.CNN(10, width=2), loss, EXAMPLE)


def test_integer_outputs_are_refused():
    class Classes(nn.Module):
        @nn.compact
        def __call__(self, image, *, train):
            return nn.Dense(10)(image.reshape(image.shape[0], -1)).argmax(axis=1)

    with pytest.raises(ValueError, match="Classes returns int32, through which no gradient flows"):
        adapters.linen(Classes(), lambda outputs, batch: ((outputs - batch["label"]) ** 2.0, {}), EXAMPLE)


def test_a_packed_batch_needs_a_module_that_takes_segments():
    batch = {name: jax.ShapeDtypeStruct((6, 4), jnp.int32) for name in ("tokens", "segment_ids")}
    with pytest.raises(ValueError, match=r"_Tokens.*keep apart; add a parameter named 'segment_ids'"):
        adapters.linen(_Tokens(), losses.next_token, batch, inputs="tokens")
    model = gpt.GPT(7, 4, num_layers=1, num_heads=1, width=4)
    fns = adapters.linen(model, losses.next_token, batch, inputs="tokens")
    tokens = {"tokens": jnp.arange(24).reshape(6, 4) % 7, "segment_ids": jnp.tile(jnp.array([1, 1, 2, 2]), (6, 1))}
    params = fns.init_fn(jax.random.key(0))
    loss = fns.loss_fn(params, tokens, jax.random.key(0))[0]
    halves = {"tokens": tokens["tokens"].reshape(12, 2)}
    alone = adapters.linen(model, losses.next_token, halves, inputs="tokens").loss_fn(
        params, halves, jax.random.key(0)
    )[0]
    assert loss.count == alone.count == 12
    np.testing.assert_allclose(loss.total, alone.total, rtol=1e-5)


class _Sows(nn.Module):
    collection: str

    @nn.compact
    def __call__(self, image, *, train):
        x = nn.Dense(10)(image.reshape(image.shape[0], -1))
        self.sow(self.collection, "activity", x.mean())
        return x


def test_what_a_module_sows_is_left_out_or_named():
    adapters.linen(_Sows("intermediates"), losses.classification, EXAMPLE)
    with pytest.raises(ValueError, match=r"losses/activity/1 of _Sows does not.*'intermediates'"):
        adapters.linen(_Sows("losses"), losses.classification, EXAMPLE)


class _Spectral(nn.Module):
    @nn.compact
    def __call__(self, image, *, train):
        return nn.SpectralNorm(nn.Dense(10))(image.reshape(image.shape[0], -1), update_stats=train)


class _Counts(nn.Module):
    @nn.compact
    def __call__(self, image, *, train):
        calls = self.variable("batch_stats", "calls", lambda: jnp.zeros((), jnp.int32))
        if train and not self.is_initializing():
            calls.value += 1
        return nn.Dense(10)(image.reshape(image.shape[0], -1))


@pytest.mark.parametrize("module", [_Spectral(), _Counts()], ids=["spectral norm", "counter"])
def test_statistics_that_no_row_enters_need_no_mask(module):
    fns = adapters.linen(module, losses.classification, EXAMPLE)
    params, model_state = fns.init_fn(jax.random.key(0))
    *_, new_state = fns.loss_fn(params, make_batch(), jax.random.key(0), model_state)
    assert jax.tree.structure(new_state) == jax.tree.structure(model_state)
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, new_state, model_state)))


def test_a_module_that_takes_nothing_is_told_so():
    class Nothing(nn.Module):
        def __call__(self):
            return jnp.zeros(3)

    with pytest.raises(ConfigError, match=r"called with its inputs, here image\. Called so, Nothing raises TypeError"):
        adapters.linen(Nothing(), losses.classification, EXAMPLE)


class _Sized(nn.Module):
    @nn.compact
    def __call__(self, image, size=10, *, in_training=None):
        return nn.Dense(size)(image.reshape(len(image), -1))


@pytest.mark.parametrize("module", [_Sized(), nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(10)])])
def test_a_module_without_a_switch_is_trained_as_flax_computes_it(module):
    fns = adapters.linen(module, losses.classification, EXAMPLE)
    params, batch = fns.init_fn(jax.random.key(3)), make_batch()
    logits = module.apply({"params": params}, batch["image"])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).sum()
    for function in (fns.loss_fn, fns.eval_fn):
        found = function(params, batch, jax.random.key(0))
        np.testing.assert_allclose((found["loss"] if isinstance(found, dict) else found[0]).total, expected, rtol=1e-6)


def _hidden(self, image, **options):
    return image if options.get("train") else -image


def _required(self, image, training):
    return image if training else -image


def _named(self, image, deterministic=True):
    return -image if deterministic else image


@pytest.mark.parametrize(("call", "named"), [(_hidden, "options"), (_required, "training"), (_named, "deterministic")])
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_switch_that_would_keep_its_default_is_refused(kind, call, named):
    """A model whose dropout is off in training learns, and nothing shows it."""
    if kind == "linen":
        module = type("Switched", (nn.Module,), {"__call__": call, "__module__": __name__})()
    else:
        module = type("Switched", (nnx.Module,), {"__call__": call, "__init__": lambda self, rngs: None})
    with pytest.raises(ValueError, match=rf"Switched.__call__ takes {named}, which is not given.*Name this .* train"):
        getattr(adapters, kind)(module, losses.classification, EXAMPLE)


class _BegunByInputs(nn.Module):
    scales: bool

    @nn.compact
    def __call__(self, image, *, train):
        x = image.reshape(len(image), -1)
        shift = self.param("shift", lambda key: x.mean(axis=0) if self.scales else jnp.zeros_like(x.mean(axis=0)))
        size = self.param("size", nn.initializers.ones, x.shape[1:])
        return nn.Dense(10)((x - shift) * size)


def test_params_that_begin_with_the_inputs_are_refused_and_those_of_their_shapes_are_not():
    """In plain Flax they would begin with the examples that `init` is given; here there would be zeros."""
    with jax.numpy_rank_promotion("allow"):
        adapters.linen(_BegunByInputs(scales=False), losses.classification, EXAMPLE)
        with pytest.raises(ConfigError, match=r"_BegunByInputs begins with params that .* its inputs, such as shift"):
            adapters.linen(_BegunByInputs(scales=True), losses.classification, EXAMPLE)
