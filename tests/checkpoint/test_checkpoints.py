import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.checkpoint import manifest
from jaxdist.checkpoint.checkpoints import Checkpointer, CheckpointError, DamagedCheckpointError
from jaxdist.guards import recompile, replicas
from jaxdist.spmd.layout import path_name
from jaxdist.spmd.mesh import make_mesh
from jaxdist.spmd.state import TrainState, abstract_state, create_state
from jaxdist.spmd.step import data_parallel_step

P = PartitionSpec
MESH = make_mesh()
DTYPES = ("float32", "bfloat16", "float16", "int8", "int32", "uint32", "bool", "complex64", "float8_e4m3fn")


class Slots(NamedTuple):
    count: jax.Array
    slots: dict


def random_bits(shape, dtype, seed):
    generator = np.random.default_rng(seed)
    if dtype == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    return np.frombuffer(generator.bytes(size), jnp.dtype(dtype)).reshape(shape)  # NaNs of every kind among them.


def make_state(mesh, spec=None, seed=0):
    """Return a state with every kind of leaf; `spec` is the PartitionSpec of its two-dimensional leaves."""
    spec = P() if spec is None else spec

    def put(value, spec):
        return jax.device_put(value, NamedSharding(mesh, spec))

    slots = {name: put(random_bits((8, 16), name, seed + i), spec) for i, name in enumerate(DTYPES)}
    return TrainState(
        step=put(np.int32(7 + seed), P()),
        params={
            "dense": {"kernel": put(random_bits((16, 8), "float32", seed), spec)},
            "empty": put(np.zeros((0, 4)), P()),
        },
        model_state=None,
        opt_state=(Slots(put(np.int32(seed), P()), slots), optax.EmptyState()),
        key=put(jax.random.key(seed), P()),
    )


