"""Prepares a data set: text to token files, any source to ArrayRecord files, in shards.

A shard is written under another name and renamed when it is complete, so an interrupted preparation continues with the
first shard that is missing. `prepared.json` says what the shards were made of and what their numbers stand for;
its `shards` (a `ShardList`) lets hosts without shared storage each read only their shards (see `combine.Sharded`).
"""

import bisect
import contextlib
import itertools
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np
import rich.console
import rich.progress

from jaxdist import extras
from jaxdist.data import fingerprints, text
from jaxdist.data.decoders.csv_text import COMPRESSIONS
from jaxdist.data.decoders.csv_text import KINDS as CSV_KINDS
from jaxdist.data.sources.combine import ShardList
from jaxdist.data.sources.folders import ImageFolder
from jaxdist.data.sources.images import IMAGE_SUFFIXES
from jaxdist.data.sources.listing import PREPARED, find_files, is_hidden, local_path
from jaxdist.data.sources.parquet import ParquetSource, open_parquet
from jaxdist.data.sources.records import ArrayRecordSource, encode_example
from jaxdist.data.sources.sounds import SOUND_SUFFIXES, SoundFolder
from jaxdist.data.sources.source import Source, fingerprint_array, fingerprint_text
from jaxdist.data.sources.tables import TableSettings, csv_like
from jaxdist.data.sources.vocabulary import vocabulary_of
from jaxdist.data.tfds.prepared import TfdsSource
from jaxdist.rundir import files

TOKENS_PER_SHARD = 2**26
EXAMPLES_PER_SHARD = 2**14

ShowProgress = Callable[[int, int], None]
"""Called with the number of tokens or examples that are done, and the total."""


class Prepared(NamedTuple):
    """The result: the shards' paths, the tokens or examples in them, and how many shards existed before."""

    paths: list[str]
    total: int
    num_kept: int

    def __str__(self) -> str:
        folder = os.path.dirname(self.paths[0]) if self.paths else ""
        kept = f", {self.num_kept:,} of them from before" if self.num_kept else ""
        what = "tokens" if self.paths and self.paths[0].endswith(".npy") else "examples"
        return f"{self.total:,} {what} in {len(self.paths):,} shards{kept}: {folder}"


def prepare(
    source: str | Source,
    out: str | os.PathLike,
    *,
    shard_size: int | None = None,
    tokenizer: str | None = None,
    stream: TextIO | None = None,
) -> Prepared:
    """Prepare `source` in the folder `out`, with a progress bar; what the command line calls.

    Args:
      source: a text file or a folder of `.txt` files, which become tokens, one a byte; or what `open_source` knows, or
        a Source, which become ArrayRecord files.
      out: a new folder, or one in which the same preparation was started.
      shard_size: tokens or examples of a shard.
      tokenizer: of text: `bpe:SIZE` trains a byte-level BPE of so many tokens on it; or a file, see
        `text.open_tokenizer`. None makes a token of each byte.
      stream: where the progress bar goes; None is standard error.
    """
    with contextlib.ExitStack() as stack:
        return _prepare(source, out, shard_size, tokenizer, _bar(stack, stream or sys.stderr))


def _bar(stack: contextlib.ExitStack, stream: TextIO) -> ShowProgress:
    """Return what shows progress in a bar, which appears with the first of it: a mistake is shown without a bar."""
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn())
    bar = rich.progress.Progress(*columns, console=rich.console.Console(file=stream))
    task = bar.add_task("Preparing")

    def show(done: int, total: int) -> None:
        if not bar.live.is_started:
            stack.enter_context(bar)
        bar.update(task, completed=done, total=total)

    return show


def _prepare(
    source: str | Source, out: str | os.PathLike, shard_size: int | None, tokenizer: str | None, show: ShowProgress
) -> Prepared:
    if isinstance(source, str) and kind_of_data(source) == "text":
        size = shard_size or TOKENS_PER_SHARD
        if tokenizer is not None:
            return prepare_text(source, out, tokenizer, tokens_per_shard=size, progress=show)
        return prepare_tokens(source, out, tokens_per_shard=size, progress=show)
    if tokenizer is not None:
        raise ValueError(f"A tokenizer is for text, .txt files; {source} is none. Leave --tokenizer out.")
    opened = open_source(source) if isinstance(source, str) else source
    return prepare_records(opened, out, examples_per_shard=shard_size or EXAMPLES_PER_SHARD, progress=show)


