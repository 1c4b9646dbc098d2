"""Linen modules: their inputs and their random streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from small_cnns import EXAMPLE, make_batch

from jaxdist import adapters, losses


class _TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, left, right, *, train):
        noise = jax.random.normal(self.make_rng("noise"), left.shape) if train else jnp.zeros_like(left)
        return left - right + noise


def test_fields_and_random_streams_of_any_name_reach_a_linen_module():
    batch = {"a": jnp.ones((2, 1)), "b": jnp.full((2, 1), 3.0)}
    fns = adapters.linen(_TwoInputs(), lambda outputs, batch: (outputs[:, 0], {}), batch, inputs=["b", "a"])
    params = fns.init_fn(jax.random.key(0))
    assert fns.eval_fn(params, batch, jax.random.key(0))[0].value == 2.0
    assert fns.loss_fn(params, batch, jax.random.key(0)) != fns.loss_fn(params, batch, jax.random.key(1))


def test_streams_that_are_looked_for_while_a_step_is_traced_change_nothing_in_it():
    """A job that has trained before does not try its model again at a restart."""
    batch = {"a": jnp.ones((2, 1)), "b": jnp.full((2, 1), 3.0)}
    lowered = []
    for is_checked in (False, True):
        fns = adapters.linen(
            _TwoInputs(), lambda out, batch: (out[:, 0], {}), batch, inputs=["b", "a"], is_checked=is_checked
        )
        params = fns.init_fn(jax.random.key(0))
        lowered.append(jax.jit(fns.loss_fn).lower(params, batch, jax.random.key(0)).as_text())
    assert lowered[0] == lowered[1]


class _NeedsAll(nn.Module):
    """Has no defaults, and computes with all that it is given."""

    @nn.compact
    def __call__(self, x, mask, segment_ids, train):
        kept = jnp.where(mask[:, None], x, 0.0) + segment_ids
        return nn.Dense(3)(kept / jnp.maximum(mask.sum(), 1))


def test_a_module_may_need_a_mask_and_the_ids_of_packed_rows_without_defaults():
    batch = {"x": jnp.ones((4, 2)), "segment_ids": jnp.ones((4, 2), jnp.int32), "mask": jnp.array([1.0, 1, 0, 0])}
    fns = adapters.linen(_NeedsAll(), lambda outputs, batch: (outputs.sum(1), {}), batch, inputs="x")
    params = fns.init_fn(jax.random.key(0))
    loss = float(fns.loss_fn(params, batch, jax.random.key(0))[0].value)
    assert loss == pytest.approx(float(params["Dense_0"]["kernel"].sum()), rel=1e-6)  # the rows that count are ones
    whole = batch | {"mask": jnp.ones(4)}
    del batch["mask"]  # as in a prediction: every row counts
    np.testing.assert_array_equal(fns.predict_fn(params, batch), fns.predict_fn(params, whole))


class _Constant(nn.Module):
    @nn.compact
    def __call__(self, train):
        return self.param("w", nn.initializers.ones, (2,))


def test_a_module_may_have_no_inputs():
    batch = {"x": jnp.full((4, 2), 3.0)}
    fns = adapters.linen(_Constant(), lambda out, batch: (batch["x"] @ out, {}), batch, inputs=[])
    assert float(fns.loss_fn(fns.init_fn(jax.random.key(0)), batch, jax.random.key(0))[0].value) == 6.0


class _DropCell(nn.Module):
    """Drops half of its input, and keeps what was left as its output."""

    @nn.compact
    def __call__(self, carry, x, train):
        kept = nn.Dropout(0.5, deterministic=not train)(x)
        return carry, kept + 0.0 * nn.Dense(x.shape[-1])(kept)


class _DropRnnCell(nn.RNNCellBase):
    train: bool

    @nn.compact
    def __call__(self, carry, x):
        return _DropCell()(carry, x, self.train)

    def initialize_carry(self, rng, input_shape):
        return jnp.zeros(input_shape[:-1])

    @property
    def num_feature_axes(self):
        return 1


class _Scanned(nn.Module):
    lift: str

    @nn.compact
    def __call__(self, x, *, train):
        if self.lift == "scan":
            cell = nn.scan(
                _DropCell,
                variable_broadcast="params",
                split_rngs={"params": False, "dropout": True},
                in_axes=(1, nn.broadcast),
                out_axes=1,
            )
            return cell()(jnp.zeros(x.shape[:1]), x, train)[1]
        if self.lift == "rnn":
            return nn.RNN(_DropRnnCell(train), split_rngs={"params": False, "dropout": True})(x)
        cell = nn.vmap(
            _DropCell,
            variable_axes={"params": None},
            split_rngs={"params": False, "dropout": True},
            in_axes=(None, 1, None),
            out_axes=1,
        )
        return cell()(jnp.zeros(x.shape[:1]), x, train)[1]


@pytest.mark.parametrize("lift", ["scan", *(pytest.param(lift, marks=pytest.mark.slow) for lift in ("vmap", "rnn"))])
def test_every_time_step_of_a_lifted_module_drops_its_own_features(lift):
    batch = {"image": jnp.ones((2, 4, 32)), "label": jnp.zeros(2, jnp.int32)}

    def loss(outputs, batch):
        return jnp.abs(outputs).mean(axis=(1, 2)), {
            f"kept_{at}": (outputs[:, at] > 0) @ (2.0 ** jnp.arange(32) % 9973) for at in range(4)
        }

    fns = adapters.linen(_Scanned(lift), loss, batch)
    _, found = fns.loss_fn(fns.init_fn(jax.random.key(0)), batch, jax.random.key(1))
    assert len({float(mean.total) for mean in found.values()}) == 4, found


def test_a_module_that_draws_where_it_finds_a_stream_finds_it_in_training_alone():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, image, *, train):
            assert not self.has_rng("params") or self.is_initializing()
            noise = jax.random.normal(self.make_rng("noise"), image.shape) if self.has_rng("noise") else 0.0
            return nn.Dense(10)((image + noise).reshape(image.shape[0], -1))

    fns = adapters.linen(Noisy(), losses.classification, EXAMPLE)
    params = fns.init_fn(jax.random.key(0))
    one, two = (float(fns.loss_fn(params, make_batch(), jax.random.key(seed))[0].total) for seed in (1, 2))
    still, again = (float(fns.eval_fn(params, make_batch(), jax.random.key(seed))[0].total) for seed in (1, 2))
    assert one != two
    assert still == again


def test_two_streams_have_keys_of_their_own_and_one_alone_has_that_of_the_step():
    class Draws(nn.Module):
        streams: tuple[str, ...]

        @nn.compact
        def __call__(self, image, *, train):
            draws = [jax.random.normal(self.make_rng(name)) if train else 0.0 for name in self.streams]
            return self.param("w", nn.initializers.ones, (1,)) * jnp.stack([jnp.asarray(each) for each in draws])

    def draws_of(*streams):
        def loss(outputs, batch):
            return batch["label"] * 1.0, {
                name: jnp.full(batch["label"].shape, each) for name, each in zip(streams, outputs, strict=True)
            }

        fns = adapters.linen(Draws(streams), loss, EXAMPLE)
        _, found = fns.loss_fn(fns.init_fn(jax.random.key(0)), make_batch(), jax.random.key(1))
        return [float(mean.value) for mean in found.values()]

    first, second = draws_of("dropout", "noise")
    assert first != second
    assert draws_of("noise") == draws_of("dropout") == [first]