def template_of(state, mesh=None, spec=None):
    def struct(leaf):
        where = leaf.sharding if mesh is None else NamedSharding(mesh, spec if leaf.ndim == 2 and leaf.size else P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(struct, state)


def bits(state):
    """Return path -> dtype, shape and bytes of every leaf."""

    def of(leaf):
        data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        return str(leaf.dtype), leaf.shape, np.asarray(data).tobytes()

    return {jax.tree_util.keystr(path): of(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def small_state(value, size=4):
    w = jax.device_put(jnp.full(size, value, jnp.float32), NamedSharding(MESH, P()))
    return {"params": {"w": w, "b": w[:2] + 1}, "key": jax.device_put(jax.random.key(value), w.sharding)}


def saved_steps(directory, *steps, **options):
    with Checkpointer(directory, identity="test", **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, small_state(step), {"position": step}, {})
    return directory


LAYOUTS = {
    "replicated": (MESH, P()),
    "one device": (make_mesh(devices=jax.devices()[:1]), P()),
    "two devices": (make_mesh(devices=jax.devices()[:2]), P(None, "data")),
    "rows": (MESH, P("data")),
    "columns and copies": (make_mesh({"data": 2, "model": 4}), P(None, "model")),
    "blocks": (make_mesh({"data": 4, "model": 2}), P("data", "model")),
}


@pytest.mark.parametrize("written", LAYOUTS)
def test_what_is_restored_is_what_was_saved_to_the_bit_on_any_layout(tmp_path, written):
    state = make_state(*LAYOUTS[written])
    with Checkpointer(tmp_path, identity="test") as checkpointer:
        checkpointer.save(3, state, {"epoch": 1, "seeds": [1, 2]}, {"loss": float("nan")})
        for read in LAYOUTS.values():
            template = template_of(state, *read)
            restored, data_state = checkpointer.restore(template)
            assert data_state == {"epoch": 1, "seeds": [1, 2]}
            assert jax.tree.structure(restored) == jax.tree.structure(state)
            assert bits(restored) == bits(state)
            for leaf, struct in zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True):
                assert leaf.sharding == struct.sharding


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_every_kind_come_back(tmp_path, impl):
    sharding = NamedSharding(MESH, P())
    state = {"key": jax.device_put(jax.random.key(5, impl=impl), sharding)}
    state["keys"] = jax.device_put(jax.random.split(state["key"], (2, 3)), sharding)
    with Checkpointer(tmp_path, identity="test") as checkpointer:
        checkpointer.save(1, state, {}, {})
        restored, _ = checkpointer.restore(template_of(state))
    assert bits(restored) == bits(state)
    assert jax.random.key_impl(restored["key"]) == jax.random.key_impl(state["key"])


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    """Views of donated memory, written while the next steps run, would contain the values of those steps."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    for sharding in (NamedSharding(MESH, P()), NamedSharding(MESH, P("data"))):
        state = step(jax.device_put({"w": jnp.zeros((8, 1 << 16)), "n": jnp.zeros(8, jnp.int32)}, sharding))
        with Checkpointer(tmp_path / str(sharding.spec), identity="test", keep_last=9) as checkpointer:
            for number in range(1, 4):
                checkpointer.save(number, state, {}, {})
                for _ in range(3):
                    state = step(state)
            for number in range(1, 4):
                restored, _ = checkpointer.restore(template_of(state), number)
                assert all((np.asarray(leaf) == 3 * number - 2).all() for leaf in jax.tree.leaves(restored))


def loss_fn(params, batch, key):
    return jnp.square(batch["x"] @ params["w"]).mean(), {}


def test_training_goes_on_from_a_restored_state_as_if_it_had_not_stopped(tmp_path):
    """The same bits, the same program, and nothing shared between the devices' copies (donation would show it)."""
    optimizer = optax.adamw(0.1)
    init = lambda key: {"w": jax.random.normal(key, (3, 2))}  # noqa: E731
    step, sentinel = data_parallel_step(loss_fn, optimizer, MESH), recompile.RecompileSentinel()
    batch = jax.device_put({"x": np.arange(24, dtype=np.float32).reshape(8, 3)}, NamedSharding(MESH, P("data")))
    state = create_state(init, optimizer, mesh=MESH, seed=0)
    with Checkpointer(tmp_path, identity="test") as checkpointer:
        checkpointer.save(0, state, {}, {})
        for _ in range(3):
            sentinel.observe(step, (state, batch))
            state, _ = step(state, batch)
        restored, _ = checkpointer.restore(abstract_state(init, optimizer, mesh=MESH))
    for _ in range(3):
        old, (restored, _) = restored, step(restored, batch)
        assert sentinel.observe(step, (old, batch)) is None
        replicas.check_replicas(restored, MESH)
    assert bits(restored) == bits(state)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keep_last=st.integers(1, 3),
    keep_every=st.sampled_from([None, 2, 3]),
    mode=st.sampled_from(["max", "min"]),
    scores=st.lists(st.sampled_from([None, 0.0, 1.0, 2.0, float("nan")]), min_size=1, max_size=6),
)
def test_the_last_the_every_nth_and_the_best_step_stay(tmp_path_factory, keep_last, keep_every, mode, scores):
    directory = tmp_path_factory.mktemp("steps")
    options = {"keep_last": keep_last, "keep_every": keep_every, "best_metric": "accuracy", "best_mode": mode}
    state = small_state(0)
    expected: set[int] = set()
    best = None
    for step, score in enumerate(scores, start=1):
        # A new Checkpointer each time: nothing may depend on the memory of an earlier one.
        with Checkpointer(directory, identity="test", **options) as checkpointer:
            checkpointer.save(step, state, {}, {} if score is None else {"accuracy": score})
        if score is not None and score == score:
            better = best is None or (score > scores[best - 1] if mode == "max" else score < scores[best - 1])
            best = step if better else best
        kept_by_age = sorted(expected | {step})[-keep_last:]
        expected = {
            kept
            for kept in expected | {step}
            if kept in kept_by_age or kept == best or (keep_every and kept % keep_every == 0)
        }
        assert checkpointer.steps() == sorted(expected)
        assert checkpointer.best_step() == best
        assert checkpointer.latest_step() == step


def test_a_step_saved_again_counts_with_its_new_metrics(tmp_path):
    with Checkpointer(tmp_path, identity="test", keep_last=3, best_metric="accuracy") as checkpointer:
        for step, accuracy in ((1, 0.9), (2, 0.8), (1, 0.1)):
            checkpointer.save(step, small_state(step), {}, {"accuracy": accuracy})
            checkpointer.wait()
            assert checkpointer.best_step() == (2 if accuracy < 0.5 else 1)


def test_a_twentieth_of_the_time_is_told_from_what_a_save_took(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    with Checkpointer(tmp_path, identity="test", clock=lambda: clock.now) as checkpointer:
        assert checkpointer.may_save(0.05), "there was none"
        finish = checkpointer._finish

        def slow(*arguments):
            clock.now += 2.0
            finish(*arguments)

        monkeypatch.setattr(checkpointer, "_finish", slow)
        checkpointer.save(1, small_state(1), {}, {})
        checkpointer.wait()
        clock.now = 139.9
        assert not checkpointer.may_save(0.05)
        clock.now = 140.1
        assert checkpointer.may_save(0.05)


def test_a_damaged_manifest_does_not_stop_saving_and_is_nobodys_best(tmp_path):
    with Checkpointer(tmp_path, identity="test", keep_last=2, best_metric="accuracy") as checkpointer:
        checkpointer.save(1, small_state(1), {}, {"accuracy": 0.9})
    (tmp_path / "1" / "manifest" / "process-0.json").write_text("{")
    with Checkpointer(tmp_path, identity="test", keep_last=2, best_metric="accuracy") as checkpointer:
        checkpointer.save(2, small_state(2), {}, {"accuracy": 0.1})
        checkpointer.wait()
        assert checkpointer.best_step() == 2
        assert checkpointer.steps() == [1, 2]


def test_a_run_that_went_back_keeps_its_own_newest_step(tmp_path):
    saved_steps(tmp_path, 1, 5, keep_last=3)
    with Checkpointer(tmp_path, identity="test", keep_last=1) as checkpointer:
        checkpointer.save(2, small_state(2), {}, {})
        checkpointer.wait()
        assert checkpointer.steps() == [2, 5]


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    saved_steps(tmp_path, 4)
    for value in (8, 9):
        with Checkpointer(tmp_path, identity="test") as checkpointer:
            checkpointer.save(4, small_state(value), {"value": value}, {})
            restored, data_state = checkpointer.restore(template_of(small_state(0)))
        assert bits(restored) == bits(small_state(value))
        assert data_state == {"value": value}
        assert checkpointer.steps() == [4]
        assert len(list(tmp_path.iterdir())) == 1


def test_only_committed_steps_count(tmp_path):
    saved_steps(tmp_path, 1)
    for name in ("2.orbax-checkpoint-tmp", "removed-3", "notes", "4.5.6", "007"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    checkpointer = Checkpointer(tmp_path, identity="test")
    assert checkpointer.steps() == [1]
    checkpointer.save(5, small_state(5), {}, {})
    checkpointer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["007", "1", "4.5.6", "5", "notes"]


def test_nothing_to_restore_is_said(tmp_path):
    checkpointer = Checkpointer(tmp_path / "none", identity="test")
    assert (checkpointer.latest_step(), checkpointer.best_step(), checkpointer.newest_intact()) == (None, None, None)
    with pytest.raises(CheckpointError, match=r"There is no checkpoint in .*none"):
        checkpointer.restore(template_of(small_state(0)))
    assert not (tmp_path / "none").exists()
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 2 in .* it holds steps \[1\]"):
        Checkpointer(saved_steps(tmp_path, 1), identity="test").restore(template_of(small_state(0)), step=2)


# Damaged checkpoints


def all_files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    return saved_steps(tmp_path_factory.mktemp("two_steps"), 1, 2)


def damage(file, kind, place, bit):
    content = bytearray(file.read_bytes())
    place = int(place * len(content))
    if kind == "delete":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[:place])
    elif kind == "flip" and content:
        content[min(place, len(content) - 1)] ^= 1 << bit
        file.write_bytes(content)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    which=st.floats(0, 1, exclude_max=True),
    kind=st.sampled_from(["flip", "flip", "cut", "delete"]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_no_damage_to_any_file_is_ever_restored_as_if_it_were_the_state(two_steps, tmp_path, which, kind, place, bit):
    directory = tmp_path / "copy"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(two_steps, directory)
    files = all_files(directory / "2")
    damage(files[int(which * len(files))], kind, place, bit)
    with Checkpointer(directory, identity="test") as checkpointer:
        if checkpointer.newest_intact() == 1:
            with pytest.raises(DamagedCheckpointError, match="Step 1 is intact"):
                checkpointer.restore(template_of(small_state(0)))
        else:  # Harmless: the file is one of Orbax's own notes, which nothing depends on.
            state, data_state = checkpointer.restore(template_of(small_state(0)))
            assert bits(state) == bits(small_state(2))
            assert data_state == {"position": 2}


@pytest.mark.parametrize("kind", ["flip", "cut", "delete"])
def test_a_damaged_array_is_named(two_steps, tmp_path, kind):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    (file,) = [file for file in all_files(tmp_path / "2") if file.parent.name.endswith("params.w") and file.name == "0"]
    damage(file, kind, 0.5, 3)
    checkpointer = Checkpointer(tmp_path, identity="test")
    with pytest.raises(DamagedCheckpointError, match=r"params/w .*2/state/\d+\.params\.w") as error:
        checkpointer.restore(template_of(small_state(0)))
    assert "Step 1 is intact: restore that one, or remove" in str(error.value)
    restored, data_state = checkpointer.restore(template_of(small_state(0)), step=checkpointer.newest_intact())
    assert (bits(restored), data_state) == (bits(small_state(1)), {"position": 1})
    damage(all_files(tmp_path / "1" / "manifest")[-1], "cut", 0.5, 0)
    with pytest.raises(DamagedCheckpointError, match="No other step there is intact"):
        checkpointer.restore(template_of(small_state(0)))
    assert checkpointer.newest_intact() is None


def test_an_array_swapped_for_another_is_found(tmp_path):
    state = {"a": small_state(1)["params"]["w"], "b": small_state(2)["params"]["w"]}
    with Checkpointer(tmp_path, identity="test") as checkpointer:
        checkpointer.save(1, state, {}, {})
    first, second = sorted((tmp_path / "1" / "state").glob("0*"))
    first.rename(tmp_path / "kept")
    second.rename(first)
    (tmp_path / "kept").rename(second)
    with pytest.raises(DamagedCheckpointError, match=r"a is damaged"):
        Checkpointer(tmp_path, identity="test").restore(template_of(state))


def test_a_leaf_that_is_gone_is_named_without_the_specification_of_the_store(tmp_path):
    with Checkpointer(tmp_path, identity="test") as checkpointer:
        checkpointer.save(1, small_state(1), {}, {})
    for path in (tmp_path / "1" / "state").rglob(".zarray"):
        path.unlink()
    with pytest.raises(DamagedCheckpointError, match=r"is damaged: .* cannot be read") as error:
        Checkpointer(tmp_path, identity="test").restore(template_of(small_state(0)))
    assert "tensorstore_spec" not in str(error.value)


# Foreign checkpoints


def test_another_experiments_checkpoint_is_refused(two_steps):
    with pytest.raises(CheckpointError, match="belongs to 'test', this is 'other'"):
        Checkpointer(two_steps, identity="other").restore(template_of(small_state(0)))
    assert Checkpointer(two_steps, identity="other").newest_intact() is None
    with pytest.raises(CheckpointError, match="belongs to 'test', this is 'other'"):
        Checkpointer(two_steps, identity="other").save(3, small_state(3), {}, {})
    assert Checkpointer(two_steps, identity="test").steps() == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"extra": t["params"]["w"]}, r"extra is not in the checkpoint"),
        (lambda t: {"params": t["params"]}, r"key is in the checkpoint only"),
        (
            lambda t: {"params": t["params"]["w"], "key": t["key"]},
            r"params is not .*w is in the checkpoint",
        ),
        (lambda t: replaced(t, shape=(2, 2)), r"w is float32\[4\] in the checkpoint and float32\[2, 2\] here"),
        (
            lambda t: replaced(t, dtype=jnp.bfloat16),
            r"w is float32\[4\] in the checkpoint and bfloat16\[4\] here",
        ),
        (
            lambda t: t | {"key": key_struct("rbg")},
            r"key is key<fry>\[\] in the checkpoint and key<rbg>\[\] here",
        ),
        (
            lambda t: t | {"key": jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=t["key"].sharding)},
            r"uint32\[2\] here",
        ),
    ],
)
def test_a_state_of_another_form_is_refused(two_steps, change, message):
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpointer(two_steps, identity="test").restore(change(template_of(small_state(0))))
    assert not isinstance(error.value, DamagedCheckpointError)


