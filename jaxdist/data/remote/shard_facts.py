"""What is known of shards without reading them: fingerprints of shards that may be elsewhere.

Shards on this machine are fingerprinted as all files are, by samples of their contents. Of shards elsewhere, a server
says the size and a version (an ETag, a checksum or a time), which is another one when the content is.
"""

import concurrent.futures
import hashlib
import logging
from collections.abc import Sequence

import numpy as np

from jaxdist.data.fingerprints import FileList, fingerprint_files
from jaxdist.data.remote import addresses
from jaxdist.data.sources.source import fingerprint_text

_logger = logging.getLogger(__name__)

_SAMPLED, _AT_ONCE, _CHUNK = 16, 8, 2**20


def local_files(shards: Sequence[str]) -> FileList | None:
    """Return the shards as files; None unless all of them are on this machine."""
    return None if any(map(addresses.is_address, shards)) else FileList(shards)


def fingerprint_shards(kind: str, shards: Sequence[str], *settings: object) -> str:
    """Return the hash of the shards' names, of samples of contents here, or of sizes and versions of 16 elsewhere."""
    names = [addresses.file_name(shard) for shard in shards]
    if (files := local_files(shards)) is not None:
        return fingerprint_files(kind, files, *names, *settings)
    chosen = np.unique(np.linspace(0, len(shards) - 1, min(len(shards), _SAMPLED), dtype=np.int64))
    facts = _facts_of([shards[number] for number in chosen.tolist()])
    silent = [shards[number] for number, fact in zip(chosen.tolist(), facts) if not fact.version]
    if silent:
        _logger.warning(
            "%s says of its files neither a version nor a time, so a change that keeps a file's size is not noticed; "
            "--strict compares their contents.",
            silent[0],
        )
    return fingerprint_text(kind, *names, *settings, *facts)


def whole_fingerprint(shards: Sequence[str]) -> str:
    """Return the hash of the sizes and versions of all shards; where a server says no version, of all contents."""
    facts = _facts_of(shards)
    contents = [_hash_content(shard) for shard, fact in zip(shards, facts) if not fact.version]
    return fingerprint_text("shards", *facts, *contents)


def _facts_of(shards: Sequence[str]) -> list[addresses.FileFacts]:
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(addresses.file_facts, shards))


def _hash_content(shard: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with addresses.opened(shard) as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()
