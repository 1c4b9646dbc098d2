import dataclasses
import types

import compile_cache
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_problem
import tiny_experiment
from flax import linen as nn
from flax import nnx
from optax import contrib
from sklearn import metrics as sklearn_metrics

import jaxdist
from jaxdist import adapters, losses, optimizers
from jaxdist.config import overrides
from jaxdist.errors import ConfigError, UserError
from jaxdist.models import mlp
from jaxdist.run import components


@pytest.fixture
def experiment():
    return tiny_experiment.get_config()


def put_together(experiment, num_devices=2):
    return components.put_together(experiment, devices=jax.devices()[:num_devices])


def test_the_parts_fit_each_other(experiment):
    parts = put_together(experiment)
    assert parts.strategy.mesh.size == 2
    assert parts.sizes.device_batch_size == 8
    assert parts.loader.steps_per_epoch == 4
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), parts.create_state())
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), parts.abstract_state)


def test_batches_go_on_from_a_position_and_never_end(experiment):
    parts = put_together(experiment)
    batches = parts.batches()
    first = [next(batches) for _ in range(6)]
    assert [position.epoch for _, position in first] == [0] * 4 + [1] * 2
    again = parts.batches(first[2][1])
    for batch, position in first[3:]:
        other, other_position = next(again)
        assert other_position == position
        assert jax.tree.all(jax.tree.map(np.array_equal, batch, other))
    batches.close()
    again.close()


def test_evaluation_counts_each_held_out_example_once(experiment):
    parts = put_together(experiment)
    state = parts.create_state()
    fields = experiment.data.eval.arrays
    outputs = experiment.model.apply({"params": state.params}, fields["image"], train=False)
    accuracy = (np.argmax(outputs, axis=1) == fields["label"]).mean()
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, fields["label"]).mean()
    assert parts.evaluate(state) == {"accuracy": pytest.approx(accuracy), "loss": pytest.approx(float(loss), rel=1e-5)}


def test_scores_of_several_sets_are_those_of_scikit_learn(experiment):
    """Ragged ends included: 21 and 5 examples in batches of 16 on 4 devices."""
    sets = {"day": experiment.data.eval, "night": tiny_experiment.make_source(5, 7)}
    experiment = dataclasses.replace(
        experiment,
        data=jaxdist.Data(train=experiment.data.train, eval=sets, num_threads=0),
        eval=jaxdist.Evaluation(metrics=(losses.F1(), losses.RocAuc())),
    )
    found = {}
    for reduction in ("mean", "canonical"):
        parts = put_together(dataclasses.replace(experiment, reduction=reduction), 4)
        state = parts.create_state()
        found[reduction] = parts.evaluate(state)
    for name, source in sets.items():
        outputs = np.asarray(experiment.model.apply({"params": state.params}, source.arrays["image"], train=False))
        labels, predicted = source.arrays["label"], np.argmax(outputs, axis=1)
        wanted = {
            "accuracy": (predicted == labels).mean(),
            "f1": sklearn_metrics.f1_score(labels, predicted, average="macro", zero_division=0),
            "roc_auc": sklearn_metrics.roc_auc_score(labels, outputs[:, 1] - outputs[:, 0]),
        }
        for each in found.values():
            assert {metric: each[f"{name}/{metric}"] for metric in wanted} == pytest.approx(wanted)
            assert f"{name}/loss" in each


class Twice:
    names = ("accuracy",)

    def collect(self, outputs, batch):
        return {"rows": outputs[:1] if batch["label"].shape[0] > 1 else outputs}

    def compute(self, rows):
        return {"accuracy": 1.0}