def replaced(template, **changes):
    w = template["params"]["w"]
    fields = {"shape": w.shape, "dtype": w.dtype} | changes
    w = jax.ShapeDtypeStruct(**fields, sharding=w.sharding)
    return template | {"params": template["params"] | {"w": w}}


def key_struct(impl):
    key = jax.random.key(0, impl=impl)
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=key.sharding)


def test_a_template_without_shardings_is_refused(two_steps):
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), small_state(0))
    with pytest.raises(CheckpointError, match="needs a sharding"):
        Checkpointer(two_steps, identity="test").restore(template)


def test_a_directory_of_another_tool_and_another_format_are_refused(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    (tmp_path / "3" / "state").mkdir(parents=True)
    with pytest.raises(DamagedCheckpointError, match=r"process-0.json is missing.*Step 2 is intact"):
        Checkpointer(tmp_path, identity="test").restore(template_of(small_state(0)))
    shutil.rmtree(tmp_path / "3")
    body = json.loads((tmp_path / "2" / "manifest" / "process-0.json").read_text())["body"]
    manifest.write(tmp_path / "2" / "manifest", body["leaves"], body["extra"] | {"format": 99})
    with pytest.raises(CheckpointError, match="has format 99; this version of jaxdist reads formats 1 to 2"):
        Checkpointer(tmp_path, identity="test").restore(template_of(small_state(0)))


def test_a_checkpoint_of_format_1_with_its_other_names_of_leaves_is_restored(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(small_state(0))]
    old_names = {path_name(path): jax.tree_util.keystr(path).removeprefix(".") for path in paths}
    body = json.loads((tmp_path / "2" / "manifest" / "process-0.json").read_text())["body"]
    leaves = {old_names[name]: leaf for name, leaf in body["leaves"].items()}
    assert set(leaves).isdisjoint(body["leaves"])
    manifest.write(tmp_path / "2" / "manifest", leaves, body["extra"] | {"format": 1})
    with Checkpointer(tmp_path, identity="test") as checkpointer:
        assert checkpointer.newest_intact() == 2
        state, data_state = checkpointer.restore(template_of(small_state(0)))
    assert (bits(state), data_state) == (bits(small_state(2)), {"position": 2})


def test_wrong_settings_and_wrong_states_are_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_last=0"):
        Checkpointer(tmp_path, identity="test", keep_last=0)
    checkpointer = Checkpointer(tmp_path, identity="test")
    with pytest.raises(CheckpointError, match=r"w is a ndarray"):
        checkpointer.save(1, {"w": np.zeros(3)}, {}, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpointer.save(1, small_state(0), {"position": object()}, {})
    assert checkpointer.steps() == []


# Saves that fail


@pytest.fixture
def tiny_disk():
    """Return a function that lets no file grow beyond 64 KiB until it is called with None: a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda full: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16 if full else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Orbax ends its event loop at the first leaf that fails, and tensorstore then finds it closed when the others end.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("surface", ["save", "wait", "close", "restore", "newest_intact"])
def test_a_save_that_fails_is_reported_and_harms_nothing(tmp_path, tiny_disk, surface, caplog, capfd):
    checkpointer = Checkpointer(tmp_path, identity="test")
    checkpointer.save(1, small_state(1, 1 << 16), {}, {})
    checkpointer.wait()
    tiny_disk(True)
    checkpointer.save(2, small_state(2, 1 << 16), {}, {})
    arguments = {"save": (3, small_state(3), {}, {}), "restore": (template_of(small_state(0, 1 << 16)),)}
    with pytest.raises(CheckpointError, match="A checkpoint of step 2 could not be written to") as error:
        getattr(checkpointer, surface)(*arguments.get(surface, ()))
    tiny_disk(False)
    assert str(tmp_path) in str(error.value)
    assert "Step 1 is intact" in str(error.value)
    assert checkpointer.steps() == [1]
    if surface != "close":
        checkpointer.save(2, small_state(5, 1 << 16), {}, {})
        checkpointer.close()
    restored, _ = Checkpointer(tmp_path, identity="test").restore(template_of(small_state(0, 1 << 16)))
    assert bits(restored) == bits(small_state(1 if surface == "close" else 5, 1 << 16))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert capfd.readouterr().err == ""


def test_a_directory_that_cannot_be_written_is_named_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("no directory")
    checkpointer = Checkpointer(tmp_path / "file", identity="test")
    with pytest.raises(CheckpointError, match=r"could not be written to .*/file: .*It holds no earlier checkpoint"):
        checkpointer.save(1, small_state(1), {}, {})


KILLED_SAVE = """
    import os, pathlib, shutil, signal, sys
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec
    from jaxdist.checkpoint import checkpoints as checkpoint
    from jaxdist.spmd import mesh

    source, target = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    step, events = int(sys.argv[3]), sys.argv[4].split()

    def save(directory, last_event):
        w = jax.device_put(jnp.full(4, 9.0), NamedSharding(mesh.make_mesh(), PartitionSpec()))
        state = {"params": {"w": w, "b": w[:2] + 1}, "key": jax.device_put(jax.random.key(9), w.sharding)}
        count = 0

        def kill_at_last_event(event, args):
            nonlocal count
            if event in events and (event != "open" or args[1] == "w") and str(directory) in str(args[0]):
                count += 1
                if count == last_event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill_at_last_event)
        with checkpoint.Checkpointer(directory, identity="test", keep_last=1) as checkpointer:
            checkpointer.save(step, state, {"position": 9}, {})

    # Importing is slow, so it is done once; the backend is started by each child, after the fork.
    for last_event in range(1, 200):
        directory = target / str(last_event)
        shutil.copytree(source, directory)
        child = os.fork()
        if child == 0:
            save(directory, last_event)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))
        assert os.WTERMSIG(status) == signal.SIGKILL
