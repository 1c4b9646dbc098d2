"""A simulated process takes its turns as the driver wants them: clock, pauses, occupation and death."""

import types

import pytest

from jaxdist.paramserver.processes.driver import Driver
from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.simulator.seeded_time import SeededTime
from jaxdist.paramserver.simulator.simulated_world import Clock, SimulatedProcess, SimulatedWorld

BEAT = messages.Heartbeat("worker/0", 1, 2, 3, True)


class Machine:
    """Keeps what it was told and when, and does what the test gives."""

    def __init__(self, time, **answers):
        self.time, self.told, self.answers = time, [], answers

    def handle(self, message, now):
        self.told.append((type(message).__name__, round(self.time.now, 3)))
        return self.answers.get(type(message).__name__, lambda: ([], []))()

    def of(self, kind):
        return [at for name, at in self.told if name == kind]


class Owner:
    """A simulation of one process, that keeps what it sends."""

    def __init__(self):
        self.timeline, self.sent, self.dead = SeededTime(0), [], []
        self.network = types.SimpleNamespace(
            send=lambda *what: self.sent.append((round(self.timeline.now, 3), *what)), resume=lambda name: None
        )

    def note(self, process, what):
        pass

    def died(self, process):
        self.dead.append(process)
        process.die()


def start(answers=None, **kwargs):
    owner = Owner()
    process = SimulatedProcess("server/0/a", owner)
    machine = Machine(owner.timeline, **(answers or {}))
    process.start(Driver(machine, SimulatedWorld(process, owner), pulse_seconds=0.1, **kwargs))
    return owner, process, machine


def play(owner, until):
    while owner.timeline.now < until and owner.timeline.step():
        pass


def test_ticks_come_regularly_and_messages_at_once():
    owner, process, machine = start()
    play(owner, 0.5)
    process.receive(messages.NoOp(), lambda: None)
    at = owner.timeline.now
    play(owner, 1.0)
    assert machine.of("NoOp") == [round(at, 3)]
    assert len(machine.of("Tick")) == pytest.approx(20, abs=2)


def test_a_stopped_process_does_nothing_and_ticks_first_when_it_wakes():
    owner, process, machine = start()
    play(owner, 0.3)
    process.pause(1.0)
    process.receive(messages.NoOp(), lambda: None)
    process.receive(BEAT, lambda: None)
    before = len(machine.told)
    play(owner, 1.2)
    assert len(machine.told) == before
    play(owner, 1.5)
    assert [name for name, _ in machine.told[before : before + 3]] == ["Heartbeat", "Tick", "NoOp"]


def test_an_occupied_process_repeats_its_heartbeat_and_answers_late():
    owner, process, _ = start({"NoOp": lambda: ([effects.Send("worker/0", messages.NoOp())], [])})
    process.driver._beat = ("scheduler", BEAT)
    play(owner, 0.3)
    process.receive(messages.NoOp(), lambda: None)
    process.driver._point = lambda verb, what: process.spend(1.0) or 1 if verb == "hear" else 1
    play(owner, 2.0)
    beats = [at for at, _, to, _ in owner.sent if to == "scheduler"]
    answers = [at for at, _, to, _ in owner.sent if to == "worker/0"]
    assert len(beats) > 5
    assert answers[0] > 1.2


@pytest.mark.parametrize(("jump", "rate"), [(1000.0, 1.0), (-1000.0, 1.0), (0.0, 0.0)])
def test_a_clock_jumps_or_stands_still_and_the_ticks_go_on(jump, rate):
    owner, process, machine = start()
    play(owner, 0.5)
    process.clock.set(owner.timeline.now, jump=jump, rate=rate)
    play(owner, 1.0)
    process.clock.set(owner.timeline.now)
    play(owner, 1.5)
    ticks = [at for at in machine.of("Tick") if at > 1.0]
    assert len(ticks) >= 8
    assert bool([at for at in machine.of("Tick") if 0.6 < at < 1.0]) == bool(rate)


def test_a_clock_shows_what_it_was_set_to():
    clock = Clock()
    clock.set(2.0, jump=10.0, rate=0.0)
    assert (clock.at(2.0), clock.at(5.0)) == (12.0, 12.0)
    clock.set(5.0)
    assert clock.at(6.0) == 13.0


def test_nothing_of_a_life_happens_after_its_end():
    owner, process, machine = start()
    play(owner, 0.3)
    later = process.while_alive(lambda: pytest.fail("done after the death"))
    process.receive(messages.NoOp(), lambda: None)
    process.die()
    count = len(machine.told)
    later()
    play(owner, 2.0)
    assert len(machine.told) == count
    assert not process.is_up()
