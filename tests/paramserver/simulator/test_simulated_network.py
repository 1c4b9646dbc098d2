"""A simulated connection takes time for bytes, has limits, fails and is opened again."""

import numpy as np
import pytest

from jaxdist.paramserver.protocol import messages
from jaxdist.paramserver.simulator.fault_rates import CALM, Faults, Hardware
from jaxdist.paramserver.simulator.seeded_time import SeededTime
from jaxdist.paramserver.simulator.simulated_network import Network
from jaxdist.paramserver.wire import incoming


class Receiver:
    """A process that handles what it receives when the test says so, or at once."""

    def __init__(self, time, at_once=True):
        self.time, self.at_once, self.up, self.reading, self.got, self.open = time, at_once, True, True, [], []

    def is_up(self):
        return self.up

    def is_reading(self):
        return self.up and self.reading

    def receive(self, message, handled):
        self.got.append((round(self.time.now, 3), message))
        if self.at_once:
            handled()
        else:
            self.open.append(handled)


def make(faults=CALM, seed=0, at_once=True, **hardware):
    time = SeededTime(seed)
    ends = {"a": Receiver(time), "b": Receiver(time, at_once)}
    notes = []
    chosen = Hardware(**{"latency": (0.01, 0.01), "small_bytes": 1000, **hardware})
    return Network(time, faults, chosen, ends, lambda name, what: notes.append(what)), time, ends["b"], notes


def play(time, until=1e9):
    while time.now < until and time.step():
        pass


def big(number):
    lease = messages.Lease(0, 0, 0, 0, 4)
    return messages.Push(0, 1, 2, number, 4, 5, lease, 4.0, 4.0, True, 1.0, (np.zeros(2_500, np.float32),))


def kinds(end):
    return [type(message).__name__ for _, message in end.got]


def test_bytes_take_time_and_a_small_message_does_not_wait_for_a_large_one():
    network, time, end, _ = make(bandwidth=10_000.0)
    network.send("a", "b", big(1))
    network.send("a", "b", messages.StopAck("x"))
    play(time)
    assert kinds(end) == ["StopAck", "Push"]
    assert [at for at, _ in end.got] == pytest.approx([0.02, 1.03], abs=0.03)


def test_a_large_message_that_travels_is_not_sent_again():
    network, time, end, notes = make(bandwidth=10_000.0)
    for _ in range(3):
        network.send("a", "b", big(1))
    time.at(0.5, lambda: network.send("a", "b", big(1)))
    play(time)
    assert kinds(end) == ["Push"]
    assert [type(each).__name__ for each in notes] == ["Sent", "Arrived"]


def test_a_large_message_that_a_proxy_loses_is_counted_after_those_before_it():
    """A sender that is told a number takes it for the first ones, and would send one of those again."""
    network, time, end, notes = make(at_once=False)
    for sequence, drop in ((1, 0.0), (2, 1.0), (1, 0.0)):
        network.faults = Faults(until=1e9, drop=drop)
        network.send("a", "b", big(sequence))
        play(time)
    assert [type(each).__name__ for each in notes] == ["Sent", "Sent"]
    end.open.pop()()
    assert [type(each).__name__ for each in notes] == ["Sent", "Sent", "Arrived", "Arrived"]


def test_a_process_that_is_occupied_is_sent_no_more_than_it_can_hold():
    network, time, end, _ = make(at_once=False)
    for number in range(50):
        network.send("a", "b", messages.StopAck(str(number)))
    play(time)
    assert len(end.got) == incoming.MOST_WAITING
    while end.open:
        end.open.pop(0)()
        play(time)
    assert [message.name for _, message in end.got] == [str(number) for number in range(50)]


def test_memory_for_large_messages_is_limited():
    network, time, end, _ = make(at_once=False, budget=15_000)
    for number in range(3):
        network.send("a", "b", big(number))
    play(time)
    assert len(end.got) == 1
    end.open.pop()()
    play(time)
    assert len(end.got) == 2


def test_what_a_failed_connection_carried_is_lost_and_what_waits_is_sent():
    network, time, end, _ = make(bandwidth=10_000.0)
    network.send("a", "b", big(1))
    network.send("a", "b", big(2))
    time.at(0.5, network.break_one)
    play(time)
    assert [message.sequence for _, message in end.got] == [2]


def test_a_process_that_is_down_costs_the_messages_for_it():
    network, time, end, _ = make()
    end.up = False
    network.send("a", "b", messages.StopAck("lost"))
    play(time)
    end.up = True
    network.send("a", "b", messages.StopAck("comes"))
    play(time)
    assert [message.name for _, message in end.got] == ["comes"]


@pytest.mark.parametrize("breaks", [False, True])
def test_an_isolated_process_is_reached_afterwards(breaks):
    network, time, end, _ = make()
    network.send("a", "b", messages.StopAck("first"))
    play(time)
    network.isolate("b", 1.0, breaks=breaks)
    network.send("a", "b", messages.StopAck("second"))
    play(time)
    assert len(end.got) == (1 if breaks else 2)
    assert breaks or end.got[1][0] >= 1.0


def test_a_stopped_process_reads_when_it_wakes():
    network, time, end, _ = make()
    network.send("a", "b", messages.StopAck("first"))
    play(time)
    end.reading = False
    network.send("a", "b", messages.StopAck("second"))
    play(time)
    assert len(end.got) == 1
    end.reading = True
    network.resume("b")
    assert len(end.got) == 2


def test_proxies_lose_repeat_and_delay():
    network, time, end, _ = make(Faults(until=1e9, drop=0.3, repeat=0.3, slow=0.3, late=0.1))
    for number in range(200):
        network.send("a", "b", messages.StopAck(str(number)))
    play(time)
    names = [int(message.name) for _, message in end.got]
    assert 100 < len(set(names)) < 200
    assert len(names) > len(set(names))
    assert names != sorted(names)
