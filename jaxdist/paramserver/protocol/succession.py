"""Views as values: who takes over when a copy of a shard is gone, and whom a new view lets push."""

from dataclasses import replace

from jaxdist.paramserver.protocol.messages import Member, ShardView, View
from jaxdist.paramserver.protocol.settings import Settings, server_name

NO_BACKUP = ("", 0)


def server_nodes(settings: Settings) -> list[str]:
    """Return the names of all server processes of a run."""
    copies = 2 if settings.replicated else 1
    return [server_name(shard, copy) for shard in range(settings.servers) for copy in range(copies)]


def first_shards(settings: Settings, boots: dict[str, int]) -> tuple[ShardView, ...]:
    """Return the places of a run that starts: both copies of a shard start from the same state, so they are synced."""
    shards = []
    for shard in range(settings.servers):
        first, second = server_name(shard, 0), server_name(shard, 1)
        backup = (second, boots[second]) if settings.replicated else NO_BACKUP
        shards.append(ShardView(first, boots[first], *backup, settings.replicated))
    return tuple(shards)


def without_primary(place: ShardView) -> ShardView:
    """Return the place after its synced backup took over."""
    assert place.synced, f"{place.backup!r} does not hold what {place.primary!r} acknowledged"
    return ShardView(place.backup, place.backup_boot, *NO_BACKUP, False)


def without_backup(place: ShardView) -> ShardView:
    """Return the place with its primary alone."""
    return ShardView(place.primary, place.primary_boot, *NO_BACKUP, False)


def with_backup(place: ShardView, node: str, boot: int) -> ShardView:
    """Return the place with a new backup, which holds nothing yet."""
    return ShardView(place.primary, place.primary_boot, node, boot, False)


def put(shards: tuple[ShardView, ...], number: int, place: ShardView) -> tuple[ShardView, ...]:
    """Return `shards` with one place exchanged."""
    return (*shards[:number], place, *shards[number + 1 :])


def with_member(members: tuple[Member, ...], member: Member) -> tuple[Member, ...]:
    """Return `members` with this life of the worker in place of any other."""
    others = [other for other in members if other.worker != member.worker]
    return tuple(sorted([*others, member], key=lambda m: m.worker))


def next_view(view: View, **changes: object) -> View:
    """Return the view that follows `view`."""
    return replace(view, epoch=view.epoch + 1, **changes)  # type: ignore[arg-type]
