"""Addresses of run directories that are not on a file system: `s3://bucket/run`, or any other that fsspec opens."""

import dataclasses
import hashlib
import pathlib
import re
from typing import TypeAlias

from jaxdist.errors import UserError

_PARTS = re.compile(r"([a-z][a-z0-9+.-]*)://(.+)", re.IGNORECASE)
_PASSWORD = re.compile(r"[^/]*:[^/]*@")
_HASH_DIGITS = 12


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a run directory is, as the user wrote it, without a slash at its end."""

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def protocol(self) -> str:
        """The part before `://`, in lower case."""
        return self.text.partition("://")[0].lower()

    @property
    def name(self) -> str:
        """The last part of the path, which names the run."""
        return self.text.rstrip("/").rpartition("/")[2]

    @property
    def folder_name(self) -> str:
        """A name for files of this machine about the address: no other address has it."""
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:_HASH_DIGITS]
        return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', self.name)}-{digest}"

    def check(self) -> None:
        """Raise UserError if this is no address, or holds a password, which the run record would show."""
        found = _PARTS.fullmatch(self.text)
        if found is None:
            raise UserError(
                "A remote run directory is PROTOCOL://PLACE, for example s3://bucket/runs/first; got "
                f"{self.text!r}. Write it so, or name a local directory."
            )
        if _PASSWORD.match(found[2]):
            raise UserError(
                "An address of a run directory is recorded in its files, so it must not contain a password. Give the "
                "password by the means of the storage's package, in its environment variables for example."
            )


RunPlace: TypeAlias = pathlib.Path | Address


def place_of_run(text: str) -> RunPlace:
    """Return where a run directory is: an address if it has a protocol, a local path otherwise."""
    return Address(text.rstrip("/")) if "://" in text else pathlib.Path(text)
