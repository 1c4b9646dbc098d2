import contextlib
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist import testing
from jaxdist.checkpoint import packing, slots
from jaxdist.checkpoint import snapshots as snapshot
from jaxdist.spmd.mesh import make_mesh

REPLICATED = PartitionSpec()
DATA = {"position": {"epoch": 1, "position": 7}}


def make_state(mesh, step, spec=REPLICATED):
    """A state with a key, a scalar, a bfloat16 leaf, an empty one, and one laid out by `spec`."""
    replicated = NamedSharding(mesh, PartitionSpec())
    put = functools.partial(jax.device_put, device=replicated)
    return {
        "step": put(np.int32(step)),
        "key": put(jax.random.key(step)),
        "half": put(jnp.full((3,), step, jnp.bfloat16)),
        "empty": put(np.zeros((0, 2), np.float32)),
        "kernel": jax.device_put(np.arange(16.0, dtype=np.float32).reshape(8, 2) + step, NamedSharding(mesh, spec)),
    }


def abstract(state, mesh=None):
    def describe(leaf):
        sharding = leaf.sharding if mesh is None else NamedSharding(mesh, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(describe, state)


def save_steps(directory, mesh, steps, spec=REPLICATED):
    snapshots = snapshot.Snapshots(directory, identity="a")
    snapshots.begin(steps[0] - 1)
    for step in steps:
        snapshots.save(step, make_state(mesh, step, spec), DATA | {"step": step})
    snapshots.close()


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("data")])
@pytest.mark.parametrize("devices_after", [1, 2, 8])
def test_the_newest_snapshot_comes_back_bit_for_bit_on_any_mesh(tmp_path, spec, devices_after):
    before = make_mesh({"data": -1}, devices=jax.devices()[:4])
    save_steps(tmp_path, before, range(1, 6), spec)
    after = make_mesh({"data": -1}, devices=jax.devices()[:devices_after])
    snapshots = snapshot.Snapshots(tmp_path, identity="a")
    assert snapshots.latest_step() == 5
    expected = make_state(before, 5, spec)
    state, data_state = snapshots.restore(abstract(expected, after), 5)
    testing.assert_trees_equal(state, expected)
    assert all(leaf.sharding.mesh == after for leaf in jax.tree.leaves(state))
    assert data_state == DATA | {"step": 5}


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    mesh = make_mesh({"data": -1})
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 2.0, state), donate_argnums=0)
    state = {"x": jax.device_put(np.ones((64, 64), np.float32), NamedSharding(mesh, PartitionSpec()))}
    snapshots = snapshot.Snapshots(tmp_path, identity="a")
    snapshots.begin(0)
    for number in range(1, 9):
        state = step(state)
        snapshots.save(number, state, {})
        state = step(state)
    snapshots.close()
    restored, _ = snapshots.restore(abstract(state), snapshots.latest_step())
    np.testing.assert_array_equal(np.asarray(restored["x"]), np.full((64, 64), 2.0**15, np.float32))


@pytest.mark.parametrize("damage", ["cut", "flip_data", "flip_header", "empty", "half_written"])
def test_a_slot_that_is_not_whole_is_passed_over(tmp_path, damage):
    mesh = make_mesh({"data": -1})
    save_steps(tmp_path, mesh, range(1, 5))
    newest = max(tmp_path.iterdir(), key=lambda path: slots.open_slot(path).header["step"])
    content, file = bytearray(newest.read_bytes()), slots.open_slot(newest)
    end = file.offset + sum(piece["num_bytes"] for piece in file.header["pieces"])  # the rest of the file is reserved
    if damage == "cut":
        content = content[: end - 1]
    elif damage == "flip_data":
        content[end - 3] ^= 4
    elif damage == "flip_header":
        content[60] ^= 1
    elif damage == "empty":
        content = bytearray()
    else:
        content[:32] = b" " * 32
    newest.write_bytes(content)
    assert snapshot.Snapshots(tmp_path, identity="a").latest_step() == 3


def test_what_lies_beyond_the_step_that_training_goes_on_from_is_forgotten(tmp_path):
    mesh = make_mesh({"data": -1})
    save_steps(tmp_path, mesh, range(1, 7))
    snapshots = snapshot.Snapshots(tmp_path, identity="a")
    snapshots.begin(5)
    assert snapshots.latest_step() == 5
    for _ in range(2):  # neither of these overwrites step 5 before it is complete
        snapshots.save(6, make_state(mesh, 6), {})
    snapshots.wait()
    assert {slots.open_slot(path).header["step"] for path in tmp_path.iterdir()} == {5, 6}
    snapshots.begin(0)
    assert snapshots.latest_step() is None
    snapshots.close()