class SameName(Twice):
    def collect(self, outputs, batch):
        return {"rows": outputs}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval": jaxdist.Evaluation(metrics=(Twice(),))}, "a row for each of 16 examples"),
        ({"eval": jaxdist.Evaluation(metrics=(SameName(),))}, "accuracy comes twice"),
        ({"eval": jaxdist.Evaluation(metrics=(losses.R2(),))}, "needs the batch field 'target'"),
        ({"eval": jaxdist.Evaluation(metrics=(losses.ConfusionMatrix(num_classes=1),))}, "needs num_classes=2"),
        ({"stop": jaxdist.Stop(max_steps=3, target=0.9, target_metric="eval/f2")}, "Did you mean 'eval/f1'"),
    ],
)
def test_a_score_that_cannot_be_is_refused_before_the_run(experiment, changes, message):
    experiment = dataclasses.replace(experiment, eval=jaxdist.Evaluation(metrics=(losses.F1(),)))
    with pytest.raises(ConfigError, match=message):
        put_together(dataclasses.replace(experiment, **changes), 1)


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda rows: 1 / 0, r"ZeroDivisionError: division by zero \(.*test_components\.py:\d+, in "),
        (lambda rows: None, "NoneType"),
        (lambda rows: {"own": rows["rows"]}, "a number for each"),
        (lambda rows: {"other": 1}, r"reports \['other'\], but its names are \['own'\]"),
    ],
)
def test_a_metric_that_fails_is_named_and_what_was_trained_is_kept(experiment, tmp_path, compute, message):
    metric = types.SimpleNamespace(names=("own",), collect=SameName().collect, compute=compute)
    experiment = dataclasses.replace(experiment, eval=jaxdist.Evaluation(metrics=(metric,), every_steps=2))
    with pytest.raises(UserError, match=message) as raised:
        jaxdist.train(experiment, tmp_path / "run", devices=jax.devices()[:1], silent=True)
    assert "eval.metrics" in str(raised.value) or "its names" in str(raised.value)
    assert jaxdist.load(tmp_path / "run", experiment=experiment, devices=jax.devices()[:1]).step == 2


def test_averaged_params_are_evaluated_where_the_optimizer_keeps_them(experiment):
    averaging = put_together(overrides.override(experiment, ["optimizer.ema_decay=0.9"]))
    state = averaging.create_state()
    with_zeros = dataclasses.replace(
        state,
        opt_state=jax.tree.map(
            lambda node: node._replace(params=jax.tree.map(np.zeros_like, node.params)) if is_ema(node) else node,
            state.opt_state,
            is_leaf=is_ema,
        ),
    )
    assert averaging.evaluate(with_zeros)["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert averaging.evaluate(state)["loss"] != pytest.approx(np.log(2), rel=1e-5)


@pytest.mark.parametrize("strategy", ["data-parallel", "zero1"])
def test_schedule_free_params_are_evaluated_as_in_plain_optax(experiment, strategy):
    """The run trains y, at which gradients are taken; what is used is their average x."""
    optimizer = contrib.schedule_free_sgd(0.5)
    changes = {"optimizer": optimizer, "strategy": strategy, "layout": jaxdist.LayoutSettings(min_size=1)}
    experiment = dataclasses.replace(experiment, model=mlp.MLP(num_classes=2, width=8, num_layers=1), **changes)
    parts = put_together(experiment)
    state, batches = parts.create_state(), parts.batches()
    params = jax.device_get(state.params)
    opt_state = optimizer.init(params)

    def loss(params, fields):
        outputs = experiment.model.apply({"params": params}, fields["image"], train=False)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, fields["label"]).mean()

    for _ in range(3):
        batch, _ = next(batches)
        updates, opt_state = optimizer.update(jax.grad(loss)(params, jax.device_get(batch)), opt_state, params)
        params = optax.apply_updates(params, updates)
        state, _ = parts.step(state, batch)
    batches.close()
    held_out = experiment.data.eval.arrays
    expected = loss(contrib.schedule_free_eval_params(opt_state, params), held_out)
    assert abs(expected - loss(params, held_out)) > 1e-3
    assert parts.evaluate(state)["loss"] == pytest.approx(float(expected), rel=1e-4)


def is_ema(node):
    return isinstance(node, optimizers.EmaState)


