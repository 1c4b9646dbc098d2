"""How one membership follows from another."""

import pytest
import stages

from jaxdist.paramserver.protocol import succession
from jaxdist.paramserver.protocol.messages import Member, Membership, ShardPlace

PLACE = ShardPlace("server/0/a", 3, "server/0/b", 5, True)


def test_a_synced_backup_takes_over_alone():
    assert succession.without_primary(PLACE) == ShardPlace("server/0/b", 5, "", 0, False)
    with pytest.raises(AssertionError, match="does not hold"):
        succession.without_primary(succession.with_backup(PLACE, "server/0/b", 6))


def test_a_new_backup_is_not_synced():
    alone = succession.without_backup(PLACE)
    assert alone == ShardPlace("server/0/a", 3, "", 0, False)
    assert succession.with_backup(alone, "server/0/b", 6) == ShardPlace("server/0/a", 3, "server/0/b", 6, False)


def test_members_stay_in_the_order_of_their_numbers():
    members = (Member(0, 1, 0), Member(2, 2, 0))
    new = {2: Member(2, 4, 0), 1: Member(1, 3, 0)}
    assert succession.with_members(members, new) == (Member(0, 1, 0), Member(1, 3, 0), Member(2, 4, 0))


@pytest.mark.parametrize(("durability", "copies"), [("none", 1), ("replicated", 2)])
def test_every_shard_begins_with_its_copies(durability, copies):
    chosen = stages.settings(servers=2, durability=durability)
    names = succession.server_names(chosen)
    assert len(names) == 2 * copies
    places = succession.first_shards(chosen, {name: number for number, name in enumerate(names)})
    assert [place.primary for place in places] == ["server/0/a", "server/1/a"]
    assert all(place.synced == (copies == 2) for place in places)
    assert succession.put(places, 1, PLACE) == (places[0], PLACE)


def test_the_next_membership_has_the_next_term():
    assert succession.next_membership(Membership(4, (), (PLACE,), 1, "c"), members=(Member(0, 1, 0),)) == Membership(
        5, (Member(0, 1, 0),), (PLACE,), 1, "c"
    )