_KINDS = {".txt": "text", **dict.fromkeys(CSV_KINDS, "csv"), ".parquet": "parquet"}
"""What a file holds, by its suffix."""


def _suffix(path: pathlib.PurePath) -> str:
    """Return what says the kind of a file: of a compressed CSV file, the suffix before that."""
    inner = pathlib.PurePath(path.stem).suffix.lower()
    return inner if path.suffix.lower() in COMPRESSIONS and inner in CSV_KINDS else path.suffix.lower()


def kind_of_data(name: str) -> str:
    """Return the kind of data that `name` names: "tfds", "text", "csv", "parquet", "images" or "sounds".

    Raises:
      ValueError: none of these, or several: a folder of images with text beside them, for example.
    """
    if name.startswith("tfds:"):
        return "tfds"
    path = local_path(name)
    if not path.exists():
        raise ValueError(f"There is no file or folder {name}. Check the path; TFDS data are named tfds:NAME:SPLIT.")
    if path.is_dir():
        here = {_suffix(file) for file in path.iterdir() if file.is_file() and not is_hidden(file.name)}
        below = {file.suffix.lower() for file in path.glob("*/**/*")}
        tests = (
            ("text", ".txt" in here),
            ("csv", bool(here & set(CSV_KINDS))),
            ("parquet", ".parquet" in here),
            ("images", bool((here | below) & set(IMAGE_SUFFIXES))),
            ("sounds", bool((here | below) & set(SOUND_SUFFIXES))),
        )
        kinds = [kind for kind, found in tests if found]
        if len(kinds) > 1:
            raise ValueError(
                f"{path} holds several kinds of data: {' and '.join(kinds)}. Move all but one of them to other folders."
            )
    else:
        kinds = [_KINDS[suffix] for suffix in [_suffix(path)] if suffix in _KINDS]
    if not kinds:
        raise ValueError(
            f"Cannot tell how to read {name!r}. A source is a .txt, .csv, .tsv or .parquet file, a folder of such "
            "files, a folder of images or sounds in folders by class, or tfds:NAME:SPLIT."
        )
    return kinds[0]


def open_source(name: str, *, like: Source | None = None, columns: Sequence[str] | None = None) -> Source:
    """Return the source that `name` names.

    `tfds:NAME:SPLIT`; a `.csv`, `.tsv` or `.parquet` file or a folder of them; a folder of images or of sounds by
    class. Images stay encoded (field `image`, bytes; decode them with `transforms.DecodeImage`).

    Args:
      name: see above.
      like: the data that a model was trained on: classes and categories have their numbers, files of the same kind are
        read with the same settings.
      columns: the fields that are needed, and must be there; None takes all. Where they leave out the label, folders
        need not be those of known classes.

    Raises:
      ValueError: it is none of these.
    """
    kind = kind_of_data(name)
    if kind == "tfds":
        dataset, _, split = name.removeprefix("tfds:").rpartition(":")
        if not dataset:
            raise ValueError(f"A TFDS source is written tfds:NAME:SPLIT, such as tfds:mnist:train; got {name!r}.")
        return TfdsSource(dataset, split=split)
    if kind == "text":
        raise ValueError(f"{name} is text; `data.text_bytes` reads it, and `jaxdist data prepare` makes tokens of it.")
    known = {} if like is None else vocabulary_of(like)
    classes = known.get("label") if columns is None or "label" in columns else None
    if kind in ("images", "sounds"):
        folder = ImageFolder if kind == "images" else SoundFolder
        for leaf in fingerprints.leaves(like):
            if isinstance(leaf, folder):
                return leaf.elsewhere(name, classes)
        return (
            ImageFolder(name, decode=False, classes=classes) if kind == "images" else SoundFolder(name, classes=classes)
        )
    table = TableSettings.of(like)
    return csv_like(name, table, known, columns) if kind == "csv" else _open_parquet(name, table, known, columns)


