"""Adapters: Linen and NNX modules keep one contract, and both learn."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from jaxdist import adapters, losses
from jaxdist.models import cnn, cnn_nnx, gpt
from jaxdist.spmd.metrics import Mean, Weighted, masked_mean

ADAPT = {"linen": (adapters.linen, cnn.CNN), "nnx": (adapters.nnx, cnn_nnx.CNN)}
KINDS = sorted(ADAPT)
ROWS = 6
EXAMPLE = {
    "image": jax.ShapeDtypeStruct((ROWS, 8, 8, 1), jnp.float32),
    "label": jax.ShapeDtypeStruct((ROWS,), jnp.int32),
    "mask": jax.ShapeDtypeStruct((ROWS,), jnp.float32),
}


@functools.cache
def functions(kind: str, **hyperparameters) -> adapters.Functions:
    """The jitted functions of a tiny CNN."""
    adapt, model = ADAPT[kind]
    made = adapt(model(num_classes=10, width=2, num_stages=1, **hyperparameters), losses.classification, EXAMPLE)
    return adapters.Functions(*map(jax.jit, made))


def random_variables(fns: adapters.Functions):
    """What init_fn returns, filled with positive numbers (a variance is positive) without compiling an init."""
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(fns.init_fn, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(random.uniform(0.1, 0.5, leaf.shape), leaf.dtype), shapes)


def make_batch(num_true: int = ROWS, seed: int = 0, padding: float = 0.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    mask = (np.arange(ROWS) < num_true).astype(np.float32)
    image = random.normal(size=(ROWS, 8, 8, 1)).astype(np.float32)
    image[num_true:] = padding
    return {"image": image, "label": random.integers(0, 10, ROWS).astype(np.int32), "mask": mask}


def assert_trees_close(actual, expected, **tolerances):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerances), actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stateless_model_has_params_alone(kind):
    fns = functions(kind, dropout_rate=0.5)
    params = random_variables(fns)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    batch = make_batch(num_true=4)
    for function in (fns.loss_fn, fns.eval_fn):
        loss, metrics = function(params, batch, jax.random.key(1))
        assert loss.count == metrics["accuracy"].count == 4
        assert list(metrics) == ["accuracy"]


@pytest.mark.parametrize("kind", KINDS)
def test_model_state_holds_statistics_and_no_random_state(kind):
    fns = functions(kind, batch_norm=True, dropout_rate=0.5)
    params, model_state = jax.eval_shape(fns.init_fn, jax.random.key(0))
    names = {jax.tree_util.keystr(path[-1:]) for path, _ in jax.tree_util.tree_leaves_with_path(model_state)}
    assert names == {"['mean']", "['var']"}
    assert jax.tree.structure((params, model_state)).num_leaves == 2 * 5 + 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_params_depend_on_the_key_alone(kind):
    fns = functions(kind)
    first, again, other = (fns.init_fn(jax.random.key(seed)) for seed in (0, 0, 1))
    assert_trees_close(first, again, rtol=0)
    assert not np.allclose(*(jax.flatten_util.ravel_pytree(tree)[0] for tree in (first, other)))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_follows_the_key_in_training_and_is_off_in_evaluation(kind):
    fns = functions(kind, dropout_rate=0.5)
    params, batch = random_variables(fns), make_batch()
    first, again, other = (fns.loss_fn(params, batch, jax.random.key(seed))[0].total for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert fns.eval_fn(params, batch, jax.random.key(1)) == fns.eval_fn(params, batch, jax.random.key(2))
    without = functions(kind)
    assert_trees_close(
        fns.eval_fn(params, batch, jax.random.key(1)), without.loss_fn(params, batch, jax.random.key(1)), rtol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_batch_statistics_are_the_batch_s_in_training_and_the_running_ones_in_evaluation(kind):
    fns = functions(kind, batch_norm=True)
    params, model_state = random_variables(fns)
    batch = make_batch()
    *_, new_state = fns.loss_fn(params, batch, jax.random.key(1), model_state)
    changed = jax.tree.map(lambda new, old: not np.allclose(new, old), new_state, model_state)
    assert all(jax.tree.leaves(changed))
    assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, model_state)
    evaluated = [fns.eval_fn(params, batch, jax.random.key(1), state)[0].total for state in (model_state, new_state)]
    assert evaluated[0] != evaluated[1]
    assert len(fns.eval_fn(params, batch, jax.random.key(1), model_state)) == 2


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(num_true=st.integers(1, ROWS), padding=st.floats(-1e3, 1e3, width=32))
def test_padding_rows_change_nothing(kind, num_true, padding):
    fns = functions(kind, batch_norm=True)
    params, model_state = random_variables(fns)
    first, other = (make_batch(num_true, padding=value) for value in (0.0, padding))
    expected = fns.loss_fn(params, first, jax.random.key(1), model_state)
    assert_trees_close(fns.loss_fn(params, other, jax.random.key(1), model_state), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_equals_the_batch_without_its_padding(kind):
    fns = functions(kind, batch_norm=True)
    params, model_state = random_variables(fns)
    padded = make_batch(num_true=4, padding=7.0)
    short = {name: field[:4] for name, field in padded.items() if name != "mask"}
    expected = fns.loss_fn(params, short, jax.random.key(1), model_state)
    assert_trees_close(fns.loss_fn(params, padded, jax.random.key(1), model_state), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_padding_alone_gives_zeros_and_keeps_the_statistics(kind):
    fns = functions(kind, batch_norm=True)
    params, model_state = random_variables(fns)

    def total(params):
        loss, metrics, new_state = fns.loss_fn(params, make_batch(num_true=0), jax.random.key(1), model_state)
        return loss.total, (loss, metrics, new_state)

    grads, (loss, metrics, new_state) = jax.grad(total, has_aux=True)(params)
    assert_trees_close(grads, jax.tree.map(jnp.zeros_like, params), atol=0)
    assert (loss.total, loss.count, metrics["accuracy"].total) == (0, 0, 0)
    assert_trees_close(new_state, model_state, rtol=0)


class _NoTrain(nn.Module):
    @nn.compact
    def __call__(self, image):
        return nn.Dense(10)(image)


class _NoMask(nn.Module):
    @nn.compact
    def __call__(self, image, *, train):
        return nn.BatchNorm(use_running_average=not train)(image)


class _TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, left, right, *, train):
        noise = jax.random.normal(self.make_rng("noise"), left.shape) if train else jnp.zeros_like(left)
        return left - right + noise


class _NNXByAttribute(nnx.Module):
    """An NNX module in the manner of its own documentation: no `train` argument, train() and eval() switch it."""

    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, image):
        return self.head(self.dropout(image.reshape(-1, 64)))


class _NNXNoMask(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(1, rngs=rngs)

    def __call__(self, image, train):
        return self.norm(image, use_running_average=not train)


class _NNXManyStreams(nnx.Module):
    def __init__(self, rngs):
        self.rngs = rngs.split(3)
        self.scale = nnx.Param(jnp.ones(1))

    def __call__(self, image):
        draws = jax.vmap(jax.random.normal)(self.rngs.default.key.get_value())
        return jnp.broadcast_to(jnp.expand_dims(draws, 0), (image.shape[0], 3))


def test_fields_and_random_streams_of_any_name_reach_a_linen_module():
    batch = {"a": jnp.ones((2, 1)), "b": jnp.full((2, 1), 3.0)}
    fns = adapters.linen(_TwoInputs(), lambda outputs, batch: (outputs[:, 0], {}), batch, inputs=["b", "a"])
    params = fns.init_fn(jax.random.key(0))
    assert fns.eval_fn(params, batch, jax.random.key(0))[0].value == 2.0
    assert fns.loss_fn(params, batch, jax.random.key(0)) != fns.loss_fn(params, batch, jax.random.key(1))


def test_an_nnx_module_without_a_train_argument_is_switched_by_train_and_eval():
    fns = adapters.nnx(_NNXByAttribute, losses.classification, EXAMPLE)
    params, batch = random_variables(fns), make_batch()
    assert fns.loss_fn(params, batch, jax.random.key(0)) != fns.loss_fn(params, batch, jax.random.key(1))
    assert fns.eval_fn(params, batch, jax.random.key(0)) == fns.eval_fn(params, batch, jax.random.key(1))


def test_nnx_streams_that_hold_several_keys_get_as_many_different_ones():
    fns = adapters.nnx(_NNXManyStreams, lambda outputs, batch: (outputs.std(axis=-1), {}), EXAMPLE)
    params, batch = fns.init_fn(jax.random.key(0)), make_batch()
    assert fns.loss_fn(params, batch, jax.random.key(0))[0].value > 0
    assert fns.loss_fn(params, batch, jax.random.key(0)) != fns.loss_fn(params, batch, jax.random.key(1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: adapters.linen(_NoTrain(), losses.classification, EXAMPLE), "_NoTrain.*'train'"),
        (lambda: adapters.linen(_NoMask(), losses.classification, EXAMPLE), "_NoMask.*padding.*'mask'"),
        (lambda: adapters.nnx(_NNXNoMask, losses.classification, EXAMPLE), "_NNXNoMask.*padding.*'mask'"),
        (lambda: adapters.linen(cnn.CNN(10), losses.classification, EXAMPLE, inputs="pixels"), "'pixels'.*'image'"),
        (lambda: adapters.nnx(cnn_nnx.CNN(10), losses.classification, EXAMPLE, inputs="pixels"), "'pixels'.*'image'"),
    ],
)
def test_a_module_that_breaks_the_contract_is_refused_at_once(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_loss_that_averages_is_refused():
    with pytest.raises(ValueError, match="'loss' is a scalar"):
        adapters.linen(cnn.CNN(10, width=2), lambda outputs, batch: (outputs.mean(), {}), EXAMPLE)


# What tracing shows before training


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


def test_means_and_weighted_values_of_a_loss_are_taken_as_they_are():
    def loss(outputs, batch):
        values = outputs.sum(axis=1)
        weighted = Weighted(values, batch["label"].astype(jnp.float32))
        return weighted, {"own": masked_mean(values, batch["mask"] * (batch["label"] > 4)), "weighted": weighted}

    fns = adapters.linen(cnn.CNN(10, width=2, num_stages=1), loss, EXAMPLE)
    params, batch = fns.init_fn(jax.random.key(0)), make_batch(num_true=4)
    total, found = fns.eval_fn(params, batch, jax.random.key(0))
    assert total.count == found["weighted"].count == batch["label"][:4].sum()
    assert found["own"].count == (batch["label"][:4] > 4).sum()


@pytest.mark.parametrize(
    "mean",
    [masked_mean, lambda values: Mean(values.sum(), jnp.float32(values.size))],
    ids=["without a mask", "written out"],
)
@pytest.mark.parametrize("name", ["loss", "own"])
def test_a_mean_that_counts_padding_is_refused(name, mean):
    def loss(outputs, batch):
        values = outputs.sum(axis=1)
        found = {"loss": values, "own": values} | {name: mean(values)}
        return found.pop("loss"), found

    with pytest.raises(ValueError, match=rf"count of the Mean '{name}' does not depend on it.* The loss is loss \("):
        adapters.linen(cnn.CNN(10, width=2, num_stages=1), loss, EXAMPLE)


def test_a_mean_whose_total_or_count_ignores_the_mask_is_refused_and_one_without_rows_is_not():
    def loss(total, count):
        def values(outputs, batch):
            each, mask = outputs.sum(axis=1), batch["mask"]
            parts = {"masked": (each * mask).sum(), "all": each.sum(), "count": mask.sum(), "size": 6.0, "none": 1.0}
            return each, {"own": Mean(jnp.float32(parts[total]), jnp.float32(parts[count]))}

        return values

    for total, count in (("masked", "size"), ("all", "count")):
        with pytest.raises(ValueError, match="total or count of the Mean 'own'"):
            adapters.linen(cnn.CNN(10, width=2, num_stages=1), loss(total, count), EXAMPLE)
    for total, count in (("masked", "count"), ("none", "size")):
        adapters.linen(cnn.CNN(10, width=2, num_stages=1), loss(total, count), EXAMPLE)


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


# Random streams under lifted transformations


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


# Precision


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_computes_in_bfloat16_and_the_loss_sees_targets_and_outputs_in_float32(kind):
    """256 and 257 are the same number in bfloat16: a rounded target would be off by one."""
    seen = {}

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, image, *, train):
            seen["image"] = image.dtype
            return nn.Dense(1, kernel_init=nn.initializers.zeros)(image.reshape(image.shape[0], -1))[:, 0]

    class NNX(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(64, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

        def __call__(self, image):
            seen["image"] = image.dtype
            return self.dense(image.reshape(image.shape[0], -1))[:, 0]

    def loss(outputs, batch):
        seen["outputs"], seen["target"] = outputs.dtype, batch["target"].dtype
        return jnp.square(outputs - batch["target"]), {}

    batch = make_batch() | {"target": np.full(ROWS, 257.0, np.float32)}
    model = Linen() if kind == "linen" else NNX
    fns = adapters.from_model(model, loss, batch, precision="bfloat16")
    params = fns.init_fn(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    for function in (fns.loss_fn, fns.eval_fn):
        assert function(params, batch, jax.random.key(0))[0].value == 257.0**2
        assert seen == {"image": jnp.bfloat16, "outputs": jnp.float32, "target": jnp.float32}


def test_plain_functions_compute_with_rounded_inputs_and_exact_targets():
    def loss_fn(params, batch, key):
        assert (params["w"].dtype, batch["x"].dtype, batch["target"].dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
        return masked_mean(batch["target"] - batch["x"] * params["w"]), {}

    functions = adapters.Functions(lambda key: {"w": jnp.zeros(())}, loss_fn, loss_fn)
    fns = adapters.from_model(functions, None, {}, inputs="x", precision="bfloat16")
    batch = {"x": np.ones(4, np.float32), "target": np.full(4, 257.0, np.float32)}
    assert fns.eval_fn({"w": jnp.zeros(())}, batch, jax.random.key(0))[0].value == 257.0


def digits() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The scikit-learn digits as training and held-out batches."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    fields = {"image": (data.images[order, ..., None] / 16).astype(np.float32), "label": data.target[order]}
    return {k: v[:1408] for k, v in fields.items()}, {k: v[1408:] for k, v in fields.items()}


def train_on_digits(kind: str, *, num_epochs: int = 4, batch_size: int = 64) -> float:
    """Return the held-out accuracy after a plain single-device Adam loop."""
    adapt, model = ADAPT[kind]
    train, held_out = digits()
    fns = adapt(model(num_classes=10, width=16, batch_norm=True, dropout_rate=0.1), losses.classification, train)
    params, model_state = jax.jit(fns.init_fn)(jax.random.key(0))
    # Decayed to zero: at a constant rate the accuracy after the last step is a matter of luck.
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, num_epochs * (1408 // batch_size)))
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, model_state, opt_state, batch, key):
        def mean_loss(params):
            loss, _, new_state = fns.loss_fn(params, batch, key, model_state)
            return loss.value, new_state

        grads, model_state = jax.grad(mean_loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), model_state, opt_state

    order = np.concatenate([np.random.default_rng(epoch).permutation(1408) for epoch in range(num_epochs)])
    for index, rows in enumerate(order.reshape(-1, batch_size)):
        batch = {name: field[rows] for name, field in train.items()}
        params, model_state, opt_state = step(params, model_state, opt_state, batch, jax.random.key(index))
    _, metrics = jax.jit(fns.eval_fn)(params, held_out, jax.random.key(0), model_state)
    return float(metrics["accuracy"].value)


@pytest.mark.slow
def test_linen_and_nnx_learn_the_digits_equally_well():
    accuracy = {kind: train_on_digits(kind) for kind in KINDS}
    assert min(accuracy.values()) > 0.95
    # The inits differ, so the accuracies agree up to chance: 389 held-out digits, standard error 0.005 at 0.99.
    assert abs(accuracy["linen"] - accuracy["nnx"]) < 0.02, accuracy
