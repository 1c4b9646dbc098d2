"""Predictions as files, read back by pandas and NumPy."""

import csv
import gzip
import math

import ml_dtypes
import numpy as np
import PIL.Image
import pyarrow.csv
import pytest
import scipy.signal
import soundfile
from pyarrow import parquet

from jaxdist import data, errors
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
    (tmp_path / "in.npz").rename(tmp_path / "IN.NPZ")
    assert [*predictions.read_inputs(tmp_path / "IN.NPZ", columns=["image"])] == ["image"]
    with pytest.raises(errors.UserError, match=r"IN\.NPZ has no array 'label'"):
        predictions.read_inputs(tmp_path / "IN.NPZ", columns=["image", "label"])
    assert predictions.read_inputs(tmp_path / "in.csv")[1] == {"a": 3, "b": 4.5}
    with pytest.raises(errors.UserError, match="nothing"):
        predictions.read_inputs(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.txt", r"ends in \.npz, \.csv, \.parquet"),
        ("in.csv", "exists"),
        ("in.csv/more/out.csv", r"in\.csv is no folder that you may write to"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path, name, message):
    (tmp_path / "in.csv").write_text("precious")
    with pytest.raises(errors.UserError, match=message):
        predictions.check_output(tmp_path / name)
    assert (tmp_path / "in.csv").read_text() == "precious"


def test_an_input_that_is_not_there_is_one_message(tmp_path):
    with pytest.raises(errors.UserError, match=r"there is no .*nothing\.npz"):
        predictions.read_inputs(tmp_path / "nothing.npz")


COLOURS = ("blue", "green", "red")


def write_table(path, columns, colours=("red", "blue"), sep=","):
    rows = [{"a": str(number), "colour": colour, "id": f"x{number}"} for number, colour in enumerate(colours)]
    path.write_text("\n".join([sep.join(columns), *(sep.join(row[name] for name in columns) for row in rows)]))
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_is_read_with_the_numbers_of_the_training_data_and_the_columns_that_are_needed(tmp_path, kind):
    like = data.csv_source(write_table(tmp_path / "train.csv", ("a", "colour"), COLOURS), categories=("colour",))

    def read(columns, colours=("red", "blue"), needed=("a", "colour")):
        path = write_table(tmp_path / "x.csv", columns, colours)
        if kind == "parquet":
            table = pyarrow.csv.read_csv(path)
            path = tmp_path / "x.parquet"
            parquet.write_table(table, path)
        return predictions.read_inputs(path, like=like, columns=needed)

    for columns in (("colour", "a"), ("id", "a", "colour")):
        source = read(columns)
        assert [dict(source[number]) for number in range(2)] == [{"a": 0, "colour": 2}, {"a": 1, "colour": 0}]
    assert read(("colour", "a"), needed=None)[1] == {"a": 1, "colour": 0}
    with pytest.raises(errors.UserError, match="has no column"):
        read(("a",))
    with pytest.raises(ValueError, match=r"pink.*not among its known texts"):
        dict(read(("a", "colour"), ("pink", "red"))[0])  # Parquet is read when asked for an example


STYLES = [
    ("a,b,note,t\n1,,x,ö\nNA,4,y,u\n", {"missing": math.nan}),
    ("a,b,note,t\n1,,x,ö\nNA,4,y,u\n", {"missing": -1.0}),
    ("a;b;note;t\n1;2;x,y;ö\n3;4;;u\n", {"delimiter": ";"}),
    ("from a lab, 2020\na,b,note,t\n1,2,x,ö\n3,4,y,u\n", {"skip_lines": 1}),
    ("a,b,note,t\n# pause\n1,2,x,ö\n3,4,y,u\n", {"comment": "#"}),
    ("a,b,t,note\n1,2,ö\n3,4,u,y\n", {"short_rows": "fill"}),
    ("1,2,x,ö\n3,4,y,u\n", {"names": ("a", "b", "note", "t")}),
    ("1,2,x,ö\n3,4,y,u\n", {"names": ("a", "b", "note", "t"), "encoding": "latin-1"}),
]


@pytest.mark.parametrize("needed", [("b", "a", "t"), ("a", "b"), ("t",), None])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("text", "settings"), STYLES)
def test_a_table_is_written_as_that_of_training_is(tmp_path, text, settings, compressed, needed):
    content = text.encode(settings.get("encoding", "utf-8"))
    path = tmp_path / ("x.csv.gz" if compressed else "x.csv")
    path.write_bytes(gzip.compress(content) if compressed else content)
    like = data.csv_source(path, columns=("a", "b"), categories=("t",), **settings)
    for given in (path, tmp_path):
        found = predictions.read_inputs(given, like=data.Subset(like, [1]), columns=needed)
        assert {*found.arrays} == {*(needed or like.arrays)}
        for name, array in found.arrays.items():
            np.testing.assert_array_equal(array, like.arrays[name], strict=True)


