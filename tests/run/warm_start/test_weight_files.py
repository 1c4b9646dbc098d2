"""Weights come out of every kind of file as they went in, and no part of a file is taken for weights."""

import dataclasses

import compile_cache
import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import tiny_experiment
from optax import contrib
from trained_tiny import train

import jaxdist
from jaxdist.checkpoint import checkpoints
from jaxdist.errors import UserError
from jaxdist.run.warm_start import weight_files
from jaxdist.spmd.layout import path_name

TREE = {"params": {"Dense_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}}}
NAMED = {
    "params/Dense_0/bias": TREE["params"]["Dense_0"]["bias"],
    "params/Dense_0/kernel": TREE["params"]["Dense_0"]["kernel"],
}


def dotted():
    return {name.replace("/", "."): array for name, array in NAMED.items()}


def write_safetensors(folder):
    safetensors.numpy.save_file(dotted(), folder / "w.safetensors")
    return folder / "w.safetensors"


def write_parts(folder):
    (folder / "parts").mkdir()
    for number, (name, array) in enumerate(dotted().items()):
        safetensors.numpy.save_file({name: array}, folder / "parts" / f"model-{number}.safetensors")
    return folder / "parts"


def write_npz(folder):
    np.savez(folder / "w.npz", **dotted())
    return folder / "w.npz"


def write_msgpack(folder):
    (folder / "w.msgpack").write_bytes(flax.serialization.to_bytes(TREE))
    return folder / "w.msgpack"


def write_orbax(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "w", TREE)
    return folder / "w"


WRITERS = (write_safetensors, write_parts, write_npz, write_msgpack, write_orbax)


def opened(path, **settings):
    return weight_files.open_weights(jaxdist.InitFrom(path=path, **settings))


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_the_arrays_are_those_that_were_written(write, tmp_path):
    weights = opened(write(tmp_path))
    assert sorted(weights.names) == sorted(NAMED)
    for name, array in NAMED.items():
        found = weights.read(name)
        assert (found.dtype, found.tobytes()) == (array.dtype, array.tobytes())


@pytest.mark.parametrize("write", [write_safetensors, write_npz, write_msgpack], ids=lambda write: write.__name__)
def test_half_a_file_is_refused(write, tmp_path):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"w{path.suffix} is no whole"):
        opened(path)


def test_a_damaged_array_of_an_npz_is_refused(tmp_path):
    path = write_npz(tmp_path)
    content = path.read_bytes()
    place = content.index(np.arange(6, dtype=np.float32).tobytes())
    path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    with pytest.raises(UserError, match=r"no whole \.npz"):
        opened(path).read("params/Dense_0/kernel")


def test_a_damaged_array_of_a_compressed_npz_is_refused(tmp_path):
    path = tmp_path / "w.npz"
    np.savez_compressed(path, a=np.random.default_rng(0).normal(size=500))
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"no whole \.npz file of arrays: .*[^.]\. Copy"):
        opened(path).read("a")


def test_two_arrays_of_an_npz_with_one_name_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", **{"a.b": np.zeros(1), "a/b": np.ones(1)})
    with pytest.raises(UserError, match="two arrays with the name a/b"):
        opened(tmp_path / "w.npz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("openai-community/gpt2", None, "Nothing is downloaded"),
        ("model.bin", b"x", "is none of these"),
        ("folder", "", "is none of these"),
        ("w.npz", b"PK", "no whole .npz"),
        ("w.msgpack", b"\xc1", "no whole file of flax"),
    ],
)
def test_what_holds_no_weights_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        opened(path)


def test_a_checkpoint_is_chosen_of_runs_only(tmp_path):
    with pytest.raises(UserError, match=r"is not a run directory\. Leave it out"):
        opened(write_npz(tmp_path), checkpoint="last")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run whose optimizer keeps averaged params."""
    with compile_cache.compile_once(tmp_path_factory.mktemp("xla")):
        folder = tmp_path_factory.mktemp("averaged") / "run"
        experiment = dataclasses.replace(
            tiny_experiment.get_config(),
            optimizer=jaxdist.Optimizer(name="adam", learning_rate=0.1, ema_decay=0.9),
            stop=jaxdist.Stop(max_steps=6),
        )
        train(folder, file=None, experiment=experiment)
        return folder, experiment


def test_a_run_gives_the_params_that_it_is_used_with_of_any_checkpoint(run_dir):
    folder, experiment = run_dir
    for checkpoint in ("best", "last", 4):
        run = jaxdist.load(folder, checkpoint, experiment=experiment, devices=jax.devices()[:1])
        weights = opened(folder, checkpoint=checkpoint)
        bare = opened(folder / "checkpoints" / str(run.step))
        assert set(weights.names) == {f"params/Dense_{n}/{leaf}" for n in (0, 1) for leaf in ("bias", "kernel")}
        for number, leaf in ((0, "kernel"), (1, "bias")):
            wanted = np.asarray(run.params[f"Dense_{number}"][leaf])
            assert np.array_equal(weights.read(f"params/Dense_{number}/{leaf}"), wanted)
            assert np.array_equal(bare.read(f"params/Dense_{number}/{leaf}"), wanted)
    with pytest.raises(UserError, match="no checkpoint 5"):
        opened(folder, checkpoint=5)


def test_a_damaged_checkpoint_is_refused(run_dir, tmp_path):
    folder, _ = run_dir
    weights = opened(folder)
    state = folder / "checkpoints" / "6" / "state"
    file = max((path for path in state.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    try:
        file.write_bytes(bytes(byte ^ 1 for byte in content))  # one byte alone may be of a leaf that is not read
        with pytest.raises(UserError, match=r"damaged.* Name another checkpoint"):
            weights.read("params/Dense_0/kernel")
    finally:
        file.write_bytes(content)


def test_averaged_params_are_found_by_their_count_and_their_names():
    state = ["step", "params/a", "params/b", "model_state/m", "opt_state/0/mu/a", "opt_state/1/num_updates", "key"]
    average = ["opt_state/1/params/a", "opt_state/1/params/b"]
    assert weight_files.weights_of_state(state) == {name: name for name in ("params/a", "params/b", "model_state/m")}
    assert weight_files.weights_of_state([*state, *average])["params/b"] == "opt_state/1/params/b"
    assert weight_files.weights_of_state([*state, average[0]])["params/a"] == "params/a"


def test_the_average_of_a_schedule_free_run_is_read_from_its_checkpoint(tmp_path):
    experiment = dataclasses.replace(tiny_experiment.get_config(), optimizer=contrib.schedule_free_sgd(0.5))
    with compile_cache.compile_once(tmp_path / "xla"):
        train(tmp_path / "run", experiment=experiment, file=None)
    trained = jaxdist.load(tmp_path / "run", experiment=experiment, devices=jax.devices()[:1])
    weights = opened(tmp_path / "run")
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path({"params": trained.params})}
    assert set(weights.names) == set(leaves)
    for name, leaf in leaves.items():
        np.testing.assert_allclose(weights.read(name), leaf, rtol=1e-6, atol=1e-6)
        plain = checkpoints.open_manifest(tmp_path / "run" / "checkpoints" / "10").read_leaf(name)
        assert np.abs(plain - leaf).max() > 1e-4