def test_the_learning_rate_of_a_step_is_that_of_its_update(experiment):
    parts = put_together(
        overrides.override(
            experiment, ["optimizer.schedule.name=linear", "optimizer.schedule.warmup=2", "stop.max_steps=6"]
        )
    )
    assert [parts.learning_rate(step) for step in (1, 2, 3, 7)] == pytest.approx([0.05, 0.1, 0.1, 0.0])
    assert put_together(dataclasses.replace(experiment, optimizer=optax.sgd(0.1))).learning_rate is None


def test_a_schedule_without_a_known_end_is_refused(experiment):
    endless = dataclasses.replace(experiment, stop=jaxdist.Stop(max_seconds=5.0))
    with pytest.raises(ValueError, match="needs to know where it ends"):
        put_together(overrides.override(endless, ["optimizer.schedule.name=cosine"]))


CHANGES = {
    "name": True,
    "model": True,
    "seed": True,
    "data": True,
    "stop": False,
    "global_batch_size": False,
    "reduction": False,
}


@pytest.mark.parametrize("field", CHANGES)
def test_identity_is_name_model_data_and_seed(experiment, field):
    values = {
        "name": "other",
        "model": mlp.MLP(num_classes=2, width=9, num_layers=1),
        "seed": 1,
        "data": jaxdist.Data(train=tiny_experiment.make_source(52, 7)),
        "stop": jaxdist.Stop(max_steps=99),
        "global_batch_size": 8,
        "reduction": "canonical",
    }
    changed = dataclasses.replace(experiment, **{field: values[field]})
    assert (components.identity(changed) != components.identity(experiment)) == CHANGES[field]
    assert components.identity(tiny_experiment.get_config()) == components.identity(experiment)


def test_a_batch_that_does_not_divide_names_the_nearest_that_do(experiment):
    with pytest.raises(ValueError, match=r"15.*14 or 16"):
        put_together(dataclasses.replace(experiment, global_batch_size=15))


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ["stop.target=0.9", "stop.target_metric=eval/acuracy"],
            r"stop\.target_metric is 'eval/acuracy'.*'eval/accuracy'",
        ),
        (
            ["stop.patience=2", "stop.target_metric=accuracy"],
            r"'accuracy'.*It reports: train/loss, train/accuracy, train/grad_norm, eval",
        ),
        (
            ["stop.patience=2", "stop.target_metric=train/loss"],
            r"counts evaluations, but train/loss is no eval/ metric",
        ),
        (["checkpoints.best_metric=eval/f1"], r"checkpoints\.best_metric is 'eval/f1'"),
    ],
)
def test_a_metric_that_will_never_come_is_not_waited_for(experiment, assignments, message):
    with pytest.raises(ConfigError, match=message):
        put_together(overrides.override(experiment, assignments))


def test_metrics_that_will_come_may_be_waited_for(experiment):
    watching = ["stop.patience=2", "stop.target=0.1", "stop.mode=min", "stop.target_metric=eval/loss"]
    put_together(overrides.override(experiment, [*watching, "checkpoints.best_metric=train/accuracy"]))


def functions_of(init_fn):
    def loss_fn(params, batch, key):
        del key
        outputs = jnp.abs(batch["image"] @ params["w"]) - batch["label"]
        return jaxdist.masked_mean(outputs**2, batch["mask"]), {}

    return adapters.Functions(init_fn, loss_fn, loss_fn)