def test_a_file_may_have_a_header_where_that_of_training_has_none(tmp_path):
    (tmp_path / "train.csv").write_text("1,red\n2,blue\n")
    like = data.csv_source(tmp_path / "train.csv", names=("a", "colour"), categories=("colour",))
    (tmp_path / "x.csv").write_text("id,colour,a\n8,blue,3\n")
    for needed in (("a", "colour"), None):
        assert predictions.read_inputs(tmp_path / "x.csv", like=like, columns=needed)[0] == {"a": 3, "colour": 0}


def test_what_is_missing_in_parquet_is_what_it_was_in_training(tmp_path):
    (tmp_path / "train.csv").write_text("a,b\n1,2\n,3\n")
    table = pyarrow.table({"a": [None, 4.0], "b": [5.0, 6.0], "note": ["x", "y"]})
    parquet.write_table(table, tmp_path / "x.parquet")
    like = data.csv_source(tmp_path / "train.csv", missing=-1.0)
    again = data.ParquetSource(tmp_path / "x.parquet", columns=("a", "b"), missing=-1.0)
    for each in (like, again):
        found = predictions.read_inputs(tmp_path / "x.parquet", like=each, columns=None)
        assert [dict(found[number]) for number in range(2)] == [{"a": -1, "b": 5}, {"a": 4, "b": 6}]


@pytest.mark.parametrize("cells", ["1,\n", "1,NA\n", "1,many\n"])
def test_a_cell_that_is_no_number_is_told_to_who_has_the_file_and_not_the_source(tmp_path, cells):
    (tmp_path / "x.csv").write_text("a,b\n3,4\n" + cells)
    with pytest.raises(errors.UserError, match=r"x\.csv, row 2: column 'b' .* write a number there") as told:
        predictions.read_inputs(tmp_path / "x.csv", columns=["a", "b"])
    assert "`" not in str(told.value)
    with pytest.raises(errors.UserError, match=r"A source is a \.npz, \.npy, \.txt, \.csv"):
        predictions.read_inputs(__file__)


def test_a_folder_is_read_as_the_training_data_are(tmp_path):
    for place in ("train/cat/1.png", "train/dog/2.png", "other/dog/3.png", "loose/any/4.png"):
        (tmp_path / place).parent.mkdir(parents=True)
        PIL.Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / place)
    like = data.Subset(data.ImageFolder(tmp_path / "train", channels=1), [0, 1])
    found = predictions.read_inputs(tmp_path / "other", like=like, columns=["image", "label"])[0]
    assert (found["label"], found["image"].shape) == (1, (4, 4, 1))
    with pytest.raises(errors.UserError, match="not among the 2 classes"):
        predictions.read_inputs(tmp_path / "loose", like=like, columns=["image", "label"])
    assert predictions.read_inputs(tmp_path / "loose", like=like, columns=["image"])[0]["image"].shape == (4, 4, 1)
    bytes_of = predictions.read_inputs(tmp_path / "other", like=data.ImageFolder(tmp_path / "train", decode=False))[0]
    assert bytes_of["image"].ndim == 1
    for name, rate in (("train", 8000), ("other", 16000)):
        (tmp_path / "sounds" / name / "a").mkdir(parents=True)
        soundfile.write(tmp_path / "sounds" / name / "a" / "1.wav", np.zeros(rate), rate)
    like = data.SoundFolder(tmp_path / "sounds" / "train", num_samples=800)
    other = predictions.read_inputs(tmp_path / "sounds" / "other", like=like)
    assert (other.sample_rate, other[0]["audio"].shape) == (8000, (800,))


