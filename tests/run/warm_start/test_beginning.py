"""A run begins with the very weights that it was given, under every strategy, with a fresh optimizer."""

import dataclasses
import hashlib
import json

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_experiment
from trained_tiny import train

import jaxdist
from jaxdist import errors
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.models import mlp
from jaxdist.models.norm import BatchNorm
from jaxdist.paramserver.run import shared_plan
from jaxdist.run import attempt, components
from jaxdist.run.use import exports
from jaxdist.run.warm_start import beginning
from jaxdist.rundir import record
from jaxdist.spmd import state
from jaxdist.spmd.layout import path_name

pytestmark = pytest.mark.usefixtures("shared_compilations")

TINY = tiny_experiment.get_config()
AVERAGED = jaxdist.Optimizer(name="adam", learning_rate=0.1, ema_decay=0.9)
NAMES = ("params/Dense_0/bias", "params/Dense_0/kernel", "params/Dense_1/bias", "params/Dense_1/kernel")


class Normalised(nn.Module):
    """Has statistics beside its params."""

    @nn.compact
    def __call__(self, image, *, train, mask=None):
        return nn.Dense(2)(nn.relu(BatchNorm()(nn.Dense(8)(image), train=train, mask=mask)))


class Boxed(nn.Module):
    """Names the dims of a param, which puts it in a box."""

    @nn.compact
    def __call__(self, image, *, train):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", None))
        return nn.Dense(2, kernel_init=init)(image)


def change(**changes):
    return dataclasses.replace(TINY, **changes)


