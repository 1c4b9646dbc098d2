"""The arrays of a checkpoint: read back as they were, by us and by Orbax, whichever processes wrote them."""

import pathlib

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore

from jaxdist.checkpoint import arrays

WHOLE = np.arange(24, dtype=np.float32).reshape(4, 6)
PLAIN = {"b": np.arange(3, dtype=ml_dtypes.bfloat16), "s": np.int32(7).reshape(()), "zero": np.zeros(5, np.float32)}


def piece(name, values, index=None, shape=None):
    index = [[0, size] for size in values.shape] if index is None else index
    return name, values.shape if shape is None else shape, index, values


def rows(first):
    return piece("w", np.ascontiguousarray(WHOLE[first : first + 2]), [[first, first + 2], [0, 6]], WHOLE.shape)


def read(directory, name):
    return arrays.open_array(directory, name).result().read().result()


def written(directory, by_process):
    for process, pieces in enumerate(by_process):
        arrays.write(directory, process, len(by_process), pieces)
    arrays.join(directory, len(by_process), ["w", *PLAIN])
    return directory


CASES = {
    "one process": [[rows(0), rows(2), *(piece(*each) for each in PLAIN.items())]],
    "one process of two owns nothing": [[rows(2), rows(0), *(piece(*each) for each in PLAIN.items())], []],
    "two processes": [[rows(0), *(piece(*each) for each in PLAIN.items())], [rows(2)]],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch_bytes", [1, 1 << 26])
def test_what_processes_wrote_is_read_here_and_by_orbax(tmp_path, monkeypatch, case, batch_bytes):
    monkeypatch.setattr(arrays, "_BATCH_BYTES", batch_bytes)
    directory = written(tmp_path, CASES[case])
    with ocp.PyTreeCheckpointer() as plain:
        names = plain.metadata(directory).item_metadata.tree
        opened = plain.restore(
            directory, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        )
    for name, values in {"w": WHOLE, **PLAIN}.items():
        for found in (read(directory, name), opened[name]):
            assert (found.dtype, found.shape, found.tobytes()) == (values.dtype, values.shape, values.tobytes())


def test_many_arrays_are_a_few_files(tmp_path):
    arrays.write(tmp_path, 0, 1, [piece(f"leaf{number}", WHOLE) for number in range(100)])
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) < 5


def test_many_pieces_of_one_array_are_written_together(tmp_path):
    """Each of several that were opened at once tried to create the array, and at times one failed."""
    values = np.arange(64, dtype=np.float32)
    for attempt in range(20):
        directory = tmp_path / str(attempt)
        pieces = [
            piece(name, values[at : at + 4], [[at, at + 4]], values.shape)
            for name in "abcdef"
            for at in range(0, 64, 4)
        ]
        arrays.write(directory, 0, 1, pieces)
        assert all(np.array_equal(read(directory, name), values) for name in "abcdef")


def test_arrays_with_a_directory_for_each_are_read(tmp_path):
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{tmp_path}/w/"}}
    tensorstore.open(spec, create=True, dtype="float32", shape=WHOLE.shape).result().write(WHOLE).result()
    assert np.array_equal(read(tmp_path, "w"), WHOLE)


def test_a_path_that_goes_up_is_written_and_read(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path / "a")
    for directory in (pathlib.Path("../kept"), pathlib.Path("../link/../kept too")):
        directory.mkdir()
        values = np.arange(6, dtype=np.float32)
        arrays.write(directory, 0, 1, [piece("x", values)])
        np.testing.assert_array_equal(read(directory, "x"), values)
    assert (tmp_path / "a" / "kept too" / "manifest.ocdbt").exists()
