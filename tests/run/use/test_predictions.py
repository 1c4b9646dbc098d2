"""Predictions as files, read back by pandas and NumPy."""

import csv

import ml_dtypes
import numpy as np
import pytest
from pyarrow import parquet

from jaxdist import errors
from jaxdist.run.use import predictions

OUTPUTS = np.arange(6, dtype=np.float32).reshape(3, 2) / 3


def read_csv(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def read_parquet(path):
    return parquet.read_table(path).to_pydict()


@pytest.mark.parametrize(("suffix", "read"), [(".csv", read_csv), (".parquet", read_parquet)])
def test_a_table_has_a_column_for_each_number_of_a_row(tmp_path, suffix, read):
    predictions.write(tmp_path / f"out{suffix}", {"logits": OUTPUTS, "label": np.array([2, 0, 1])})
    table = read(tmp_path / f"out{suffix}")
    assert sorted(table) == ["label", "logits_0", "logits_1"]
    assert table["label"] == [2, 0, 1]
    np.testing.assert_array_equal(np.float32([table["logits_0"], table["logits_1"]]).T, OUTPUTS)


def test_npz_keeps_the_shapes(tmp_path):
    predictions.write(tmp_path / "out.npz", OUTPUTS.reshape(3, 2, 1))
    with np.load(tmp_path / "out.npz") as content:
        np.testing.assert_array_equal(content["output"], OUTPUTS.reshape(3, 2, 1))


@pytest.mark.parametrize(("suffix", "read"), [(".csv", read_csv), (".parquet", read_parquet), (".npz", np.load)])
def test_outputs_in_bfloat16_and_with_any_name_are_numbers_in_every_format(tmp_path, suffix, read):
    outputs = OUTPUTS[:, 0].astype(ml_dtypes.bfloat16)
    predictions.write(tmp_path / f"out{suffix}", {"file": outputs})
    found = read(tmp_path / f"out{suffix}")["file"]
    np.testing.assert_array_equal(np.float32(found), outputs.astype(np.float32))
    assert suffix != ".npz" or found.dtype == np.float32


def test_inputs_come_as_arrays_or_as_a_source(tmp_path):
    np.savez(tmp_path / "in.npz", image=OUTPUTS)
    np.save(tmp_path / "in.npy", OUTPUTS)
    (tmp_path / "in.csv").write_text("a,b\n1,2.5\n3,4.5\n")
    np.testing.assert_array_equal(predictions.read_inputs(tmp_path / "in.npz")["image"], OUTPUTS)
    np.testing.assert_array_equal(predictions.read_inputs(tmp_path / "in.npy"), OUTPUTS)
    assert predictions.read_inputs(tmp_path / "in.csv")[1] == {"a": 3, "b": 4.5}
    with pytest.raises(errors.UserError, match="nothing"):
        predictions.read_inputs(tmp_path / "nothing")


@pytest.mark.parametrize(("name", "message"), [("out.txt", r"ends in \.npz, \.csv, \.parquet"), ("in.csv", "exists")])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path, name, message):
    (tmp_path / "in.csv").write_text("precious")
    with pytest.raises(errors.UserError, match=message):
        predictions.check_output(tmp_path / name)
    assert (tmp_path / "in.csv").read_text() == "precious"


def test_an_input_that_is_not_there_is_one_message(tmp_path):
    with pytest.raises(errors.UserError, match=r"there is no .*nothing\.npz"):
        predictions.read_inputs(tmp_path / "nothing.npz")