def parts_of(experiment, num_devices=2):
    return components.put_together(experiment, devices=jax.devices()[:num_devices])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with statistics, and what it trained."""
    run_dir = tmp_path_factory.mktemp("normalised") / "run"
    experiment = change(model=Normalised(), stop=jaxdist.Stop(max_steps=4))
    train(run_dir, file=None, experiment=experiment)
    return jaxdist.load(run_dir, experiment=experiment, devices=jax.devices()[:1])


def assert_same(some, others):
    pairs = list(zip(jax.tree.leaves(some), jax.tree.leaves(others), strict=True))
    assert pairs
    for one, other in pairs:
        assert (one.dtype, np.asarray(one).tobytes()) == (other.dtype, np.asarray(other).tobytes())


@pytest.mark.parametrize(
    ("strategy", "reduction"),
    [
        ("data-parallel", "mean"),
        pytest.param("data-parallel", "canonical", marks=pytest.mark.slow),
        pytest.param("zero1", "mean", marks=pytest.mark.slow),
        ("fsdp", "mean"),
    ],
)
def test_params_and_statistics_are_loaded_and_the_optimizer_begins_with_them(trained, strategy, reduction):
    settings = {"strategy": strategy, "reduction": reduction, "layout": jaxdist.LayoutSettings(min_size=16)}
    experiment = change(model=Normalised(), optimizer=AVERAGED, init_from=str(trained.run_dir), **settings)
    parts = parts_of(experiment)
    made = parts.create_state()
    assert_same((made.params, made.model_state), (trained.params, trained.model_state))
    # Plain optax on the loaded params: the average of the params begins with them, the moments with zeros.
    assert_same(made.opt_state, parts.optimizer.init(trained.params))
    random = parts_of(dataclasses.replace(experiment, init_from=None)).create_state()
    assert jax.tree.map(lambda leaf: leaf.sharding, made) == jax.tree.map(lambda leaf: leaf.sharding, random)
    assert np.array_equal(jax.random.key_data(made.key), jax.random.key_data(random.key))


def test_what_is_fresh_is_what_it_is_without_weights(trained):
    weights = jaxdist.InitFrom(path=str(trained.run_dir), fresh=("^params/Dense_1/",))
    parts = parts_of(change(model=Normalised(), init_from=weights))
    made = parts.create_state()
    random = state.initial_state(parts.functions.init_fn, parts_key(parts))
    assert_same(made.params["Dense_1"], random.params["Dense_1"])
    assert_same(made.params["Dense_0"], trained.params["Dense_0"])
    found = parts.check_weights()
    assert found.fresh == ("params/Dense_1/bias", "params/Dense_1/kernel") == found.left
    assert str(found).endswith("6 leaves loaded, 2 leaves left out, 2 leaves fresh")


def parts_key(parts):
    return shared_plan.keys.run_keys(shared_plan.keys.from_seed(parts.experiment.seed)).init


@pytest.mark.parametrize("kind", ["safetensors", "npz", "orbax"])
def test_an_export_is_loaded_whole(trained, tmp_path, kind):
    path = tmp_path / (f"model.{kind}" if kind != "orbax" else "model")
    exports.export(trained, path, kind)
    made = parts_of(change(model=Normalised(), init_from=str(path)), 1).create_state()
    assert_same((made.params, made.model_state), (trained.params, trained.model_state))


def test_the_variables_of_a_flax_module_are_loaded_from_msgpack(tmp_path):
    module = Normalised()
    variables = module.init(jax.random.key(7), jnp.zeros((1, 6)), train=False)
    (tmp_path / "w.msgpack").write_bytes(flax.serialization.to_bytes(variables))
    made = parts_of(change(model=module, init_from=str(tmp_path / "w.msgpack")), 1).create_state()
    assert_same(made.params, variables["params"])
    assert_same(made.model_state["batch_stats"], variables["batch_stats"])


def test_a_param_in_a_box_has_the_name_without(tmp_path):
    kernel, bias = np.ones((6, 2), np.float32), np.zeros(2, np.float32)
    np.savez(tmp_path / "w.npz", **{"Dense_0.kernel": kernel, "Dense_0.bias": bias})
    made = parts_of(change(model=Boxed(), init_from=str(tmp_path / "w.npz")), 1).create_state()
    assert_same(made.params, {"Dense_0": {"bias": bias, "kernel": kernel}})


def test_values_are_changed_by_a_function_and_widened_but_never_narrowed(tmp_path):
    arrays = {
        "a.kernel": np.arange(48.0, dtype=np.float32).reshape(8, 6),
        "a.bias": np.ones(8, np.float16),
        "b.kernel": np.ones((8, 2), np.float32),
        "b.bias": np.zeros(2, np.float64),
    }
    np.savez(tmp_path / "w.npz", **arrays)
    rules = (
        jaxdist.WeightRule(pattern="^a/kernel", to="Dense_0/kernel", function=np.transpose),
        jaxdist.WeightRule(pattern="^a/", to="Dense_0/"),
        jaxdist.WeightRule(pattern="^b/", to="Dense_1/"),
    )

    def parts(*rules):
        weights = jaxdist.InitFrom(path=str(tmp_path / "w.npz"), rules=rules)
        return parts_of(change(init_from=weights), 1)

    with pytest.raises(errors.UserError, match=r"b/bias of .* is float64, which float32 cannot hold exactly"):
        parts(*rules).check_weights()
    with pytest.raises(errors.UserError, match=r"has \(8, 6\) and needs \(6, 8\)"):
        parts(*rules[1:]).check_weights()
    narrowed = jaxdist.WeightRule(pattern="b/bias", to="Dense_1/bias", function=lambda array: array.astype(np.float32))
    made = parts(narrowed, *rules).create_state()
    assert np.array_equal(made.params["Dense_0"]["kernel"], arrays["a.kernel"].T)
    assert np.array_equal(made.params["Dense_0"]["bias"], np.ones(8, np.float32))


def test_the_mistake_of_a_rules_function_has_its_place(tmp_path):
    np.savez(tmp_path / "w.npz", **{name.replace("/", "."): np.zeros(1, np.float32) for name in NAMES})
    weights = jaxdist.InitFrom(
        path=str(tmp_path / "w.npz"), rules=(jaxdist.WeightRule(pattern="", function=lambda array: array.missing),)
    )
    with pytest.raises(errors.UserError, match=r"AttributeError: .*test_beginning.py:\d+, in <lambda>"):
        parts_of(change(init_from=weights), 1).check_weights()


def run(run_dir, experiment, **options):
    settings = attempt.RunOptions(run_dir=run_dir, silent=True, **options)
    return attempt.train(experiment, settings, devices=jax.devices()[:1])


def test_a_run_records_what_it_began_with_and_resumes_without_it(trained, tmp_path):
    path, run_dir = tmp_path / "w.npz", tmp_path / "run"
    exports.export(trained, path, "npz")
    experiment = change(model=Normalised(), init_from=str(path))
    run(run_dir, dataclasses.replace(experiment, stop=jaxdist.Stop(max_steps=2)))
    made = json.loads((run_dir / "run.json").read_text())
    began = made["init_from"]
    leaves = jax.tree.leaves((trained.params, trained.model_state))
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()
    assert (began["source"], began["sha256"], began["left"], began["fresh"]) == (str(path), digest, [], [])
    assert len(began["loaded"]) == len(leaves)
    path.unlink()
    run(run_dir, dataclasses.replace(experiment, stop=jaxdist.Stop(max_steps=5)), resume=True)
    resumed = json.loads((run_dir / "run.json").read_text())
    assert (resumed["step"], resumed["init_from"], resumed["identity"]) == (5, began, made["identity"])
    with pytest.raises(errors.UserError, match=r"another experiment: init_from.path \S+ -> None\. To"):
        run(run_dir, dataclasses.replace(experiment, init_from=None), resume=True)
    assert jaxdist.load(run_dir, experiment=experiment, devices=jax.devices()[:1]).step == 5


def test_a_run_without_weights_has_the_identity_that_it_always_had(trained):
    assert set(trained.record.extra["identity"]) == {"name", "model", "data", "seed"}
    assert trained.record.extra["init_from"] is None
    identity = components.Identity("tiny", "model", "data", 0)
    assert str(identity) == "tiny:" + hashlib.sha256(b'["model", "data", 0]').hexdigest()[:12]
    assert str(identity) != str(dataclasses.replace(identity, init_from="x"))


def test_a_run_that_saved_nothing_begins_again_with_the_same_weights_or_not_at_all(trained, tmp_path):
    class Stopped(BaseException):
        pass

    def stop(step):
        raise Stopped

    path, run_dir = tmp_path / "w.npz", tmp_path / "run"
    exports.export(trained, path, "npz")
    experiment = change(model=Normalised(), init_from=str(path), stop=jaxdist.Stop(max_steps=2))
    with pytest.raises(Stopped):
        run(run_dir, experiment, stop_requested=stop)
    arrays = exports.named_arrays(trained)
    np.savez(path, **{name: array + 1 for name, array in arrays.items()})
    with pytest.raises(errors.UserError, match="have changed since"):
        run(run_dir, experiment, resume=True)
    np.savez(path, **arrays)
    assert run(run_dir, experiment, resume=True).step == 2


def test_a_param_that_is_no_number_is_refused_and_a_statistic_is_not(tmp_path):
    parts = parts_of(change(model=Normalised()), 1)
    state = parts.create_state()
    for tree, leaf in (("params", "Dense_1/bias"), ("model_state", "mean")):
        trees = {"params": state.params, "model_state": state.model_state}
        arrays = {path_name(place): np.array(each) for place, each in jax.tree_util.tree_leaves_with_path(trees)}
        [name] = [name for name in arrays if name.startswith(tree) and name.endswith(leaf)]
        arrays[name][1] = np.nan
        np.savez(tmp_path / f"{tree}.npz", **arrays)
    with pytest.raises(errors.UserError, match=r"params/Dense_1/bias .* is NaN at 1 of \d+ places"):
        parts_of(change(model=Normalised(), init_from=str(tmp_path / "params.npz")), 1).check_weights()
    parts_of(change(model=Normalised(), init_from=str(tmp_path / "model_state.npz")), 1).check_weights()


def test_a_mistake_is_found_before_there_is_a_run_directory(trained, tmp_path):
    mistakes = {
        "nothing is there": (change(init_from="gpt2"), "Nothing is downloaded"),
        "another model": (change(model=mlp.MLP(2, width=4), init_from=str(trained.run_dir)), "Missing, of the model"),
        "another width": (change(model=Wider(), init_from=str(trained.run_dir)), r"has \(8,\) and needs \(9,\)"),
    }
    for experiment, message in mistakes.values():
        with pytest.raises(errors.UserError, match=message):
            run(tmp_path / "run", experiment)
    assert not (tmp_path / "run").exists()


class Wider(nn.Module):
    """Normalised with another width, under the same names."""

    @nn.compact
    def __call__(self, image, *, train, mask=None):
        return nn.Dense(2)(nn.relu(BatchNorm()(nn.Dense(9)(image), train=train, mask=mask)))


def test_a_run_does_not_overwrite_what_it_begins_with(trained):
    experiment = change(model=Normalised(), init_from=str(trained.run_dir / "checkpoints" / str(trained.step)))
    with pytest.raises(errors.UserError, match="--overwrite removes"):
        run(trained.run_dir, experiment, overwrite=True)
    assert (trained.run_dir / record.FILE_NAME).exists()


def test_frozen_params_keep_the_loaded_bits_and_a_head_learns_at_its_own_rate(trained):
    """Under SGD, beside plain JAX: a frozen body, a fresh head at twice the learning rate."""
    groups = (
        jaxdist.Group(pattern="^(Dense_0|BatchNorm_0)/", frozen=True),
        jaxdist.Group(pattern="^Dense_1/", learning_rate=2.0),
    )
    experiment = change(
        model=Normalised(),
        optimizer=jaxdist.Optimizer(name="sgd", learning_rate=0.1, groups=groups),
        init_from=jaxdist.InitFrom(path=str(trained.run_dir), fresh=("^params/Dense_1/",)),
    )
    parts = parts_of(experiment, 1)
    made = parts.create_state()
    before = jax.tree.map(np.asarray, made.params)
    batch, _ = next(parts.batches())

    def loss(params):
        module = Normalised()
        variables = {"params": params, **made.model_state}
        outputs, _ = module.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"]).mean()

    grads = jax.grad(loss)(before)
    after, _ = parts.step(made, batch)
    for name in ("Dense_0", "BatchNorm_0"):
        assert_same(after.params[name], before[name])
    wanted = jax.tree.map(lambda param, grad: param - 0.2 * grad, before["Dense_1"], grads["Dense_1"])
    for one, other in zip(jax.tree.leaves(after.params["Dense_1"]), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_plan_of_a_parameter_server_gets_the_same_leaves(trained):
    weights = jaxdist.InitFrom(path=str(trained.run_dir), fresh=("^params/Dense_1/",))
    experiment = change(model=Normalised(), init_from=weights)
    plan = shared_plan.make_plan(experiment, ParameterServer(), kind="elementwise")
    found = beginning.open_for(experiment, shared_plan.initial_shapes(plan))
    leaves = beginning.replace_leaves(found, shared_plan.initial_leaves(plan))
    made = parts_of(experiment, 1).create_state()
    assert_same(leaves, (made.params, made.model_state))
