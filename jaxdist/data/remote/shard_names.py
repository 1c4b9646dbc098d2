"""The shards that a user names: paths, folders, addresses, and ranges such as `train-{000..127}.tar`."""

import os
import re
from collections.abc import Sequence

from jaxdist.data.remote import addresses
from jaxdist.data.sources.listing import check_distinct, find_local_files

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def find_shards(names: str | os.PathLike | Sequence[str | os.PathLike], *patterns: str) -> list[str]:
    """Return the shards' paths and addresses; a folder, here or elsewhere, means its files of one of `patterns`.

    Raises:
      ValueError: there are none, or one is named twice.
    """
    listed = [names] if isinstance(names, str | os.PathLike) else list(names)
    found: list[str] = []
    named = [each for given in listed for each in expand_ranges(addresses.without_file_protocol(given))]
    check_distinct(named)
    for name in named:
        if not addresses.is_address(name):
            found += find_local_files(name, *patterns, named=named)
        elif name.endswith("/") or "*" in name:
            found += addresses.list_folder(name, *patterns)
        else:
            found.append(name)
    if not found:
        raise ValueError("Shards are paths, addresses or a folder; got an empty list.")
    return found


def expand_ranges(name: str) -> list[str]:
    """Return the names that a range in braces stands for, with as many digits as it has: `{08..10}` is 08, 09, 10."""
    match = _RANGE.search(name)
    if match is None:
        return [name]
    first, last = match.groups()
    numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [each for number in numbers for each in expand_ranges(name[: match.start()] + number + name[match.end() :])]