"""


@pytest.mark.parametrize(
    ("step", "events", "at_least"),
    [(2, "open os.mkdir os.remove os.rename os.rmdir shutil.rmtree", 15), (1, "os.rename os.rmdir shutil.rmtree", 5)],
    ids=["a new step", "the same step again"],
)
def test_a_save_killed_at_any_moment_leaves_the_old_state_or_the_new_one(tmp_path, step, events, at_least):
    """SIGKILL at each of the file operations of a save: making, writing, renaming and removing, one run for each."""
    source, target = saved_steps(tmp_path / "source", 1), tmp_path / "target"
    target.mkdir()
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        textwrap.dedent(KILLED_SAVE),
        str(source),
        str(target),
        str(step),
        events,
    ]
    child = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert child.returncode == 0, child.stderr
    old, new = bits(small_state(1)), bits(small_state(9))
    outcomes = []
    for directory in sorted(target.iterdir(), key=lambda path: int(path.name)):
        with Checkpointer(directory, identity="test") as checkpointer:
            restored, data_state = checkpointer.restore(template_of(small_state(0)))
            is_new = bits(restored) == new
            assert bits(restored) in (old, new)
            assert data_state == {"position": 9 if is_new else 1}
            assert all(checkpointer.verify(kept) is None for kept in checkpointer.steps())
            outcomes.append(is_new)
    assert not outcomes[0]  # Killed before it began.
    assert outcomes[-1]  # Not killed at all.
    assert len(outcomes) > at_least
    with Checkpointer(target / "5", identity="test") as checkpointer:
        checkpointer.save(3, small_state(3), {}, {})
    left_behind = [path.name for path in (target / "5").iterdir() if not path.name.replace(".", "").isdigit()]
    assert left_behind == []


PROCESS = """
    import sys
    import time
    import jax
    process, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize("127.0.0.1:" + port, 2, process)
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec as P
    from jaxdist.checkpoint import checkpoints as checkpoint
    from jaxdist.guards import replicas
    from jaxdist.spmd import mesh

    def no_device_barrier(name):
        raise AssertionError("a barrier on the devices")

    multihost_utils.sync_global_devices = no_device_barrier
    over = mesh.make_mesh()
    whole = np.arange(64, dtype=np.float32).reshape(8, 8)

    def put(values, spec):
        return jax.make_array_from_callback(values.shape, NamedSharding(over, spec), lambda index: values[index])

    specs = {"whole": P(), "rows": P("data"), "columns": P(None, "data")}
    state = {name: put(whole, spec) for name, spec in specs.items()}
    state["key"] = jax.jit(lambda: jax.random.key(3), out_shardings=NamedSharding(over, P()))()
    superfluous = checkpoint.Checkpointer._superfluous

    def slowly(self, saved):
        time.sleep(0.3)  # No process may see the directory before process 0 has put it in order.
        return superfluous(self, saved)

    checkpoint.Checkpointer._superfluous = slowly
    with checkpoint.Checkpointer(directory, identity="test", keep_last=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state, {"step": step}, {})
        checkpointer.wait()
        assert checkpointer.steps() == [2], checkpointer.steps()
        turned = {"whole": P("data"), "rows": P(None, "data"), "columns": P(), "key": P()}
        template = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(over, turned[name]))
            for name, leaf in state.items()
        }
        restored, data_state = checkpointer.restore(template)
        assert data_state == {"step": 2}
        for name in specs:
            for shard in restored[name].addressable_shards:
                assert np.array_equal(shard.data, whole[shard.index]), name
    replicas.check_replicas(restored, over)
    drifted = jax.make_array_from_process_local_data(NamedSharding(over, P()), whole + process)
    try:
        replicas.check_replicas({"drifted": drifted}, over)
    except replicas.ReplicaDriftError as error:
        print("process", process, error, flush=True)
"""


def test_two_processes_save_together_and_any_layout_restores_it(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", textwrap.dedent(PROCESS)]
    processes = [
        subprocess.Popen(
            [*command, str(i), port, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    for i, output in enumerate(outputs):
        assert f"process {i} The copies" in output
        assert all(f"(process {other})" in output for other in range(2))
    whole = np.arange(64, dtype=np.float32).reshape(8, 8)
    structs = {name: jax.ShapeDtypeStruct((8, 8), jnp.float32) for name in ("whole", "rows", "columns")}
    template = template_of(structs | {"key": key_struct(None)}, MESH, P("data"))
    restored, _ = Checkpointer(tmp_path, identity="test").restore(template)
    assert all(np.array_equal(restored[name], whole) for name in structs)
    os.unlink(tmp_path / "2" / "manifest" / "process-1.json")
    with pytest.raises(DamagedCheckpointError, match=r"lacks hashes of leaf (rows|columns)"):
        Checkpointer(tmp_path, identity="test").restore(template)
