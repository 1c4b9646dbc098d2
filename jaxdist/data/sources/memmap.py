"""Arrays and token streams in files, read through memory maps: unused parts take no memory.

Each process opens its own maps: these sources are pickled as file names.
"""

import bisect
import itertools
import json
import os
from collections.abc import Mapping, Sequence

import numpy as np

from jaxdist.data.decoders.kinds import check_kind, kind_of
from jaxdist.data.fingerprints import FileList
from jaxdist.data.sources.listing import PREPARED, file_beside, find_files, one_file
from jaxdist.data.sources.source import (
    ArraySource,
    CorruptExample,
    Example,
    checked_ids,
    checked_index,
    fingerprint_array,
    fingerprint_text,
)
from jaxdist.setting_group import whole_number


class NpySource(ArraySource):
    """Examples in `.npy` files, one file a field, that share dim 0.

    >>> source = NpySource({"image": "images.npy", "label": "labels.npy"})
    """

    def __init__(self, paths: Mapping[str, str | os.PathLike]):
        if not isinstance(paths, Mapping):
            raise ValueError(f"NpySource takes the file of each field, as in {{'x': 'x.npy'}}; got {paths!r}.")
        self._paths = {name: os.fspath(path) for name, path in paths.items()}
        super().__init__({name: open_npy(path) for name, path in self._paths.items()})
        self.files = FileList(list(self._paths.values()))

    def __reduce__(self) -> tuple:
        return NpySource, (self._paths,)


