"""Files: listing them, and reading one."""

import collections
import fnmatch
import os
import pathlib
import posixpath
import re
import stat
import warnings
from collections.abc import Iterator, Sequence, Set

from jaxdist.data.remote import addresses, file_cache
from jaxdist.data.sources.source import CorruptExample
from jaxdist.data.sources.vocabulary import listed

PREPARED = "prepared.json"
"""The file beside prepared records or tokens that says what they are."""

_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "eval", "dev", "holdout"}


_LEFT_BEHIND = ("~", ".bak", ".orig", ".tmp", ".swp", ".part", ".crdownload")
"""How names of copies and unfinished files end, which would give examples twice or in part."""


_DESCRIBES = re.compile(r"_|(readme|licen[cs]e|notice|changelog)\b|.*\.(md|json|ya?ml|crc|idx)$", re.IGNORECASE)
"""Names of files that are found beside data and describe them."""


def find_files(paths: str | os.PathLike | Sequence[str | os.PathLike], *patterns: str) -> list[str]:
    """Return the paths as a list; a folder means its files that match one of `patterns`, sorted by name.

    A file that is named beside its folder is there once, at its own place. Of an address such as s3://bucket/x, the
    copies in the cache are returned, which are kept while this process lives.
    """
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found: list[str] = []
    named = [addresses.without_file_protocol(path) for path in listed]
    check_distinct(named)
    for path in named:
        if addresses.is_address(path):
            found += [file_cache.of_process().pin(each) for each in addresses.list_folder(path, *patterns)]
        else:
            found += find_local_files(path, *patterns, named=named)
    if not found:
        where = ", ".join(map(str, listed)) or "an empty list of paths"
        raise ValueError(f"No file matches {' or '.join(patterns)} in {where}.")
    return found


