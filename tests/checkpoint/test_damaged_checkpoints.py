"""Checkpoints that are damaged, of another experiment or of another form: refused, with what to do."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_states import (
    bits,
    key_struct,
    saved_steps,
    small_state,
    template_of,
)

from jaxdist.checkpoint import manifest
from jaxdist.checkpoint.checkpoints import Checkpointer, CheckpointError, DamagedCheckpointError


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
        try:
            checkpointer.verify(2)
        except DamagedCheckpointError:
            with pytest.raises(DamagedCheckpointError, match="Step 1 is intact"):
                checkpointer.restore(template_of(small_state(0)))
        else:  # Harmless: the file is one of Orbax's own notes, which nothing depends on.
            state, data_state = checkpointer.restore(template_of(small_state(0)))
            assert bits(state) == bits(small_state(2))
            assert data_state == {"position": 2}


def place_of(step, values):
    """Return the file of a checkpoint that holds these values, and where in it."""
    found = [(file, file.read_bytes().find(np.asarray(values).tobytes())) for file in all_files(step / "state")]
    (place,) = [(file, offset) for file, offset in found if offset >= 0]
    return place


def test_an_array_with_other_values_is_named(tmp_path):
    state = {name: jnp.full((64, 64), number, jnp.float32) for number, name in enumerate("abc", 1)}
    with Checkpointer(tmp_path, identity="test") as checkpointer:
        checkpointer.save(1, state, {}, {})
    for name, values in state.items():
        file, offset = place_of(tmp_path / "1", values)
        content = file.read_bytes()
        damage(file, "flip", (offset + 5000) / len(content), 3)
        with pytest.raises(
            DamagedCheckpointError, match=rf"Leaf {name} is damaged: .*1/state/\d+\.{name} does not hold"
        ):
            Checkpointer(tmp_path, identity="test").verify(1)
        file.write_bytes(content)
    Checkpointer(tmp_path, identity="test").verify(1)


@pytest.mark.parametrize("kind", ["flip", "cut", "delete"])
def test_a_damaged_array_is_named(two_steps, tmp_path, kind):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    (file,) = (tmp_path / "2" / "state" / "d").iterdir()
    damage(file, kind, 0.2, 3)
    checkpointer = Checkpointer(tmp_path, identity="test")
    with pytest.raises(DamagedCheckpointError, match=r"Leaf [a-z/]+ is damaged: .*2/state") as error:
        checkpointer.restore(template_of(small_state(0)))
    assert "Step 1 is intact: restore that one, or remove" in str(error.value)
    restored, data_state = checkpointer.restore(template_of(small_state(0)), step=1)
    assert (bits(restored), data_state) == (bits(small_state(1)), {"position": 1})
    damage(all_files(tmp_path / "1" / "manifest")[-1], "cut", 0.5, 0)
    with pytest.raises(DamagedCheckpointError, match="No other step there is intact"):
        checkpointer.restore(template_of(small_state(0)))


def test_an_array_swapped_for_another_is_found(tmp_path):
    state = {name: small_state(value, 1 << 10)["params"]["w"] for value, name in enumerate("ab", 1)}
    with Checkpointer(tmp_path, identity="test") as checkpointer:
        checkpointer.save(1, state, {}, {})
    (file, first), (_, second) = (place_of(tmp_path / "1", state[leaf]) for leaf in "ab")
    content, size = bytearray(file.read_bytes()), state["a"].nbytes
    values = [content[start : start + size] for start in (second, first)]
    content[first : first + size], content[second : second + size] = values
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"a is damaged"):
        Checkpointer(tmp_path, identity="test").restore(template_of(state))


def test_a_leaf_that_is_gone_is_named_without_the_specification_of_the_store(tmp_path):
    with Checkpointer(tmp_path, identity="test") as checkpointer:
        checkpointer.save(1, small_state(1), {}, {})
    (tmp_path / "1" / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"is damaged: .* cannot be read") as error:
        Checkpointer(tmp_path, identity="test").restore(template_of(small_state(0)))
    assert "tensorstore_spec" not in str(error.value)


def test_another_experiments_checkpoint_is_refused(two_steps):
    with pytest.raises(CheckpointError, match="belongs to 'test', this is 'other'"):
        Checkpointer(two_steps, identity="other").restore(template_of(small_state(0)))
    with pytest.raises(CheckpointError, match="belongs to 'test', this is 'other'"):
        Checkpointer(two_steps, identity="other").verify(2)
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
    with pytest.raises(CheckpointError, match="has format 99; this version of jaxdist reads format 2"):
        Checkpointer(tmp_path, identity="test").restore(template_of(small_state(0)))


def test_wrong_settings_and_wrong_states_are_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_last=0"):
        Checkpointer(tmp_path, identity="test", keep_last=0)
    checkpointer = Checkpointer(tmp_path, identity="test")
    with pytest.raises(CheckpointError, match=r"w is a ndarray"):
        checkpointer.save(1, {"w": np.zeros(3)}, {}, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpointer.save(1, small_state(0), {"position": object()}, {})
    assert checkpointer.steps() == []