def test_complex_params_train_and_average_as_in_plain_jax(experiment):
    """Under SGD: JAX's gradient of a complex param is the conjugate of what goes downhill."""
    start = np.linspace(-1, 1, 6) + 1j * np.linspace(1, 0.5, 6)
    experiment = dataclasses.replace(
        experiment,
        model=functions_of(lambda key: {"w": jnp.asarray(start, jnp.complex64)}),
        loss=None,
        optimizer=jaxdist.Optimizer(name="sgd", learning_rate=0.1, ema_decay=0.5),
    )
    parts = put_together(experiment)
    state, w = parts.create_state(), start
    averaged, batches = w, parts.batches()
    for update in range(1, 6):  # the fourth batch is the ragged one
        batch, _ = next(batches)
        state, _ = parts.step(state, batch)
        x, y = (np.asarray(batch[name], np.float64)[np.asarray(batch["mask"]) > 0] for name in ("image", "label"))
        outputs = x @ w
        downhill = ((2 * (np.abs(outputs) - y) * outputs / np.abs(outputs))[:, None] * x).mean(axis=0)
        w = w - 0.1 * downhill
        decay = min(0.5, (1 + update) / (10 + update))
        averaged = decay * averaged + (1 - decay) * w
    batches.close()
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-4)
    kept = components.params_in_use(state)["w"]
    assert abs(np.asarray(kept).imag).min() > 0.01
    np.testing.assert_allclose(kept, averaged, rtol=1e-4)


def test_an_init_of_weak_types_compiles_the_step_once(experiment):
    experiment = dataclasses.replace(experiment, model=functions_of(lambda key: {"w": jnp.full(6, 1.0)}), loss=None)
    parts = put_together(experiment)
    state, batches = parts.create_state(), parts.batches()
    with small_problem.counted_compiles() as compiles:
        state, _ = parts.step(state, next(batches)[0])
        before = len(compiles)
        for _ in range(2):
            state, _ = parts.step(state, next(batches)[0])
    batches.close()
    assert 0 < before == len(compiles)


def test_a_sweep_over_learning_rates_compiles_the_step_once(experiment, tmp_path):
    missed, counts = [], []

    def listen(event, **_):
        if event == "/jax/compilation_cache/cache_misses":
            missed.append(event)

    jax.monitoring.register_event_listener(listen)
    with compile_cache.compile_once(tmp_path):
        for rate in ("0.1", "0.3"):
            parts = put_together(overrides.override(experiment, [f"optimizer.learning_rate={rate}"]))
            batches = parts.batches()
            parts.step(parts.create_state(), next(batches)[0])
            batches.close()
            counts.append(len(missed))
    jax.monitoring.unregister_event_listener(listen)
    assert 0 < counts[0] == counts[1]


class LinenHolding(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        held = self.variable("constants", "held", lambda: jnp.full((1, x.shape[-1]), 0.1, jnp.float32))
        self.variable("constants", "mask", lambda: jnp.float32(jnp.finfo(jnp.float32).min))
        return nn.Dense(2)(x * held.value)


class NnxHolding(nnx.Module):
    def __init__(self, rngs):
        self.held, self.layer = nnx.Variable(jnp.full((1, 4), 0.1)), nnx.Linear(4, 2, rngs=rngs)
        self.mask = nnx.Variable(jnp.float32(jnp.finfo(jnp.float32).min))

    def __call__(self, x):
        return self.layer(x * self.held[...])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [LinenHolding(), lambda rngs: NnxHolding(rngs)])
def test_constants_of_a_module_keep_their_bits_in_training(model, precision):
    """The batch is of 14 examples, of which the last has 11: no power of two."""
    fields = {"x": np.ones((25, 4), np.float32), "label": np.zeros(25, np.int32)}
    experiment = jaxdist.Experiment(
        model=model,
        loss=losses.classification,
        inputs="x",
        data=jaxdist.Data(train=fields),
        optimizer=jaxdist.Optimizer(name="sgd", learning_rate=0.1),
        global_batch_size=14,
        precision=precision,
        stop=jaxdist.Stop(max_steps=4),
    )
    parts = components.put_together(experiment, devices=jax.devices()[:2])
    state = parts.create_state()
    before = jax.device_get(state.model_state)
    for (batch, _), _ in zip(parts.batches(), range(4)):
        state, _ = parts.step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.model_state), before)
    assert len(jax.tree.leaves(before)) == 2