def _open_parquet(
    name: str, like: TableSettings, known: Mapping[str, Sequence[str]], columns: Sequence[str] | None
) -> ParquetSource:
    """Return the rows of Parquet files; see `csv_like`."""
    there = open_parquet(find_files(name, "*.parquet")[0]).schema_arrow.names
    wanted = like.columns_in(there) if columns is None else columns
    categories = {field: texts for field, texts in known.items() if field in (wanted or there)}
    numbers = None if wanted is None else [each for each in wanted if each not in categories]
    return ParquetSource(name, columns=numbers, categories=categories, missing=like.missing)


def prepare_tokens(
    paths: Any,
    out: str | os.PathLike,
    *,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    progress: ShowProgress | None = None,
) -> Prepared:
    """Write the bytes of text files, one after another, as `.npy` files of uint8 tokens for `TokenSource`."""
    found = find_files(paths, "*.txt")
    characters = _Numbers([np.memmap(path, np.uint8, "r") for path in found if os.path.getsize(path)])
    if not len(characters):
        raise ValueError(f"There is no text in {', '.join(found[:5])}: every file is empty.")
    made_of = fingerprint_text("text", *(fingerprint_array(part) for part in characters.parts))
    shards = _Shards(out, "tokens", made_of, len(characters), tokens_per_shard, ".npy")
    return shards.write_all(characters.save, progress)


def prepare_text(
    paths: Any,
    out: str | os.PathLike,
    tokenizer: str,
    *,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    progress: ShowProgress | None = None,
) -> Prepared:
    """Write the tokens of text files as `.npy` files for `TokenSource`, an end token after each file.

    The tokenizer is stored beside them. Each file's tokens are kept in a hidden folder until all are known, so an
    interrupted preparation encodes no file twice. `paths` are a text file, several, or a folder of `.txt` files, each
    of them a document. For `out` and `tokenizer` see `prepare`.

    Raises:
      ValueError: a file is not UTF-8, there is no text, or the tokenizer cannot be had.
    """
    documents = [path for path in find_files(paths, "*.txt") if os.path.getsize(path)]
    if not documents:
        raise ValueError(f"There is no text in {paths}: every file is empty.")
    contents = [fingerprint_array(np.memmap(path, np.uint8, "r")) for path in documents]
    folder, kept = pathlib.Path(out), _tokenizer_of(tokenizer, documents)
    made_of = fingerprint_text("text", text.fingerprint(kept), *contents)
    _check_same(folder, {"made_of": made_of})
    parts = _Numbers([_encode(path, kept, folder / f".{made_of}") for path in documents])
    shards = _Shards(out, "tokens", made_of, len(parts), tokens_per_shard, ".npy")
    files.write(folder / text.FILE_NAMES[kept.suffix], [kept.to_bytes()])
    made = shards.write_all(parts.save, progress)
    num_bytes = sum(map(os.path.getsize, documents))
    shards.note(vocab_size=kept.size, end_token=kept.end_token, bytes_per_token=num_bytes / made.total)
    shutil.rmtree(folder / f".{made_of}")
    return made


def _tokenizer_of(name: str, documents: list[str]) -> text.Tokenizer:
    kind, _, size = name.partition(":")
    if kind == "bpe" and size.isdigit():
        return text.train_byte_pairs(itertools.chain.from_iterable(map(text.pieces, documents)), int(size))
    return text.open_tokenizer(name)


def _encode(path: str, tokenizer: text.Tokenizer, folder: pathlib.Path) -> np.ndarray:
    """Return the tokens of a document and the end token, mapped from a file that is written if it is missing."""
    kept = folder / f"{fingerprint_text('document', path)}.npy"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokens = np.append(text.encode_document(tokenizer, path), tokenizer.end_token).astype(text.dtype_of(tokenizer))
        temporary = kept.with_suffix(".tmp")
        with files.drafted(kept, temporary), open(temporary, "wb") as file:
            np.save(file, tokens)
    return np.load(kept, mmap_mode="r", allow_pickle=False)


