"""The manifest of a checkpoint: what was written is read back, and anything that was changed since is named."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.checkpoint import manifest

STATE = {"w": jnp.arange(6.0).reshape(2, 3), "key": jax.random.key(3), "empty": jnp.zeros((0, 4))}
FORMAT = 2
"""If another format is read now, checkpoints of earlier versions are not: have both read, then renew this number."""


def written(directory, state=STATE, **extra):
    """Write a manifest, and the arrays as earlier versions did: a directory for each."""
    leaves = manifest.leaves_of(state)
    pieces = manifest.host_pieces(leaves)
    described = {leaf.path: manifest.describe(leaf, owned) for leaf, owned in zip(leaves, pieces, strict=True)}
    for leaf in leaves:
        values = np.asarray(leaf.data)
        if values.size:
            spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{directory}/{leaf.file}/"}}
            store = tensorstore.open(spec, create=True, dtype=values.dtype, shape=values.shape).result()
            store.write(values).result()
    manifest.write(directory, described, {"format": FORMAT, **extra})
    return manifest.read(directory, arrays=directory)


def test_what_was_written_is_read(tmp_path):
    made = written(tmp_path, step=4)
    assert made.extra == {"format": FORMAT, "step": 4}
    assert np.array_equal(made.read_leaf("w"), STATE["w"])
    assert np.array_equal(made.read_leaf("key"), jax.random.key_data(STATE["key"]))
    assert (made.read_leaf("empty").shape, made.read_leaf("empty").dtype) == ((0, 4), np.float32)


def test_a_piece_is_listed_with_the_sha256_of_its_bytes_row_by_row():
    leaf = manifest.leaves_of(STATE)[2]
    values = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    entry = manifest.describe(leaf, [([[0, 2], [0, 3]], values)])
    expected = hashlib.sha256(np.array([0, 1, 2, 3, 4, 5], "<f4").tobytes()).hexdigest()
    assert entry["pieces"] == [{"index": [[0, 2], [0, 3]], "sha256": expected}]


def test_a_leaf_that_is_no_array_is_refused():
    with pytest.raises(manifest.CheckpointError, match="b is a int"):
        manifest.leaves_of({"a": jnp.ones(1), "b": 1})


@given(st.lists(st.text(min_size=1), min_size=2, max_size=6))
def test_leaves_are_stored_under_different_names(paths):
    names = [manifest.stored_name(position, path) for position, path in enumerate(paths)]
    assert len(set(names)) == len(names)
    assert all(name.isascii() and "/" not in name and len(name) < 200 for name in names)


def edited(content):
    content["body"]["leaves"]["w"]["stored_shape"] = [3, 2]
    return content


def foreign(content):
    return manifest_of(content["body"] | {"extra": {"format": 99}})


def without_pieces(content):
    content["body"]["leaves"]["w"]["pieces"] = []
    return manifest_of(content["body"])


def with_another_hash(content):
    content["body"]["leaves"]["w"]["pieces"][0]["sha256"] = "0" * 64
    return manifest_of(content["body"])


def manifest_of(body):
    return {"body": body, "sha256": manifest._json_sha256(body)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (edited, manifest.DamagedCheckpointError, "its SHA-256 differs"),
        (lambda content: {}, manifest.DamagedCheckpointError, "cannot be read"),
        (foreign, manifest.CheckpointError, "has format 99"),
        (without_pieces, manifest.DamagedCheckpointError, "lacks hashes of leaf w"),
        (with_another_hash, manifest.DamagedCheckpointError, "Leaf w is damaged"),
    ],
    ids=["edited", "empty", "format", "pieces", "hash"],
)
def test_a_manifest_that_was_changed_is_named(tmp_path, change, error, message):
    written(tmp_path)
    file = tmp_path / "process-0.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(error, match=message):
        manifest.read(tmp_path, arrays=tmp_path).read_leaf("w")


def test_a_manifest_that_is_missing_is_named(tmp_path):
    with pytest.raises(manifest.DamagedCheckpointError, match=r"process-0\.json is missing"):
        manifest.read(tmp_path, arrays=tmp_path)


def test_the_pieces_of_all_processes_are_joined(tmp_path):
    """Process 1 owns the second row: its hash is in its own file."""
    written(tmp_path)
    first, second = tmp_path / "process-0.json", tmp_path / "process-1.json"
    body = json.loads(first.read_text())["body"]
    rows = [
        {"index": [[row, row + 1], [0, 3]], "sha256": manifest._sha256(np.asarray(STATE["w"][row]))} for row in (0, 1)
    ]
    for file, piece in ((first, rows[0]), (second, rows[1])):
        part = {path: leaf | {"pieces": [piece] if path == "w" else []} for path, leaf in body["leaves"].items()}
        file.write_text(json.dumps(manifest_of({"leaves": part, "extra": body["extra"]})))
    assert np.array_equal(manifest.read(tmp_path, arrays=tmp_path).read_leaf("w"), STATE["w"])
    second.unlink()
    with pytest.raises(manifest.DamagedCheckpointError, match="lacks hashes"):
        manifest.read(tmp_path, arrays=tmp_path).read_leaf("w")


def struct(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


WANTED = {"w": struct((2, 3)), "key": STATE["key"], "empty": struct((0, 4))}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (WANTED, ""),
        (WANTED | {"b": struct((2,))}, "b is not in the checkpoint"),
        ({"w": WANTED["w"], "key": WANTED["key"]}, "empty is in the checkpoint only"),
        (WANTED | {"w": struct((3, 2))}, r"w is float32\[2, 3\] in the checkpoint and float32\[3, 2\] here"),
        (WANTED | {"w": struct((2, 3), jnp.int32)}, r"and int32\[2, 3\] here"),
        ({f"{n}": struct(()) for n in range(9)}, r"and 9 more"),
    ],
    ids=["same", "missing", "extra", "shape", "dtype", "many"],
)
def test_a_state_of_another_form_is_named(tmp_path, wanted, message):
    made = written(tmp_path)
    if not message:
        made.check_fits(wanted)
        return
    with pytest.raises(manifest.CheckpointError, match=message):
        made.check_fits(wanted)
