"""TensorFlow Datasets without TensorFlow: ArrayRecord read by tfds, TFRecord and Parquet by this package."""

import bisect
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdist import extras
from jaxdist.data.fingerprints import FileList
from jaxdist.data.sources.parquet import ParquetSource
from jaxdist.data.sources.records import FilePart, TfRecords, sample_records
from jaxdist.data.sources.source import CorruptExample, Example, fingerprint_text


class TfdsSource:
    """A split of a prepared TFDS data set. Its nested features become fields with names such as `objects/bbox`.

    >>> source = TfdsSource("mnist", split="train")
    >>> source = TfdsSource("/data/digits/1.0.0", split="train[:80%]", fields=("image", "label"))

    Args:
      name: a data set's name, for example `imagenet2012` or `c4/en:3.1.0`, or the folder of a prepared version.
      split: a split or a part of one.
      data_dir: where prepared data sets are; None for tfds's default folder.
      fields: the fields to keep; None keeps all.

    Raises:
      ValueError: the data set is not prepared (the message has the command that prepares it), or has no such split.
      MissingExtra: tensorflow-datasets is not installed.
    """

    def __init__(
        self,
        name: str | os.PathLike,
        *,
        split: str,
        data_dir: str | os.PathLike | None = None,
        fields: Sequence[str] | None = None,
    ):
        self._arguments = (os.fspath(name), split, None if data_dir is None else os.fspath(data_dir), fields)
        self._open()

    def _open(self) -> None:
        name, split, data_dir, self._fields = self._arguments
        self._builder = _open_builder(name, data_dir)
        self._parts = _split_parts(self._builder, split)
        self._features = self._builder.info.features
        self.files = FileList([part.path for part in self._parts])
        self._records = _open_records(self._builder, split, self._parts)
        names = sorted(_flatten(self._features.get_tensor_info()))
        missing = set(self._fields or ()) - set(names)
        if missing:
            raise ValueError(f"{name} has no features {sorted(missing)}; it has {names}.")

    @property
    def features(self) -> Any:
        """The tfds feature specification."""
        return self._features

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        example = self._features.deserialize_example_np(self._read(index))
        flat = _flatten(example)
        return {name: np.asarray(flat[name]) for name in self._fields or flat}

    def _read(self, index: int) -> bytes:
        try:
            return self._records[index]
        except (RuntimeError, IndexError) as error:  # what the C++ readers raise
            files = ", ".join(part.path for part in self._parts[:3])
            raise CorruptExample(f"Record {index} of {files} cannot be read: {error}") from error

    def fingerprint(self) -> str:
        """Return the hash of the data set's name, version and format, the split's files, and a few records."""
        info = self._builder.info
        files = [f"{os.path.basename(part.path)}[{part.skip}:{part.skip + part.take}]" for part in self._parts]
        samples = sample_records(self._records, len(self))
        return fingerprint_text("tfds", info.full_name, info.file_format.value, self._fields, *files, *samples)

    def __getstate__(self) -> dict:
        return {"_arguments": self._arguments}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()


def _open_builder(name: str, data_dir: str | None) -> Any:
    """Return the read-only builder of a prepared data set, without running the code of its builder.

    That code often needs TensorFlow: in tfds 4.9.10, that of speech_commands and c4 does.
    """
    tfds = extras.require("tensorflow_datasets")
    if os.path.isdir(name):
        return tfds.builder_from_directory(name)
    from_files = extras.require("tensorflow_datasets.core.read_only_builder").builder_from_files
    try:
        return from_files(name, **({"data_dir": data_dir} if data_dir else {}))
    except tfds.core.DatasetNotFoundError as error:
        command = f"tfds build {name} --file_format=array_record" + (f" --data_dir={data_dir}" if data_dir else "")
        where = data_dir or "the folder of tfds, $TFDS_DATA_DIR or ~/tensorflow_datasets"
        raise ValueError(
            f"There is no prepared data set {name!r} in {where}. With internet access, run: {command} (some "
            "builders need TensorFlow to prepare; none needs it to be read). A data set of several configurations is "
            "named with one, as in c4/en; what has to be fetched by hand, as imagenet2012, with --manual_dir=FOLDER."
        ) from error


class _ParquetRecords:
    """The records of Parquet files: tfds writes each example into the first, and only, column.

    Read by row group, and by part of a file: tfds's own reader holds all rows in memory and gives a part of a split all
    rows of its files.
    """

    def __init__(self, parts: Sequence[FilePart]):
        self._parts = parts
        self._tables = [ParquetSource(part.path) for part in parts]
        self._ends = list(itertools.accumulate(part.take for part in parts))
        for part, table in zip(parts, self._tables):
            if len(table) < part.skip + part.take:
                raise CorruptExample(
                    f"{part.path} has {len(table)} rows, at least {part.skip + part.take} were written. Prepare the "
                    "data set again, as array_record: tfds 4.9.10, for example, loses rows when it writes Parquet."
                )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        number = bisect.bisect_right(self._ends, index)
        part = self._parts[number]
        (record,) = self._tables[number][part.skip + part.take + index - self._ends[number]].values()
        return record.tobytes()


def _open_records(builder: Any, split: str, parts: Sequence[FilePart]) -> Any:
    """Return the encoded examples of a split, by number."""
    file_format = builder.info.file_format.value
    if file_format == "tfrecord":
        return TfRecords(parts)
    if file_format == "parquet":
        return _ParquetRecords(parts)
    raw = extras.require("tensorflow_datasets").decode.DeserializeMethod.RAW_BYTES
    return builder.as_data_source(split, deserialize_method=raw)


def _split_parts(builder: Any, split: str) -> list[FilePart]:
    try:
        instructions = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{builder.info.full_name} has no split {split!r}; it has {sorted(builder.info.splits)}."
        ) from error
    return [FilePart(os.fspath(part.filename), part.skip, part.take) for part in instructions]


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their path; text and bytes become uint8 arrays."""
    if isinstance(tree, Mapping):
        flat: dict[str, Any] = {}
        for name, value in tree.items():
            flat |= _flatten(value, f"{prefix}/{name}" if prefix else str(name))
        return flat
    return {prefix: np.frombuffer(tree, np.uint8) if isinstance(tree, bytes) else tree}