def test_images_to_predict_of_need_no_class(tmp_path):
    """A single one, those of a folder, or of folders by any name: each by Pillow's pixels, in the order of names."""
    rng = np.random.default_rng(0)
    pixels = {name: rng.integers(0, 256, (3, 5, 3), np.uint8) for name in ("b.png", "a.png", "cat/z.png", "x/1.png")}
    for name, image in pixels.items():
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(tmp_path / "all" / name)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    PIL.Image.fromarray(pixels["b.png"]).save(tmp_path / "train" / "cat" / "1.png")
    like = data.ImageFolder(tmp_path / "train")
    found = predictions.read_unlabelled(tmp_path / "all", like=data.Subset(like, [0]))
    order = ["a.png", "b.png", "cat/z.png", "x/1.png"]
    assert predictions.files_of(found) == [str(tmp_path / "all" / name) for name in order]
    assert [example["label"] for example in map(found.__getitem__, range(4))] == [-1] * 4
    for number, name in enumerate(order):
        np.testing.assert_array_equal(found[number]["image"], pixels[name])
    single = predictions.read_unlabelled(tmp_path / "all" / "b.png", like=like)
    np.testing.assert_array_equal(single[0]["image"], pixels["b.png"])
    encoded = predictions.read_unlabelled(
        tmp_path / "all" / "b.png", like=data.ArraySource({"image": np.zeros((2, 9))})
    )
    assert encoded[0]["image"].tobytes() == (tmp_path / "all" / "b.png").read_bytes()
    (tmp_path / "none").mkdir()
    with pytest.raises(errors.UserError, match=r"none and the folders below it hold no files \.jpg"):
        predictions.read_unlabelled(tmp_path / "none", like=like)
    with pytest.raises(errors.UserError, match="there is no "):
        predictions.read_unlabelled(tmp_path / "missing.png", like=like)


def test_sounds_to_predict_of_are_brought_to_the_rate_of_training(tmp_path):
    sound = np.sin(np.arange(1600) / 50).astype(np.float32)
    for name, rate in (("train/a/1.wav", 8000), ("new.wav", 16000)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, sound, rate, subtype="FLOAT")
    like = data.SoundFolder(tmp_path / "train", num_samples=900)
    (example,) = predictions.read_unlabelled(tmp_path / "new.wav", like=like)
    expected = scipy.signal.resample_poly(sound, 1, 2)
    np.testing.assert_allclose(example["audio"], np.pad(expected, (0, 100)), atol=1e-6)
    assert (example["length"], example["label"]) == (800, -1)


def test_a_row_says_which_file_it_is_of(tmp_path):
    files = [f"{tmp_path}/a, b.png", f"{tmp_path}/é.png"]
    outputs = np.array([[0.5, 1.5], [2.0, 3.0]], np.float32)
    for name in ("x.csv", "x.npz", "x.parquet"):
        predictions.write(tmp_path / name, outputs, files)
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = [*csv.reader(file)]
    assert rows == [["file", "output_0", "output_1"], [files[0], "0.5", "1.5"], [files[1], "2.0", "3.0"]]
    with np.load(tmp_path / "x.npz") as content:
        assert content["file"].tolist() == files
    assert parquet.read_table(tmp_path / "x.parquet")["file"].to_pylist() == files
    assert predictions.files_of(data.ArraySource({"x": outputs})) is None
