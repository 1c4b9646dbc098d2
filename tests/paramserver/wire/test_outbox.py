"""Which messages are queued, which are dropped, and which are not sent twice."""

import dataclasses

import pytest

from jaxdist.paramserver.wire import outbox


@dataclasses.dataclass(frozen=True)
class Parcel:
    number: int
    num_bytes: int = 10

    def is_same(self, other):
        return self.number == other.number


def box(large=True, **kwargs):
    return outbox.Outbox(large=large, **kwargs)


def test_a_large_message_is_not_queued_again_while_it_waits_or_travels():
    made = box()
    for number in (1, 1, 2):
        made.put(Parcel(number))
    assert made.take() == [Parcel(1)]
    made.put(Parcel(1))
    assert made.take() == [Parcel(2)]
    assert made.take() == []
    made.note_handled(1)
    for number in (1, 2):
        made.put(Parcel(number))
    assert made.take() == [Parcel(1)]


def test_what_a_failed_connection_carried_may_be_sent_again():
    made = box()
    made.put(Parcel(1))
    made.put(Parcel(2))
    made.take()
    made.note_handled(1)
    made.take()
    made.begin()
    assert made.is_empty()
    made.put(Parcel(2))
    assert made.take() == [Parcel(2)]
    assert not made.is_empty()
    made.note_handled(1)
    assert made.is_empty()


@pytest.mark.parametrize("most", [5, 25])
def test_a_full_queue_drops_but_one_message_always_fits(most):
    made = box(most_bytes=most)
    for number in range(4):
        made.put(Parcel(number))
    kept = [made.take() for _ in range(4)]
    assert [each for parcels in kept for each in parcels] == [Parcel(n) for n in range(max(most // 10, 1))]


def test_small_messages_leave_together_and_do_not_wait_for_the_peer():
    made = box(large=False)
    for number in range(3):
        made.put(Parcel(number, outbox.NAGLE_BYTES // 2))
    assert made.take() == [Parcel(n, outbox.NAGLE_BYTES // 2) for n in (0, 1)]
    made.put(Parcel(0))
    made.drop()
    assert made.is_empty()
    assert not made.has_waiting()
