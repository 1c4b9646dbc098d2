"""Files: listing them, and reading one."""

import os
import pathlib
from collections.abc import Iterator, Sequence

from jaxdist.data.remote import addresses, file_cache
from jaxdist.data.sources.source import CorruptExample

PREPARED = "prepared.json"
"""The file beside prepared records or tokens that says what they are."""


def find_files(paths: str | os.PathLike | Sequence[str | os.PathLike], pattern: str) -> list[str]:
    """Return the paths as a list; a folder means its files that match `pattern`, sorted by name.

    Of an address such as s3://bucket/x, the copies in the cache are returned, which are kept while this process lives.
    """
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found: list[str] = []
    for path in map(addresses.without_file_protocol, listed):
        found += _find_copies(path, pattern) if addresses.is_address(path) else find_local_files(path, pattern)
    if not found:
        raise ValueError(f"No file matches {pattern} in {', '.join(map(str, listed)) or 'an empty list of paths'}.")
    return found


def find_local_files(path: str, pattern: str) -> list[str]:
    """Return a file, or the files of a folder that match `pattern`; ValueError where it does not exist."""
    named = pathlib.Path(path)
    if not named.exists():
        raise ValueError(f"No such file or folder: {path}.")
    matching = [file for file in named.glob(pattern) if not is_hidden(file.name)] if named.is_dir() else [named]
    return sorted(map(str, matching))


def _find_copies(address: str, pattern: str) -> list[str]:
    return [file_cache.of_process().pin(each) for each in addresses.list_folder(address, pattern)]


def one_file(path: str | os.PathLike) -> pathlib.Path:
    """Return the path of a file, or of its copy in the cache where it has an address such as s3://bucket/x."""
    name = addresses.without_file_protocol(path)
    return pathlib.Path(file_cache.of_process().pin(name) if addresses.is_address(name) else name)


def local_path(path: str | os.PathLike) -> pathlib.Path:
    """Return the path of a file or folder on this machine; ValueError for an address such as gs://bucket/x."""
    name = addresses.without_file_protocol(path)
    if addresses.is_address(name):
        raise ValueError(
            f"A folder of single files is read on this machine only; got {name!r}. Pack the files into tar shards "
            "(`data.TarSource` reads them from there), copy them here, or mount the bucket as a folder."
        )
    return pathlib.Path(name)


def is_hidden(name: str) -> bool:
    """Return whether tools leave files of this name behind: `.ipynb_checkpoints`, `._1.png`, `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


def list_by_class(
    root: str | os.PathLike, suffixes: Sequence[str], classes: Sequence[str] | None
) -> tuple[tuple[str, ...], list[str], list[int]]:
    """Return the classes' names, and all files with one of the suffixes with the number of their class.

    Args:
      root: the folder of the classes' folders. Hidden files and folders do not count.
      suffixes: in lower case.
      classes: the names in the order of their numbers; None takes the folders' in alphabetical order.

    Raises:
      ValueError: there are no such files, or a folder that is not in `classes`.
    """
    folder = local_path(root)
    if not folder.is_dir():
        raise ValueError(f"No such folder: {folder}.")
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))
    numbers = {name: number for number, name in enumerate(names if classes is None else classes)}
    unknown = [name for name in names if name not in numbers]
    if unknown:
        raise ValueError(
            f"{folder} has folders that are not among the {len(numbers)} classes: {', '.join(unknown[:5])}. The "
            f"classes are {', '.join(list(numbers)[:10])}. Remove these folders, or add them to `classes`."
        )
    files, labels = [], []
    for name in names:
        found = sorted(_walk(os.path.join(folder, name), tuple(suffixes)))
        files += found
        labels += [numbers[name]] * len(found)
    if not files:
        raise ValueError(
            f"{folder} holds no files {', '.join(suffixes)} in folders named by class, as in {folder}/CLASS/FILE."
        )
    return tuple(numbers), files, labels


def _walk(folder: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, suffixes)
            elif entry.name.lower().endswith(suffixes):  # a link to nothing is listed too, and refused when read
                yield entry.path


def read_file(path: str) -> bytes:
    """Return a file's content; CorruptExample where it is gone or cannot be read."""
    try:
        # A file object would cost half as much again as reading a small file.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.read(descriptor, size := os.fstat(descriptor).st_size)
            while len(data) < size and (more := os.read(descriptor, size - len(data))):
                data += more
            return data
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CorruptExample(f"Unreadable file: {error}") from error
