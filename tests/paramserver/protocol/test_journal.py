"""What is stored must be read by later versions: the bytes of every record are fixed."""

import hashlib

import numpy as np
import pytest

from jaxdist.paramserver.protocol import journal, messages
from jaxdist.paramserver.wire import encoding

LEASE = messages.Lease(4, 1, 2, 6, 9)
CONTRIBUTOR = messages.Contributor(1, 2, 3, LEASE)
MEMBERSHIP = messages.Membership(
    7, (messages.Member(0, 1, 5),), (messages.ShardPlace("server/0/a", 3, "server/0/b", 4, True),), 2, "0000000002-1-1"
)
TRAINED = messages.Trained(4, (6, 7))
MEMBERSHIP_RECORD = journal.MembershipRecord(MEMBERSHIP, 9, (messages.Register("worker/0", 8),), TRAINED)
SAVED = journal.SavedCutRecord("0000000004-1-2", TRAINED)
ARRAYS = (np.arange(3, dtype=np.float32),)
STORED = {
    "MembershipRecord": (MEMBERSHIP_RECORD, "e915a03149aed351"),
    "CommitRecord": (journal.CommitRecord(5, False, (CONTRIBUTOR,)), "b8c5de4f6714a6e2"),
    "EmptyRecord": (journal.EmptyRecord(5), "f8a3095c5ac4b7a5"),
    "NormRecord": (journal.NormRecord(2.5), "a18f284c86644433"),
    "CompleteRecord": (journal.CompleteRecord(CONTRIBUTOR), "6bbd6f08580f2121"),
    "SavedCutRecord": (SAVED, "3685880e9d0fb1ef"),
    "StateRecord": (journal.StateRecord(MEMBERSHIP_RECORD, SAVED, TRAINED, 4, 2), "1303d88ad98fba24"),
    "VerdictRecord": (journal.VerdictRecord(4, "patience"), "bd3b0ec9d5ecd092"),
    "StopRecord": (journal.StopRecord(9, "max_steps"), "b356814a30e1335c"),
    "SavedCut": (journal.SavedCut("c", 4, 9, TRAINED, (journal.SavedShard(0, "c/shard-0", 77),)), "25d682ad65b6ad64"),
    "ShardState": (
        messages.ShardState(
            4,
            5,
            7,
            ARRAYS,
            ARRAYS,
            (messages.Seen(0, 1, 2, 3),),
            ((0, 4),),
            4,
            (messages.Member(0, 1, 0),),
            (),
            (),
            None,
        ),
        "71fc8592e1edd24e",
    ),
}


@pytest.mark.parametrize("kind", STORED)
def test_the_bytes_of_what_is_stored_do_not_change(kind):
    """A change here makes run directories unreadable: add a new class at the end of encoding.KINDS instead."""
    value, expected = STORED[kind]
    data = encoding.to_bytes(value)
    assert hashlib.sha256(data).hexdigest()[:16] == expected
    assert type(encoding.decode(data)).__name__ == kind
