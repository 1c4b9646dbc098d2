"""Files by address (https://, s3://, gs://, memory://, file://): the one module that uses fsspec."""

import contextlib
import os
import posixpath
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from jaxdist import extras

_Result = TypeVar("_Result")

_VERSION_KEYS = (
    "ETag",
    "etag",
    "md5Hash",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "updated",
    "mtime",
    "created",
)
_PAUSES = (0.5, 2.0)
"""Seconds before the attempts that follow a failed one."""
_SILENCE_SECONDS = 60.0
"""How long an HTTP server may send nothing."""


class FileFacts(NamedTuple):
    """What is known of a file without reading it; `size` is None where a server does not tell it."""

    size: int | None
    version: str


def is_address(path: str | os.PathLike) -> bool:
    """Return whether this is an address such as s3://bucket/x, and not a path on this machine."""
    return "://" in os.fspath(path)


def without_file_protocol(path: str | os.PathLike) -> str:
    """Return a path or an address as it is, and file:///x, which is a path on this machine, as /x."""
    name = os.fspath(path)
    return urllib.parse.unquote(name.removeprefix("file://")) if name.startswith("file://") else name


def file_facts(address: str) -> FileFacts:
    """Return the size of a file and a text that changes when it does, for a path on this machine too.

    Raises:
      ValueError: there is no such file, or it cannot be reached; the message says what to do.
    """
    if not is_address(address):
        try:
            status = os.stat(address)
        except OSError as error:
            raise ValueError(f"No such file: {address}.") from error
        return FileFacts(status.st_size, str(status.st_mtime_ns))
    info = _attempt(address, lambda system, path: system.info(path))
    if info.get("type") == "directory":
        raise ValueError(f"{address} is a folder, and a file is needed. Name the file.")
    return FileFacts(info.get("size"), "\0".join(str(info[key]) for key in _VERSION_KEYS if key in info))


def download(address: str, target: str) -> None:
    """Write the content of a file to `target`.

    Raises:
      ValueError: it cannot be read, or ends early.
    """
    facts = file_facts(address)
    _attempt(address, lambda system, path: system.get_file(path, target))
    if facts.size is not None and os.path.getsize(target) != facts.size:
        raise ValueError(
            f"{address} was read as {os.path.getsize(target):,} bytes, and it has {facts.size:,}. Try again; if it "
            "stays so, the file is not whole where it is stored."
        )


@contextlib.contextmanager
def opened(address: str) -> Iterator[Any]:
    """Open a file, on this machine or not, to be read forward from its beginning."""
    if not is_address(address):
        try:
            file = open(address, "rb")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"No such file: {address}.") from error
    else:
        file = _attempt(address, lambda system, path: system.open(path, "rb", cache_type="readahead"))
    with file:
        try:
            yield file
        except TimeoutError as error:
            raise ValueError(f"{address} cannot be read: {_reason(error)}. {_ADVICE}") from error


def list_folder(address: str, *patterns: str) -> list[str]:
    """Return the addresses of the files in a folder that match one of `patterns`, sorted.

    A file is its own only entry. An address with * means the files that match it.
    """
    if "*" in address:
        found = _attempt(address, lambda system, path: [_full(system, each) for each in system.glob(path)])
    else:
        folder = address.rstrip("/")

        def matching(system: Any, path: str) -> list[str]:
            if not system.isdir(path) or system.isfile(path):
                return [address]
            beginning = path.rstrip("/")
            return [_full(system, each) for pattern in patterns for each in system.glob(f"{beginning}/{pattern}")]

        found = _attempt(folder, matching)
    if not found:
        raise ValueError(f"No file matches {' or '.join(patterns) if '*' not in address else address} in {address}.")
    return sorted(found)


def exists(address: str) -> bool:
    """Return whether there is such a file."""
    return bool(_attempt(address, lambda system, path: system.isfile(path)))


def file_name(address: str) -> str:
    """Return the last part of an address."""
    return posixpath.basename(address.split("?", 1)[0].rstrip("/")) or "file"


def _full(system: Any, path: str) -> str:
    return path if "://" in path else system.unstrip_protocol(path)


def _attempt(address: str, use: Callable[[Any, str], _Result]) -> _Result:
    """Return what `use` returns for the file system and the path of an address, after up to three attempts."""
    fsspec = extras.require("fsspec", extra="remote")
    protocol = address.split("://", 1)[0]
    try:
        system, path = fsspec.core.url_to_fs(address, **_limits(fsspec, protocol))
    except ImportError as error:
        raise extras.MissingExtra(f"{protocol}:// needs a package of its own: {error}.") from error
    except OSError as error:  # some protocols connect here
        raise ValueError(
            f"{address} cannot be read: {type(error).__name__}: {error}. Check the address and the network."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{address} cannot be read: {error}. Known are, for example, https, s3, gs and file."
        ) from error
    for pause in (*_PAUSES, None):
        try:
            return use(system, path)
        except PermissionError as error:
            raise ValueError(f"{address} may not be read: {error}. Check the credentials of {protocol}.") from error
        except Exception as error:  # each file system raises errors of its own
            # A server that cannot be reached is reported as a file that is not found, raised from the true error.
            true = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
            if isinstance(true, FileNotFoundError) or getattr(true, "status", None) == 404:
                raise ValueError(f"There is no file {address}. Check the address.") from error
            if pause is None:
                raise ValueError(f"{address} cannot be read: {_reason(true)}. {_ADVICE}") from error
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


_ADVICE = "Check the address, the network and the credentials."


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "nothing came for too long"
    return f"{type(error).__name__}: {error}"


def _limits(fsspec: Any, protocol: str) -> dict[str, Any]:
    """Return the settings of a file system that limit how long a server is silent.

    Storage services have such a limit. For HTTP aiohttp has only one of five minutes for a whole file, too long for a
    server that has stopped and too short for a large file. Settings of fsspec's own configuration are kept.
    """
    if protocol not in ("http", "https"):
        return {}
    aiohttp = extras.require("aiohttp", extra="remote")
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_SECONDS, sock_read=_SILENCE_SECONDS)
    configured = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
    return {"client_kwargs": {"timeout": timeout, **configured}}