def prepare_records(
    source: Source,
    out: str | os.PathLike,
    *,
    examples_per_shard: int = EXAMPLES_PER_SHARD,
    progress: ShowProgress | None = None,
) -> Prepared:
    """Write the examples of a source as ArrayRecord files for `ArrayRecordSource`."""
    module = extras.require("array_record.python.array_record_module")
    shards = _Shards(out, "records", source.fingerprint(), len(source), examples_per_shard, ".array_record")

    def write(path: pathlib.Path, begin: int, end: int) -> None:
        # One record a group: reading in random order then decompresses no other record.
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for index in range(begin, end):
            writer.write(encode_example({name: np.asarray(value) for name, value in source[index].items()}))
        writer.close()

    made = shards.write_all(write, progress)
    names = {field: list(values) for field, values in vocabulary_of(source).items()}
    shards.note(vocabulary=names, shards=ShardList.of([ArrayRecordSource(path) for path in made.paths]).to_json())
    return made


def read_shard_list(folder: str | os.PathLike) -> ShardList:
    """Return the shard list of a folder of prepared records."""
    values = json.loads((pathlib.Path(folder) / PREPARED).read_text())
    if "shards" not in values:
        raise ValueError(f"{os.fspath(folder)} has no shard list: it holds {values['kind']}, or is not finished.")
    return ShardList.from_json(values["shards"])


class _Numbers:
    """Several arrays of one dim as one."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = parts
        self._ends = list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def save(self, path: pathlib.Path, begin: int, end: int) -> None:
        pieces = []
        while begin < end:
            number = bisect.bisect_right(self._ends, begin)
            stop = min(end, self._ends[number])
            offset = self._ends[number] - len(self.parts[number])
            pieces.append(self.parts[number][begin - offset : stop - offset])
            begin = stop
        with open(path, "wb") as file:
            np.save(file, np.concatenate(pieces))


def _check_same(folder: pathlib.Path, notes: Mapping[str, Any]) -> None:
    """Raise ValueError where the folder holds another preparation than the one with these notes."""
    path = folder / PREPARED
    if not path.exists():
        return
    found = json.loads(path.read_text())
    differing = [name for name, value in notes.items() if found.get(name) != value]
    if differing:
        was, now = ({name: values.get(name) for name in differing} for values in (found, notes))
        raise ValueError(f"{folder} holds another preparation: it has {was}, this one has {now}. Choose a new folder.")


class _Shards:
    """The shards of one preparation, some of which may already exist."""

    def __init__(self, out: str | os.PathLike, kind: str, made_of: str, total: int, size: int, suffix: str):
        if size < 1:
            raise ValueError(f"A shard needs at least 1 token or example; got shard_size={size}.")
        self._folder, self._total, self._size = pathlib.Path(out), total, size
        self._count = -(-total // size)
        self._names = [f"{kind}-{number:05d}-of-{self._count:05d}{suffix}" for number in range(self._count)]
        self._notes = {"kind": kind, "made_of": made_of, "total": total, "shard_size": size}
        self._folder.mkdir(parents=True, exist_ok=True)
        _check_same(self._folder, self._notes)
        self.note()

    def note(self, **more: Any) -> None:
        """Write what the shards are made of to a file, atomically."""
        self._notes |= more
        files.write_text(self._folder / PREPARED, json.dumps(self._notes, indent=1) + "\n")

    def write_all(self, write: Callable[[pathlib.Path, int, int], None], progress: ShowProgress | None) -> Prepared:
        """Call `write(path, begin, end)` for every shard that is missing."""
        num_kept = 0
        for name, begin, end in self._ranges():
            path = self._folder / name
            if path.exists():
                num_kept += 1
            else:
                temporary = self._folder / f".{name}.tmp"
                with files.drafted(path, temporary):
                    write(temporary, begin, end)
            if progress is not None:
                progress(end, self._total)
        return Prepared([str(self._folder / name) for name in self._names], self._total, num_kept)

    def _ranges(self) -> Iterator[tuple[str, int, int]]:
        for number, name in enumerate(self._names):
            yield name, number * self._size, min((number + 1) * self._size, self._total)
