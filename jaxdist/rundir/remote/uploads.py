"""What says that a checkpoint was uploaded whole: an object that lists its files, written after all of them.

`uploaded/40.json` names each file of `checkpoints/40` with its bytes and SHA-256. A checkpoint without it does not
exist for a reader: its upload has not ended, or was interrupted. It is removed before the first file of the checkpoint.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping

from jaxdist.checkpoint import step_names

FOLDER = "uploaded"
_SUFFIX = ".json"


class DamagedUploadError(ValueError):
    """Remote storage does not hold what was uploaded."""


@dataclasses.dataclass(frozen=True)
class UploadedCheckpoint:
    """A checkpoint that was uploaded whole.

    Attributes:
      name: of its directory, `40` for example.
      files: each file in it, by its path there, with its bytes and its SHA-256.
    """

    name: str
    files: dict[str, tuple[int, str]]

    @property
    def step(self) -> int:
        """The step that it holds."""
        return order(self.name)[0]

    @property
    def folder(self) -> str:
        """Its folder in the run directory."""
        return f"{step_names.FOLDER_NAME}/{self.name}"

    @classmethod
    def of(cls, directory: pathlib.Path) -> "UploadedCheckpoint":
        """Return the description of a checkpoint on this machine; every file is read."""
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
        files = {path.relative_to(directory).as_posix(): (path.stat().st_size, sha256(path)) for path in paths}
        return cls(directory.name, files)

    def to_bytes(self) -> bytes:
        """Return the content of its object."""
        body = {"name": self.name, "files": {name: list(entry) for name, entry in self.files.items()}}
        return json.dumps({"body": body, "sha256": _digest(body)}).encode()

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> "UploadedCheckpoint":
        """Return what `to_bytes` gave for the checkpoint `name`.

        Raises:
          DamagedUploadError: it gave something else.
        """
        try:
            found = json.loads(content)
            body = found["body"]
            if found["sha256"] != _digest(body) or body["name"] != name:
                raise DamagedUploadError(f"{object_name(name)} does not hold what was uploaded.")
            files = {file: (int(size), str(digest)) for file, (size, digest) in body["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DamagedUploadError):
                raise
            raise DamagedUploadError(f"{object_name(name)} cannot be read: {type(error).__name__}: {error}.") from error
        return cls(name, files)

    def check(self, directory: pathlib.Path) -> None:
        """Check that `directory` holds these files.

        Raises:
          DamagedUploadError: one is missing, or holds something else.
        """
        for name, (size, digest) in self.files.items():
            path = directory / name
            if not path.is_file():
                raise DamagedUploadError(f"{self.folder}/{name} is missing.")
            if path.stat().st_size != size or sha256(path) != digest:
                raise DamagedUploadError(f"{self.folder}/{name} does not hold what was uploaded (its SHA-256 differs).")


def object_name(name: str) -> str:
    """Return the name of the object that says that the checkpoint `name` is whole."""
    return f"{FOLDER}/{name}{_SUFFIX}"


def checkpoint_of(object_: str) -> str | None:
    """Return the checkpoint whose object this is, None for any other object."""
    folder, _, file = object_.partition("/")
    name = file.removesuffix(_SUFFIX)
    return name if folder == FOLDER and file.endswith(_SUFFIX) and step_names.parse(name) else None


def order(name: str) -> tuple[int, int]:
    """Return what sorts checkpoints by their names: the step, and how often it was saved before."""
    found = step_names.parse(name)
    assert found is not None, name
    return found


def superfluous(
    names: set[str], *, kept: set[str], keep_last: int, keep_every: int | None, best: int | None
) -> set[str]:
    """Return which remote checkpoints are kept no longer, by the rules of the run's own directory.

    Those that are `kept` on this machine are left to it, which decides about them itself. `best` is the best step.
    """
    steps = sorted({order(name)[0] for name in names | kept})
    newest, stays = max(steps, default=0), {*steps[-keep_last:], best}
    return {
        name
        for name in names - kept
        if (step := order(name)[0]) < newest and step not in stays and not (keep_every and step % keep_every == 0)
    }


def sha256(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(body: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
