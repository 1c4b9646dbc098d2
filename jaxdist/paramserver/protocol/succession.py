"""How one membership follows from another: failover, a new backup, a worker that joins."""

from dataclasses import replace

from jaxdist.paramserver.protocol.messages import Member, Membership, ShardPlace
from jaxdist.paramserver.protocol.settings import Settings, server_name

NO_BACKUP = ("", 0)


def server_names(settings: Settings) -> list[str]:
    """Return the names of all server processes of a run."""
    copies = 2 if settings.replicated else 1
    return [server_name(shard, copy) for shard in range(settings.servers) for copy in range(copies)]


def first_shards(settings: Settings, boots: dict[str, int]) -> tuple[ShardPlace, ...]:
    """Return the places at the start of a run: both copies of a shard start from the same state, so they are synced."""
    shards = []
    for shard in range(settings.servers):
        first, second = server_name(shard, 0), server_name(shard, 1)
        backup = (second, boots[second]) if settings.replicated else NO_BACKUP
        shards.append(ShardPlace(first, boots[first], *backup, settings.replicated))
    return tuple(shards)


def without_primary(place: ShardPlace) -> ShardPlace:
    """Return the place after its synced backup took over."""
    assert place.synced, f"{place.backup!r} does not hold what {place.primary!r} acknowledged"
    return ShardPlace(place.backup, place.backup_boot, *NO_BACKUP, False)


def without_backup(place: ShardPlace) -> ShardPlace:
    """Return the place with its primary only."""
    return ShardPlace(place.primary, place.primary_boot, *NO_BACKUP, False)


def with_backup(place: ShardPlace, name: str, boot: int) -> ShardPlace:
    """Return the place with a new backup, which holds nothing yet."""
    return ShardPlace(place.primary, place.primary_boot, name, boot, False)


def put(shards: tuple[ShardPlace, ...], number: int, place: ShardPlace) -> tuple[ShardPlace, ...]:
    """Return `shards` with one place replaced."""
    return (*shards[:number], place, *shards[number + 1 :])


def with_members(members: tuple[Member, ...], new: dict[int, Member]) -> tuple[Member, ...]:
    """Return `members` with those in `new` (by worker) in place of other incarnations of the same workers."""
    by_worker = {member.worker: member for member in members} | new
    return tuple(by_worker[worker] for worker in sorted(by_worker))


def next_membership(membership: Membership, **changes: object) -> Membership:
    """Return the membership that follows `membership`."""
    return replace(membership, term=membership.term + 1, **changes)  # type: ignore[arg-type]