def test_pieces_of_one_process_alone_are_no_snapshot(tmp_path):
    """As on two processes: a step counts when the pieces of both are there."""
    mesh = make_mesh({"data": -1}, devices=jax.devices()[:2])
    state = make_state(mesh, 3, PartitionSpec("data"))
    made = packing.Packing.of(state)
    structure = json.loads(made.structure)
    values = [np.asarray(buffer).view(np.uint8) for buffer in made.pack(state)]
    second = structure["pieces"].pop()
    assert second["index"] == [[4, 8], [0, 2]], "the second device owns nothing else"

    def write(process, pieces, buffers):
        described = {"identity": "a", "step": 3, "data_state": {}}
        text = json.dumps(structure | {"pieces": pieces})
        slots.Slots(tmp_path, process).write(slots.header_of(described, text, buffers), buffers)

    write(0, structure["pieces"], values[:-1])
    snapshots = snapshot.Snapshots(tmp_path, identity="a", process=1)
    assert snapshots.latest_step() is None
    write(1, [second], values[-1:])
    assert snapshots.latest_step() == 3
    testing.assert_trees_equal(snapshots.restore(abstract(state), 3)[0], state)


def test_snapshots_of_another_run_are_not_used_and_other_leaves_are_refused(tmp_path):
    mesh = make_mesh({"data": -1})
    save_steps(tmp_path, mesh, [1])
    assert snapshot.Snapshots(tmp_path, identity="b").latest_step() is None
    template = abstract(make_state(mesh, 1))
    template["bias"] = template.pop("half")
    with pytest.raises(snapshot.SnapshotError, match="must have the leaves"):
        snapshot.Snapshots(tmp_path, identity="a").restore(template, 1)
    template = abstract(make_state(mesh, 1))
    template["kernel"] = jax.ShapeDtypeStruct((4, 2), np.float32, sharding=template["kernel"].sharding)
    with pytest.raises(snapshot.SnapshotError, match=r"shape \(8, 2\) where \(4, 2\)"):
        snapshot.Snapshots(tmp_path, identity="a").restore(template, 1)


def test_full_memory_is_said_once_and_tried_again_and_the_earlier_snapshots_stay(tmp_path, monkeypatch, capsys):
    mesh = make_mesh({"data": -1})
    save_steps(tmp_path, mesh, range(1, 4))
    snapshots = snapshot.Snapshots(tmp_path, identity="a")
    snapshots.begin(3)

    def full(made, header, buffers):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(slots.Slots, "write", full)
        snapshots.save(4, make_state(mesh, 4), {})
        snapshots.wait()
        assert snapshots.latest_step() == 3
        assert "A snapshot could not be written" in capsys.readouterr().err
        snapshots.save(5, make_state(mesh, 5), {})  # not yet
        snapshots._retry_at = 0.0
        snapshots.save(6, make_state(mesh, 6), {})
        snapshots.wait()
        assert not capsys.readouterr().err, "it is said once"
    assert snapshots.latest_step() == 3, "none was touched"
    snapshots._retry_at = 0.0
    snapshots.save(7, make_state(mesh, 7), {})
    snapshots.close()
    assert snapshots.latest_step() == 7
    assert "Snapshots are taken again." in capsys.readouterr().err


def test_what_stops_the_thread_that_writes_is_raised_by_the_next_save_and_by_the_end(tmp_path):
    def fail(process, header, buffers):
        raise ValueError("no such host")

    mesh = make_mesh({"data": -1})
    snapshots = snapshot.Snapshots(tmp_path, identity="a", copy=fail)
    snapshots.begin(0)
    snapshots.save(1, make_state(mesh, 1), {})
    with pytest.raises(ValueError, match="no such host"):
        snapshots.save(2, make_state(mesh, 2), {})
    snapshots.save(3, make_state(mesh, 3), {})
    with pytest.raises(ValueError, match="no such host"):
        snapshots.close()


def test_a_snapshot_that_does_not_fit_takes_no_memory_and_harms_no_older_one(tmp_path, monkeypatch, capsys):
    mesh = make_mesh({"data": -1})
    save_steps(tmp_path, mesh, [1])
    reserve, taken = os.posix_fallocate, []

    def nearly_full(descriptor, offset, length):
        if taken:
            raise OSError(28, "No space left on device")
        taken.append(reserve(descriptor, offset, length))

    monkeypatch.setattr(os, "posix_fallocate", nearly_full)
    larger = {"a": jnp.zeros(1 << 20)}
    with contextlib.closing(snapshot.Snapshots(tmp_path, identity="a")) as snapshots:
        snapshots.begin(1)
        sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
        snapshots.save(2, larger, {})
        snapshots.wait()
        assert snapshots.latest_step() == 1
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir() if path.stat().st_size} == sizes
    assert "No space left" in capsys.readouterr().err


def test_the_newest_snapshot_is_read_without_a_template(tmp_path):
    mesh = make_mesh({"data": -1})
    save_steps(tmp_path, mesh, range(1, 4))
    state = make_state(mesh, 3)
    found = snapshot.read_newest(tmp_path, identity="a")
    assert found.step == 3
    expected = snapshot.manifests.leaves_of(state)
    assert [(leaf.path, leaf.file, leaf.dtype) for leaf in found.leaves] == [
        (leaf.path, leaf.file, leaf.dtype) for leaf in expected
    ]
    for leaf, wanted in zip(found.leaves, expected):
        assert np.asarray(leaf.data).tobytes() == np.asarray(wanted.data).tobytes()
        assert leaf.data.dtype == wanted.data.dtype
    assert snapshot.read_newest(tmp_path, identity="b") is None
    assert snapshot.read_newest(tmp_path, identity="a", after=3) is None