def check_distinct(named: Sequence[str]) -> None:
    """Raise ValueError where a file or folder is named twice, which would make each of its examples two."""
    places = [path if addresses.is_address(path) else os.path.abspath(path) for path in named]
    twice = next((path for path, count in collections.Counter(places).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice, and its examples would count twice. Name it once.")


def find_local_files(path: str, *patterns: str, named: Sequence[str] = ()) -> list[str]:
    """Return a file, or the files of a folder that match one of `patterns`, in capitals too.

    What is `named` beside the folder is no part of it.

    Raises:
      ValueError: it does not exist, or such files are also in folders below, and would be left out.

    Warns:
      UserWarning: other files of the folder are left out, except what describes data, such as a README.
    """
    root = pathlib.Path(path)
    if not root.exists():
        is_pattern = any(mark in str(path) for mark in "*?[") or str(path).startswith("~")
        hint = " Patterns and ~ are not expanded here: give a folder, or what glob.glob returns." if is_pattern else ""
        raise ValueError(f"No such file or folder: {path}.{hint}")
    if not root.is_dir():
        return [str(root)]
    here, below, others = _sorted_out(str(root), patterns, {*map(os.path.abspath, named)} - {os.path.abspath(root)})
    if here and below:
        raise ValueError(
            f"{path} holds {len(here)} files {' or '.join(patterns)}, and {len(below)} in folders below it, such as "
            f"{min(below)}, would be left out. Name each folder that counts, or move the others elsewhere."
        )
    if below:
        raise ValueError(
            f"{path} holds no files {' or '.join(patterns)} itself, but {len(below)} in folders below it, such as "
            f"{min(below)}. Name the folders; what their names say, as in year=2020, is no column."
        )
    if here and others:
        _warn_of_left_out(len(others), path, min(others), patterns)
    return sorted(here)


def _sorted_out(root: str, patterns: Sequence[str], named: Set[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the files of a folder that match, those in folders below, and its others; without what is also `named`."""
    here: list[str] = []
    below: list[str] = []
    others: list[str] = []

    def counts(folder: str, name: str) -> bool:
        return not is_hidden(name) and not (named and os.path.abspath(os.path.join(folder, name)) in named)

    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if counts(folder, name)]
        for name in names:
            if name.endswith(_LEFT_BEHIND) or not counts(folder, name):
                continue
            if any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns):
                (here if folder == root else below).append(os.path.join(folder, name))
            elif folder == root and not _DESCRIBES.match(name):
                others.append(os.path.join(folder, name))
    return here, below, others


def file_beside(paths: str | os.PathLike | Sequence[str | os.PathLike], name: str) -> pathlib.Path | None:
    """Return the path of a file in the folder of the first of `paths`, of its copy for an address; None without one."""
    first = paths if isinstance(paths, str | os.PathLike) else next(iter(paths), "")
    where = addresses.without_file_protocol(first)
    if addresses.is_address(where):
        folders = [where.rstrip("/"), posixpath.dirname(where.rstrip("/"))]
        found = next((f"{folder}/{name}" for folder in folders if addresses.exists(f"{folder}/{name}")), None)
        return None if found is None else pathlib.Path(file_cache.of_process().pin(found))
    path = pathlib.Path(where)
    path = (path if path.is_dir() else path.parent) / name
    return path if path.is_file() else None


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


_OF_WINDOWS = ("Thumbs.db", "desktop.ini")


def is_hidden(name: str) -> bool:
    """Return whether tools leave files of this name behind: `.ipynb_checkpoints`, `._1.png`, `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


def list_by_class(
    root: str | os.PathLike, suffixes: Sequence[str], classes: Sequence[str] | None, *, unread: Sequence[str] = ()
) -> tuple[tuple[str, ...], list[str], list[int]]:
    """Return the classes' names, and all files with one of the suffixes with the number of their class.

    Args:
      root: the folder of the classes' folders. Hidden files and folders do not count.
      suffixes: in lower case.
      classes: the names in the order of their numbers; None takes the folders' in alphabetical order.
      unread: suffixes of files that belong to the data and cannot be read.

    Raises:
      ValueError: there are no such files, a folder that is not in `classes`, or files of `unread`.

    Warns:
      UserWarning: other files are left out.
    """
    folder = local_path(root)
    if not folder.is_dir():
        raise ValueError(f"No such folder: {folder}.")
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not is_hidden(entry.name)]
        names = sorted(entry.name for entry in shown if entry.is_dir())
        loose = [entry.name for entry in shown if entry.name.lower().endswith(tuple(suffixes)) and not entry.is_dir()]
    _check_folders(str(folder), names, loose)
    numbers = {
        name: number for number, name in enumerate(listed(names if classes is None else classes, what="Classes"))
    }
    unknown = [name for name in names if name not in numbers]
    if unknown:
        raise ValueError(
            f"{folder} has folders that are not among the {len(numbers)} classes: {', '.join(unknown[:5])}. The "
            f"classes are {', '.join(list(numbers)[:10])}. Remove these folders, or add them to `classes`."
        )
    files: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for name in names:
        found = sorted(_walk(os.path.join(folder, name), tuple(suffixes), tuple(unread), others))
        files += found
        labels += [numbers[name]] * len(found)
    if not files:
        raise ValueError(
            f"{folder} holds no files {', '.join(suffixes)} in folders named by class, as in {folder}/CLASS/FILE."
        )
    if others:
        _warn_of_left_out(len(others), f"the folders of {folder}", min(others), suffixes)
    return tuple(numbers), files, labels


def list_all(root: str | os.PathLike, suffixes: Sequence[str], *, unread: Sequence[str] = ()) -> list[str]:
    """Return the file `root`, or all files of a folder and of those below it that end in one of the suffixes, sorted.

    For the arguments, what is raised and what is warned of see `list_by_class`.
    """
    folder, others = local_path(root), list[str]()
    if not folder.is_dir():
        return [str(folder)]
    found = [*_walk(str(folder), tuple(suffixes), tuple(unread), others)]
    if not found:
        raise ValueError(f"{folder} and the folders below it hold no files {', '.join(suffixes)}.")
    if others:
        _warn_of_left_out(len(others), str(folder), min(others), suffixes)
    return sorted(found, key=lambda path: path.split(os.sep))  # those of a folder stay together


def _warn_of_left_out(count: int, where: str, example: str, endings: Sequence[str]) -> None:
    warnings.warn(
        f"{count} files in {where} are left out, such as {example}: their names end in none of {', '.join(endings)}. "
        "Move them elsewhere, or rename those that count.",
        stacklevel=2,
    )


def _check_folders(root: str, names: Sequence[str], loose: Sequence[str]) -> None:
    """Raise ValueError where the folders are no classes, or files are beside them."""
    if names and {name.lower() for name in names} <= _SPLITS and (len(names) > 1 or _has_folders(root, names[0])):
        raise ValueError(
            f"{root} holds {', '.join(names)}, parts of a data set and no classes. Name one of them, such as "
            f"{os.path.join(root, names[-1])}."
        )
    if names and loose:
        raise ValueError(
            f"{len(loose)} files are beside the folders of the classes, such as {min(loose)!r} in {root}, and would be "
            "left out. Move them into the folder of their class, or elsewhere."
        )
    for name in names:
        if name != name.encode("utf-8", "replace").decode():
            raise ValueError(f"The name of a class is not UTF-8: {name!r} in {root}. Rename the folder.")


def _has_folders(*parts: str) -> bool:
    with os.scandir(os.path.join(*parts)) as entries:
        return any(entry.is_dir() for entry in entries)


def _walk(folder: str, suffixes: tuple[str, ...], unread: tuple[str, ...], others: list[str]) -> Iterator[str]:
    """Yield the files below a folder that end in one of the suffixes; put the rest into `others`."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                if entry.is_symlink():
                    _check_no_loop(entry.path)
                yield from _walk(entry.path, suffixes, unread, others)
            elif entry.name.lower().endswith(suffixes):  # a link to nothing is listed too, and refused when read
                yield entry.path
            elif entry.name.lower().endswith(unread):
                raise ValueError(
                    f"Files of this kind cannot be read, and would be left out: {entry.path}. Convert them, or move "
                    "them elsewhere."
                )
            elif entry.name not in _OF_WINDOWS:
                others.append(entry.path)


def _check_no_loop(link: str) -> None:
    """Raise ValueError where a link leads to a folder that it is in."""
    target, folder = os.path.realpath(link), os.path.realpath(os.path.dirname(link))
    if os.path.commonpath([target, folder]) == target:
        raise ValueError(f"{link} is a link to a folder that it is in, so its files would never end. Remove it.")


def read_file(path: str) -> bytes:
    """Return a file's content; CorruptExample where it is gone or cannot be read."""
    try:
        # A file object would cost half as much again as reading a small file.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CorruptExample(f"Unreadable file: {path} is no file, but a folder, a pipe or a device.")
            data = os.read(descriptor, size := status.st_size)
            while len(data) < size and (more := os.read(descriptor, size - len(data))):
                data += more
            return data
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CorruptExample(f"Unreadable file: {error}") from error
