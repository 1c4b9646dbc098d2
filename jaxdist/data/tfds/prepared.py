"""Prepared data sets of TensorFlow Datasets: which files a split has, in which of three formats."""

import bisect
import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdist import extras
from jaxdist.data.fingerprints import FileList
from jaxdist.data.sources.parquet import ParquetSource
from jaxdist.data.sources.records import ArrayRecords, FilePart, TfRecords, sample_records
from jaxdist.data.sources.source import CorruptExample, Example, checked_ids, checked_index, fingerprint_text
from jaxdist.data.tfds.features import Feature, UnknownFeature, decode_features, read_features


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
        self._folder = _find_folder(name, data_dir)
        self._info = extras.require("tensorflow_datasets.core.dataset_info").read_proto_from_builder_dir(self._folder)
        instructions = _split_parts(self._info, self._folder, split)
        self._parts = [FilePart(os.fspath(part.filename), part.skip, part.take) for part in instructions]
        self.files = FileList([part.path for part in self._parts])
        self._records = _open_records(self._info.file_format, self._parts)
        self._decode = _decoder_of(self._folder, name, self._fields)
        is_plain = type(self).__getitem__ is TfdsSource.__getitem__
        if is_plain and self._decode.is_light:  # only then: threads wait for each other longer than they decode
            self.__getitems__ = functools.partial(_read_batch, self._records, self._decode)
        self.vocabulary = self._decode.vocabulary

    @property
    def features(self) -> Any:
        """The tfds feature specification; some features need TensorFlow for it."""
        return _tfds_features(self._folder)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        index = checked_index(index, len(self))
        return self._decode(self._records[index])

    def fingerprint(self) -> str:
        """Return the hash of the data set's name, version and format, the split's files, and a few records."""
        info = self._info
        files = [f"{os.path.basename(part.path)}[{part.skip}:{part.skip + part.take}]" for part in self._parts]
        samples = sample_records(self._records, len(self))
        whole_name = f"{info.name}/{info.config_name}/{info.version}"
        return fingerprint_text("tfds", whole_name, info.file_format, self._fields, *files, *samples)

    def __getstate__(self) -> dict:
        return {"_arguments": self._arguments}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()


