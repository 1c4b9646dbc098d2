"""The objects of one run directory in remote storage, through fsspec.

Names are relative to the run directory, with slashes. Whatever a storage's package raises becomes a StoreError, which
names what was done to which object: the packages raise errors of botocore, aiohttp, Google and asyncio.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from jaxdist import errors, extras
from jaxdist.rundir.remote.run_address import Address

PACKAGES = {
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "gcs": "gcsfs",
    "gs": "gcsfs",
    "hdfs": "pyarrow",
    "oss": "ossfs",
    "s3": "s3fs",
    "s3a": "s3fs",
    "sftp": "paramiko",
    "smb": "smbprotocol",
    "ssh": "paramiko",
}
"""The package that opens a protocol, for those whose package is not named like it."""
_OBJECTS = {"abfs", "abfss", "az", "gcs", "gs", "memory", "oss", "s3", "s3a"}
"""Protocols of stores where an object appears whole or not at all, and where there are no folders to make."""
_DRAFT = ".part"


class StoreError(OSError):
    """The storage did not do what was asked."""


class RunStore:
    """The objects below an address.

    `files` is the file system of fsspec, and `root` the path of the run directory in it.
    """

    def __init__(self, address: Address, files: Any, root: str):
        self.address, self._files, self._root = address, files, root.rstrip("/")
        self._has_objects = address.protocol in _OBJECTS

    def read(self, name: str) -> bytes | None:
        """Return the content of an object, None if there is no such object."""
        with self._doing("read", name):
            try:
                return bytes(self._files.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Create or replace an object: a reader finds the old content or the new."""
        with self._doing("write", name):
            path = self._ready(name)
            if self._has_objects:
                self._files.pipe_file(path, content)
                return
            self._files.pipe_file(path + _DRAFT, content)
            self._files.mv(path + _DRAFT, path)

    def create(self, name: str, content: bytes) -> bool:
        """Create an object; return whether it is new. Two calls at once both succeed only where a store allows that."""
        with self._doing("create", name):
            try:
                self._files.pipe_file(self._ready(name), content, mode="create")
            except FileExistsError:
                return False
            return True

    def upload(self, files: Mapping[str, pathlib.Path]) -> None:
        """Upload files, several at a time where the storage can; each object is whole only if this returns."""
        with self._doing("upload", next(iter(files), "")):
            names = [self._ready(name) for name in files]
            if names:
                self._files.put([str(path) for path in files.values()], names)

    def download(self, name: str, path: pathlib.Path) -> None:
        """Write the content of an object to a file."""
        with self._doing("download", name):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files.get_file(self._path(name), str(path))

    def remove(self, name: str) -> None:
        """Remove an object, if there is one."""
        with self._doing("remove", name), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return the bytes of each object in a folder and its folders, all by default."""
        with self._doing("list", folder):
            self._files.invalidate_cache()
            root = self._path(folder) if folder else self._root
            try:
                found = self._files.find(root, detail=True)
            except FileNotFoundError:
                return {}
            return {
                name: int(info["size"])
                for path, info in found.items()
                if info["type"] == "file" and (name := self._name(path)) and not name.endswith(_DRAFT)
            }

    def folders(self) -> list[str]:
        """Return the names of the folders at the top."""
        with self._doing("list", ""):
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._root, detail=True)
            except FileNotFoundError:
                return []
            return sorted(
                name for info in found if info["type"] == "directory" and (name := self._name(info["name"].rstrip("/")))
            )

    def check_writable(self, probe: str) -> None:
        """Write and remove the object `probe`.

        Raises:
          UserError: that fails.
        """
        try:
            self.write(probe, b"")
            self.remove(probe)
        except StoreError as error:
            raise errors.UserError(
                f"The run directory must be writable; {self.address} is not: {error}. Check the address and the "
                "credentials, or choose another."
            ) from error

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _name(self, path: str) -> str:
        return path.removeprefix(self._root).lstrip("/")

    def _ready(self, name: str) -> str:
        """Return the path of an object that is about to be written; its folder exists then."""
        path = self._path(name)
        if not self._has_objects:
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        return path

    @contextlib.contextmanager
    def _doing(self, what: str, name: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # any of the storage's package; see above
            said = " ".join(str(error).split()) or type(error).__name__
            raise StoreError(f"could not {what} {name or self._root}: {said}") from error


def open_store(address: Address) -> RunStore:
    """Return the store of an address.

    Raises:
      UserError: the address is none, no package opens its protocol, or the package refuses it.
    """
    address.check()
    fsspec = extras.require("fsspec", extra="remote")
    package = PACKAGES.get(address.protocol, address.protocol)
    try:
        # Listings are not kept, since other machines write there; nor is the instance, since its settings may change.
        files, root = fsspec.url_to_fs(str(address), use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise errors.UserError(
            f"A run directory at {address.protocol}:// needs the package {package}, which fsspec could not import: "
            f"{error}. Install it: pip install {package}."
        ) from error
    except ValueError as error:
        raise errors.UserError(
            f"A remote run directory has a protocol that fsspec knows (s3, gs, abfs ...); got {address}: {error}."
        ) from error
    return RunStore(address, files, root)