class TokenSource:
    """Windows of `length` tokens, int32, of token files: each token is in one window, as field `tokens`.

    Windows do not cross files; fewer than `length` tokens at the end of a file belong to no window.

    Args:
      paths: a file, several, or a folder of `.npy` files: `.npy` files of one dim, or raw files of `dtype`.
      length: tokens of a window.
      dtype: of raw files; np.uint8 reads any text as bytes.

    Raises:
      ValueError: no file, no window, or a file that does not hold whole tokens.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        length: int,
        dtype: np.dtype | type | None = None,
    ):
        self._paths, self._length, self._dtype = find_files(paths, "*.npy"), whole_number("length", length), dtype
        self._open()
        if not len(self):
            raise ValueError(f"No file has {length} tokens, the length of a window: {', '.join(self._paths[:5])}.")

    def _open(self) -> None:
        self._fingerprint: str | None = None
        self.files = FileList(self._paths)
        self._tokens = [_open_tokens(path, self._dtype) for path in self._paths]
        self._windows = [tokens[: len(tokens) // self._length * self._length] for tokens in self._tokens]
        self._windows = [tokens.reshape(-1, self._length) for tokens in self._windows]
        self._ends = list(itertools.accumulate(len(windows) for windows in self._windows))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        index = checked_index(index, len(self))
        part = bisect.bisect_right(self._ends, index)
        return {"tokens": np.array(_as_int32(self._windows[part][index - self._ends[part]], self._paths[part]))}

    def __getitems__(self, ids: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Return the windows `ids`, shape (len(ids), length)."""
        ids = checked_ids(ids, len(self))
        if len(self._windows) == 1:
            return {"tokens": _as_int32(self._windows[0].take(ids, axis=0), self._paths[0])}
        tokens = np.empty((len(ids), self._length), np.int32)
        parts = np.searchsorted(self._ends, ids, side="right")
        for part in np.unique(parts).tolist():
            mine = parts == part
            tokens[mine] = _as_int32(self._windows[part][ids[mine] - self._ends[part]], self._paths[part])
        return {"tokens": tokens}

    def fingerprint(self) -> str:
        """Return the hash of the window's length and of the files' contents (a sample of them where they are large)."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_text("tokens", self._length, *map(fingerprint_array, self._tokens))
        return self._fingerprint

    def __getstate__(self) -> dict:
        return {"_paths": self._paths, "_length": self._length, "_dtype": self._dtype}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()


class TokenDocuments:
    """The documents of token files, one an example: field `tokens` int32, the end token of each included.

    >>> documents = TokenDocuments("tokens/", longest=512)
    >>> source = Packed(documents, documents.lengths, row_length=512)

    Files continue each other, as the shards of `jaxdist data prepare --tokenizer` do. What follows the last end token
    is a document.

    Args:
      paths: as for TokenSource.
      end_token: the number of the token that ends a document; None takes what `jaxdist data prepare` noted.
      longest: a longer document becomes several examples of this length and a rest; None keeps every document whole.
      dtype: of raw files.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        end_token: int | None = None,
        longest: int | None = None,
        dtype: np.dtype | type | None = None,
    ):
        if longest is not None:
            whole_number("longest", longest)
        self._paths, self._longest, self._dtype = find_files(paths, "*.npy"), longest, dtype
        self.end_token = _noted_end_token(paths) if end_token is None else int(end_token)
        self._open()
        if not len(self):
            raise ValueError(f"There are no tokens in {', '.join(self._paths[:5])}.")

    def _open(self) -> None:
        self.files = FileList(self._paths)
        self._tokens = [_open_tokens(path, self._dtype) for path in self._paths]
        self._ends_of_files = np.cumsum([0, *map(len, self._tokens)])
        begins = [
            np.flatnonzero(tokens == self.end_token) + 1 + offset
            for tokens, offset in zip(self._tokens, self._ends_of_files)
        ]
        bounds = np.unique(np.concatenate([[0], *begins, self._ends_of_files[-1:]]))
        if self._longest is not None:
            pieces = [np.arange(begin, end, self._longest) for begin, end in itertools.pairwise(bounds.tolist())]
            bounds = np.concatenate([*pieces, bounds[-1:]])
        self._bounds = bounds.astype(np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of each document, int64: what `Packed` and `Bucketed` ask for."""
        return np.diff(self._bounds)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> Example:
        index = checked_index(index, len(self))
        begin, end = int(self._bounds[index]), int(self._bounds[index + 1])
        first = int(np.searchsorted(self._ends_of_files, begin, side="right")) - 1
        parts = []
        while begin < end:
            offset = int(self._ends_of_files[first])
            parts.append(_as_int32(self._tokens[first][begin - offset : end - offset], self._paths[first]))
            begin, first = begin + len(parts[-1]), first + 1
        return {"tokens": np.concatenate(parts)}

    def fingerprint(self) -> str:
        """Return the hash of the settings and of the files' contents (a sample of them where they are large)."""
        settings = (self._longest, self.end_token)
        return fingerprint_text("documents", *settings, *map(fingerprint_array, self._tokens))

    def __getstate__(self) -> dict:
        return {name: getattr(self, name) for name in ("_paths", "_longest", "_dtype", "end_token")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()


def _as_int32(tokens: np.ndarray, path: str) -> np.ndarray:
    """Return tokens as int32; CorruptExample where one would become another."""
    limits = np.iinfo(np.int32)
    if not np.can_cast(tokens.dtype, np.int32) and tokens.size:
        outside = (tokens < limits.min) | (tokens > limits.max)
        if outside.any():
            raise CorruptExample(
                f"{path} holds the token {tokens[outside][0]}, and tokens are at most {limits.max}. Renumber them, or "
                "give the dtype that the file was written with."
            )
    return np.asarray(tokens.astype(np.int32, copy=False))


def _noted_end_token(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> int:
    notes = file_beside(paths, PREPARED)
    found = None if notes is None else json.loads(notes.read_text()).get("end_token")
    if found is None:
        raise ValueError(
            f"It is unclear which token ends a document: no {PREPARED} beside {paths} says so. Give `end_token`."
        )
    return int(found)


def text_bytes(paths: str | os.PathLike | Sequence[str | os.PathLike], *, length: int) -> TokenSource:
    """Return the windows of `length` bytes of text files (or of the `.txt` files of a folder): 256 different tokens."""
    found = find_files(paths, "*.txt")
    for path in found:
        with open(path, "rb") as file:
            check_kind(path, file.read(16), wanted="a text", do="Decompress or convert it first.")
    return TokenSource(found, length=length, dtype=np.uint8)


def open_npy(path: str | os.PathLike) -> np.ndarray:
    """Return the array of a `.npy` file, mapped read-only; CorruptExample where the file is not whole."""
    name, where = os.fspath(path), one_file(path)
    if not where.is_file():
        raise ValueError(f"No such file: {name}.")
    with open(where, "rb") as file:
        head = file.read(16)
    if head and not head.startswith((b"\x93NUMPY", b"PK")):
        raise CorruptExample(f"{name} is no .npy file, but {kind_of(head) or 'another kind'}. Write it with np.save.")
    try:
        found = np.load(where, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CorruptExample(f"{name} is not a whole .npy file of numbers: {error}") from error
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{name} is an .npz archive of several arrays. Save each as a .npy file.")
    if isinstance(found, np.memmap) and found.offset + found.nbytes < os.path.getsize(where):
        raise CorruptExample(
            f"{name} has more after the end of its array, which would be left out: perhaps np.save has written several "
            "arrays to it. Save each as a .npy file."
        )
    return found


def _open_tokens(path: str, dtype: np.dtype | type | None) -> np.ndarray:
    if path.endswith(".npy"):
        tokens = open_npy(path)
    elif dtype is None:
        raise ValueError(f"{path} is not a .npy file; give the dtype of its tokens, such as dtype=np.uint16.")
    elif os.path.getsize(path) % np.dtype(dtype).itemsize:
        raise CorruptExample(
            f"{path} has {os.path.getsize(path)} bytes, which is not a whole number of {np.dtype(dtype)} tokens."
        )
    else:
        tokens = np.memmap(path, dtype, mode="r") if os.path.getsize(path) else np.empty(0, dtype)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"{path} must hold integers in one dim; got {tokens.dtype} of shape {tokens.shape}.")
    return tokens
