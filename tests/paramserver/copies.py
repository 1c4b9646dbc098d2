"""A server and its backup outside a run, for tests of what each says and does when it is told something."""

import dataclasses

import numpy as np
import stages
import workload

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.protocol.server import Server
from jaxdist.paramserver.protocol.shard import Shard

PARAMS = (np.arange(4, dtype=np.float32),)
PRIMARY, BACKUP = "server/0/a", "server/0/b"
SETTINGS = stages.settings(mode="async", durability="replicated", snapshot_every=2, check_copies_every=2)


def membership(term, *, restore_term=1, restore="", backup=BACKUP, synced=True):
    place = messages.ShardPlace(PRIMARY, 1, backup, 1 if backup else 0, synced and bool(backup))
    return messages.Membership(term, (messages.Member(0, 1, 0),), (place,), restore_term, restore)


def server(name, **changes):
    chosen = dataclasses.replace(SETTINGS, **changes)

    def make_shard():
        return Shard(shard=0, settings=chosen, updater=workload.Momentum(), params=PARAMS)

    return Server(name=name, boot=1, settings=chosen, make_shard=make_shard)


def push(sequence):
    lease = messages.Lease(sequence, 0, 0, 0, 2)
    return messages.Push(0, 0, 1, sequence, 0, 0, lease, 2.0, 2.0, True, 0.0, (np.ones(4, np.float32),))


FIRST = messages.Lease(0, 0, 0, 0, 2)
FIRST_PUSH = dataclasses.replace(push(1), lease=FIRST)
FIRST_COMMIT = messages.Commit(1, 0, 1, False, (messages.Contributor(0, 1, 1, FIRST),))


def tell(one, *received):
    sent = []
    for message in received:
        sent += one.handle(message, 0.0)[0]
    return sent


def pair():
    """Return a primary and its backup in term 1, with nothing in flight."""
    first, second = server(PRIMARY), server(BACKUP)
    tell(second, membership(1))
    deliver(first, second, tell(first, membership(1)))
    return first, second


def deliver(first, second, sent):
    """Pass messages between two copies until neither sends more; return what went to others."""
    outside, sent = [], list(sent)
    while sent:
        to, message = sent.pop(0)
        one = {PRIMARY: first, BACKUP: second}.get(to)
        if one is None:
            outside.append((to, message))
        else:
            sent += tell(one, message)
    return outside


def kinds(sent):
    return [type(message).__name__ for _, message in sent]


def synchronous():
    one = server(PRIMARY, mode="sync", durability="snapshot", workers=1)
    tell(one, membership(1, backup=""))
    return one
