"""Samples in tar files, as WebDataset has them: consecutive members with one key are the parts of one sample.

The key of a member is its name up to the first dot behind the last slash, the rest its extension: `a/cat.1.jpg` is the
part `1.jpg` of the sample `a/cat`. Members without a dot and folders belong to no sample; a link that would is refused.
"""

import json
import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple


class TarSample(NamedTuple):
    """A sample: its key, and where each of its parts is in the file, (offset, size) by extension."""

    key: str
    parts: dict[str, tuple[int, int]]


def index_tar(file: BinaryIO, name: str) -> list[TarSample]:
    """Return the samples of a tar file that is not compressed.

    Raises:
      ValueError: it is no tar file, it is not whole, or a sample has two parts of one extension.
    """
    samples: list[TarSample] = []
    keys: set[str] = set()
    for member, _ in _members(file, name, "r:"):
        found = _part_of(member, name)
        if found is None:
            continue
        if member.issparse():
            raise ValueError(f"{name}: {member.name} is a sparse file. Write the tar file without sparse members.")
        key, extension = found
        if not samples or samples[-1].key != key:
            if key in keys:
                raise ValueError(
                    f"{name}: the parts of the sample {key!r} do not follow each other, {member.name} comes later. "
                    "Write the members in the order of their names."
                )
            keys.add(key)
            samples.append(TarSample(key, {}))
        check_new(samples[-1].parts, member.name, extension, name)
        samples[-1].parts[extension] = (member.offset_data, member.size)
    return samples


def read_samples(file: Any, name: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the key and the parts of each sample of a tar file that is read forward; see `index_tar`."""
    key, parts = None, dict[str, bytes]()
    for member, archive in _members(file, name, "r|"):
        found = _part_of(member, name)
        if found is None:
            continue
        if key is not None and found[0] != key:
            yield key, parts
            parts = {}
        key, extension = found
        check_new(parts, member.name, extension, name)
        content = archive.extractfile(member)
        assert content is not None  # since it is a file
        try:
            parts[extension] = content.read()
        except tarfile.TarError as error:
            raise ValueError(_damaged(name, f"in {member.name}", error)) from error
    if key is not None:
        yield key, parts


def _part_of(member: tarfile.TarInfo, name: str) -> tuple[str, str] | None:
    """Return the key and the extension of a member; None where it belongs to no sample."""
    found = key_and_extension(member.name)
    if found is not None and (member.islnk() or member.issym()):
        raise ValueError(
            f"{name}: {member.name} is a link to {member.linkname}, and the sample would lack it. Write the tar file "
            "with what links lead to (`tar --dereference --hard-dereference`)."
        )
    return found if member.isreg() else None


def key_and_extension(name: str) -> tuple[str, str] | None:
    """Return the key and the extension of a member; None where it belongs to no sample."""
    folder, base = posixpath.split(name)
    stem, dot, extension = base.partition(".")
    left_behind = any(part == "__MACOSX" for part in folder.split("/"))
    if not dot or not stem or not extension or base.startswith("__") or left_behind:
        return None
    return posixpath.join(folder, stem), extension.lower()


def check_new(parts: Any, member: str, extension: str, name: str) -> None:
    """Raise ValueError where a sample has a part of this extension already."""
    if extension in parts:
        raise ValueError(
            f"{name}: the sample of {member} has two parts {extension!r}. Each sample needs a key of its own: rename "
            "the members, for example to 000001.jpg and 000001.cls."
        )


def to_json(samples: list[TarSample]) -> str:
    """Return the index as text."""
    return json.dumps([[key, parts] for key, parts in samples])


def from_json(text: str) -> list[TarSample]:
    """Return the index that `to_json` wrote."""
    return [TarSample(key, {name: tuple(place) for name, place in parts.items()}) for key, parts in json.loads(text)]


class _StrictMember(tarfile.TarInfo):
    """A header of which tarfile accepts nothing but the mark at the end as the end: not a cut, and no damaged block."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictMember":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def _members(file: Any, name: str, mode: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Yield the members, each with the archive."""
    last = "at its beginning"
    try:
        with tarfile.open(fileobj=file, mode=mode, tarinfo=_StrictMember) as archive:  # type: ignore[call-overload]
            while (member := archive.next()) is not None:
                last = f"after {member.name}"
                yield member, archive
                archive.members.clear()  # it would keep all of them
            _check_end(archive, name)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(_damaged(name, last, error)) from error


def _check_end(archive: tarfile.TarFile, name: str) -> None:
    """Raise ValueError where something follows the end of a tar file, whose members would be left out."""
    rest: Any = archive.fileobj
    while block := rest.read(_BLOCK):
        if block.count(0) < len(block):
            raise ValueError(
                f"{name} has more after the end of its tar file, which would be left out: perhaps it is several tar "
                "files one after another. Keep each in a file of its own, or join them with `tar --concatenate`."
            )


_BLOCK = 1 << 20


def _damaged(name: str, where: str, error: Exception) -> str:
    return (
        f"{name} is not a whole tar file, it ends or is damaged {where}: {error}. Copy it again, or write it again; "
        "where it is compressed, its name ends in .gz, .bz2, .xz or .zst."
    )
