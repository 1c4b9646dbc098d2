"""Exports, read back by the libraries they are for."""

import dataclasses
import json
import types

import compile_cache
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import tiny_experiment
from trained_tiny import held_out, train

import jaxdist
from jaxdist import errors
from jaxdist.models import gpt
from jaxdist.run.use import exports


class Normalised(nn.Module):
    """Has statistics beside its params."""

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        hidden = nn.BatchNorm(use_running_average=not train)(
            nn.Dense(8)(x), mask=None if mask is None else mask[:, None]
        )
        return nn.Dense(2)(nn.relu(hidden))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with compile_cache.compile_once(tmp_path_factory.mktemp("xla")):
        run_dir = tmp_path_factory.mktemp("normalised") / "run"
        experiment = dataclasses.replace(tiny_experiment.get_config(), model=Normalised())
        train(run_dir, file=None, experiment=experiment)
        yield jaxdist.load(run_dir, experiment=experiment, devices=jax.devices()[:1])


def expected(run):
    leaves = {"params": run.params, "model_state": run.model_state}
    return {
        ".".join(str(part.key) for part in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(leaves)
    }


def assert_same_bits(found, wanted):
    assert sorted(found) == sorted(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].tobytes()) == (array.dtype, array.tobytes()), name


def test_safetensors_holds_the_very_bits(run, tmp_path):
    exports.export(run, tmp_path / "model.safetensors", "safetensors")
    assert_same_bits(safetensors.numpy.load_file(tmp_path / "model.safetensors"), expected(run))


def test_npz_holds_the_very_bits(run, tmp_path):
    exports.export(run, tmp_path / "model.npz", "npz")
    with np.load(tmp_path / "model.npz") as content:
        assert_same_bits(dict(content), expected(run))


@pytest.mark.parametrize("kind", ["npz", "safetensors", "orbax"])
@pytest.mark.parametrize("swapped", [False, True])
def test_two_arrays_of_one_name_are_refused(run, tmp_path, kind, swapped):
    flat, nested = np.zeros(2), np.ones(2)
    params = {"a.b": nested, "a": {"b": flat}} if swapped else {"a.b": flat, "a": {"b": nested}}
    with pytest.raises(errors.UserError, match=r"two are called params\.a\.b"):
        exports.export(dataclasses.replace(run, params=params), tmp_path / "model", kind)
    assert not list(tmp_path.iterdir())


def test_plain_orbax_opens_its_export(run, tmp_path):
    exports.export(run, tmp_path / "model", "orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "model")
    named = {
        ".".join(str(part.key) for part in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(found)
    }
    assert_same_bits(named, expected(run))


def test_the_compiled_function_is_the_model_for_any_number_of_rows(run, tmp_path):
    exports.export(run, tmp_path / "model.bin", "jax-export")
    function = jax.export.deserialize(bytearray((tmp_path / "model.bin").read_bytes()))
    variables = {"params": run.params, **run.model_state}
    for num_rows in (1, 5, 21):
        images = held_out(num_rows)["image"]
        wanted = run.experiment.model.apply(variables, images, train=False)
        np.testing.assert_allclose(function.call({"image": images}), wanted, rtol=1e-5, atol=1e-6)


def test_a_module_that_counts_its_calls_can_be_compiled(run, tmp_path):
    """NNX modules write into their variables: `self.count[...] += 1`."""

    def predict_fn(params, batch, model_state):
        if isinstance(model_state["count"], np.ndarray):
            model_state["count"][...] += 1
        return batch["image"]

    counting = dataclasses.replace(run, functions=run.functions._replace(predict_fn=predict_fn))
    state = {"count": jnp.zeros(2)}
    assert exports.compiled(dataclasses.replace(counting, model_state=state))


def test_a_model_that_needs_a_fixed_number_of_rows_cannot_be_compiled_for_any(run, tmp_path):
    fixed = run.functions._replace(predict_fn=lambda params, batch, state: batch["image"] + jnp.zeros((16, 1)))
    with pytest.raises(errors.UserError, match=r"any number of rows, which failed.*x\.shape\[0\]"):
        exports.export(dataclasses.replace(run, functions=fixed), tmp_path / "model.bin", "jax-export")
    assert not (tmp_path / "model.bin").exists()


@pytest.mark.parametrize("kind", exports.FORMATS)
def test_nothing_is_overwritten(run, tmp_path, kind):
    (tmp_path / "model").write_text("precious")
    with pytest.raises(errors.UserError, match="does not overwrite anything"):
        exports.export(run, tmp_path / "model", kind)
    assert (tmp_path / "model").read_text() == "precious"


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_the_names_of_classes_are_in_the_export_or_beside_it(run, tmp_path, kind):
    train = jaxdist.ArraySource({"image": np.zeros((2, 6), np.float32), "label": np.array([0, 1])})
    train.vocabulary = {"label": ("cat", "Hündin")}
    changed = dataclasses.replace(run.experiment.data, train=train, eval=None)
    experiment = dataclasses.replace(run.experiment, data=changed)
    named, path = dataclasses.replace(run, experiment=experiment), tmp_path / "model.x"
    exports.export(named, path, kind)
    assert json.loads((tmp_path / "model.x.vocabulary.json").read_text()) == {"label": ["cat", "Hündin"]}
    if kind == "safetensors":
        with safetensors.safe_open(path, "numpy") as opened:
            assert json.loads(opened.metadata()["vocabulary"]) == {"label": ["cat", "Hündin"]}
    path.unlink()
    with pytest.raises(errors.UserError, match=r"model.x.vocabulary.json exists"):
        exports.export(named, path, kind)


def test_an_unknown_format_is_refused(run, tmp_path):
    with pytest.raises(errors.UserError, match="one of safetensors, npz, orbax, jax-export; got 'onnx'"):
        exports.export(run, tmp_path / "model", "onnx")


def test_names_of_transformers_make_a_folder_with_its_config(tmp_path):
    model = gpt.GPT(5, 4, num_layers=1, num_heads=1, width=2)
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), train=False)["params"]
    made = types.SimpleNamespace(
        params=params,
        model_state=None,
        step=3,
        experiment=types.SimpleNamespace(model=model, name="tiny", data=types.SimpleNamespace(train=None)),
        record=types.SimpleNamespace(params_sha256="0"),
    )
    exports.export(made, tmp_path / "a" / "b", "safetensors", names="hugging-face")
    found = safetensors.numpy.load_file(tmp_path / "a" / "b" / "model.safetensors")
    assert np.array_equal(found["transformer.wte.weight"], params["token_embedding"]["embedding"])
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text())["n_embd"] == 2
    with pytest.raises(errors.UserError, match="exists"):
        exports.export(made, tmp_path / "a" / "b", "safetensors", names="hugging-face")