def _read_batch(records: Any, decode: Any, ids: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Return the examples `ids`, stacked; ValueError where they differ in shape."""
    ids = checked_ids(ids, len(records))
    examples = [decode(record) for record in records.read(ids if len(ids) else [0])]
    return {name: _stacked(name, [example[name] for example in examples])[: len(ids)] for name in examples[0]}


def _stacked(name: str, values: Sequence[np.ndarray | np.generic]) -> np.ndarray:
    shapes = {value.shape for value in values}
    if len(shapes) > 1:
        raise ValueError(
            f"Examples of a batch must have the same fields, shapes and dtypes; feature {name!r} has the shapes "
            f"{sorted(shapes)[:3]}. Pad, crop or bucket the examples, for example in `example_fn`."
        )
    return np.array(values)


class _ByDeclaration:
    """Decodes what `features.json` declares."""

    def __init__(self, features: Sequence[Feature]):
        self._features = features
        self.is_light = all(feature.is_light for feature in features)
        self.vocabulary = {feature.name: feature.names for feature in features if feature.names}

    def __call__(self, record: bytes) -> Example:
        return decode_features(self._features, record)


class _ByTfds:
    """Decodes by the feature objects of tfds: those of other packages, and of data sets that are old."""

    def __init__(self, features: Any, fields: Sequence[str] | None):
        self._features, self._fields, self.is_light = features, fields, False
        self.vocabulary: dict[str, tuple[str, ...]] = {}

    def __call__(self, record: bytes) -> Example:
        flat = _flatten(self._features.deserialize_example_np(record))
        return {name: np.asarray(flat[name]) for name in self._fields or flat}


def _decoder_of(folder: str, name: str, fields: Sequence[str] | None) -> _ByDeclaration | _ByTfds:
    """Return the decoder of the fields, all where `fields` is None; ValueError where there is no such field."""
    try:
        declared = read_features(folder)
    except UnknownFeature:
        whole = _tfds_features(folder)
        _check_fields(name, fields, sorted(_flatten(whole.get_tensor_info())))
        return _ByTfds(whole, fields)
    _check_fields(name, fields, [feature.name for feature in declared])
    return _ByDeclaration([feature for feature in declared if fields is None or feature.name in fields])


def _check_fields(name: str, fields: Sequence[str] | None, known: Sequence[str]) -> None:
    missing = set(fields or ()) - set(known)
    if missing:
        raise ValueError(f"{name} has no features {sorted(missing)}; it has {list(known)}.")


def _tfds_features(folder: str) -> Any:
    return extras.require("tensorflow_datasets.core.features.feature").FeatureConnector.from_config(folder)


def _find_folder(name: str, data_dir: str | None) -> str:
    """Return the folder of a prepared data set, without running the code of its builder.

    That code often needs TensorFlow: in tfds 4.9.10, that of speech_commands and c4 does.
    """
    if os.path.isdir(name):
        return name
    tfds = extras.require("tensorflow_datasets")
    finder = extras.require("tensorflow_datasets.core.read_only_builder")
    in_context = extras.require("tensorflow_datasets.core.utils.error_utils").reraise_with_context
    # Its public caller builds the features, too, which needs TensorFlow for some of them.
    find = in_context(tfds.core.DatasetNotFoundError)(finder._find_builder_dir)
    found = find(name, **({"data_dir": data_dir} if data_dir else {}))
    if found is not None:
        return os.fspath(found)
    command = f"tfds build {name} --file_format=array_record" + (f" --data_dir={data_dir}" if data_dir else "")
    where = data_dir or "the folder of tfds, $TFDS_DATA_DIR or ~/tensorflow_datasets"
    raise ValueError(
        f"There is no prepared data set {name!r} in {where}. With internet access, run: {command} (some "
        "builders need TensorFlow to prepare; none needs it to be read). A data set of several configurations is "
        "named with one, as in c4/en; what has to be fetched by hand, as imagenet2012, with --manual_dir=FOLDER."
    )


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

    def read(self, ids: Sequence[int] | np.ndarray) -> list[bytes]:
        """Return some records, in the order of their ids."""
        return [self[index] for index in ids]


def _open_records(file_format: str, parts: Sequence[FilePart]) -> Any:
    """Return the encoded examples of a split, by number."""
    if file_format == "tfrecord":
        return TfRecords(parts)
    if file_format == "parquet":
        return _ParquetRecords(parts)
    if file_format == "array_record":
        return ArrayRecords(parts)
    raise ValueError(
        f"Prepared data sets are read as array_record, tfrecord or parquet; this one is {file_format}. Prepare it with "
        "--file_format=array_record."
    )


def _split_parts(info: Any, folder: str, split: str) -> list[Any]:
    """Return tfds's file instructions of a split or a part of one."""
    template = extras.require("tensorflow_datasets.core.naming").ShardedFileTemplate(
        dataset_name=info.name, data_dir=extras.require("etils.epath").Path(folder), filetype_suffix=info.file_format
    )
    splits = extras.require("tensorflow_datasets.core.splits").SplitDict.from_proto(info.splits, template)
    try:
        return list(splits[split].file_instructions)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{info.name} has no split {split!r}; it has {sorted(splits)}.") from error


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their path; text and bytes become uint8 arrays."""
    if isinstance(tree, Mapping):
        flat: dict[str, Any] = {}
        for name, value in tree.items():
            flat |= _flatten(value, f"{prefix}/{name}" if prefix else str(name))
        return flat
    return {prefix: np.frombuffer(tree, np.uint8) if isinstance(tree, bytes) else tree}
