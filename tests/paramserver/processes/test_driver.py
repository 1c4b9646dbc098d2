"""The driver carries out the effects of a state machine, in an order in which replies are valid."""

import pytest

from jaxdist.paramserver.processes import driver
from jaxdist.paramserver.protocol import effects, journal, messages

RECORD = journal.SavedCutRecord("cut", messages.Trained(3, (5,)))
BEAT = messages.Heartbeat("worker/0", 1, 2, 3, True)


class Machine:
    """Gives the answers of a list, one for each message, and keeps what it was told and when."""

    def __init__(self, *answers):
        self.answers, self.told = list(answers), []

    def handle(self, message, now):
        self.told.append((type(message).__name__, now))
        return self.answers.pop(0) if self.answers else ([], [])


class World:
    """Notes what it is asked for, in order; its clock is what the test sets."""

    def __init__(self, clock=0.0):
        self.clock, self.inbox, self.heartbeats, self.asked = clock, [], [], []

    def now(self):
        return self.clock

    def take_heartbeat(self):
        return (self.heartbeats.pop(0), lambda: None) if self.heartbeats else None

    def take(self, seconds):
        self.seconds = seconds
        return (self.inbox.pop(0), lambda: self.asked.append(("handled",))) if self.inbox else None

    def __getattr__(self, verb):
        return lambda *what: self.asked.append((verb, *what))


def test_effects_are_done_in_order_and_before_replies_leave():
    compute = effects.Compute(1, 2, messages.Lease(0, 0, 0, 0, 4), ())
    todo = [
        *(effects.Append(RECORD), effects.Compact(RECORD), effects.Write("cut", RECORD), effects.Load("cut")),
        *(effects.Prepare(compute.lease), compute, effects.Exit(7, "max_steps")),
    ]
    world, observed = World(), []
    made = driver.Driver(Machine(([effects.Send("worker/0", BEAT)], todo)), world, observe=observed.append)
    assert made.turn()
    assert world.asked == [
        *(("append", RECORD), ("replace", RECORD), ("write", "cut", RECORD), ("load", "cut")),
        *(("prepare", compute.lease), ("compute", compute), ("send", "worker/0", BEAT)),
    ]
    assert observed == todo
    assert made.exit == todo[-1]


def test_a_tick_that_is_due_comes_first_and_then_messages_in_order():
    machine, world = Machine(), World(5.0)
    made = driver.Driver(machine, world, tick_seconds=0.5)
    world.inbox = [messages.NoOp(), messages.StopRun(1, "x"), messages.NoOp()]
    turns = []
    for clock in (5.0, 5.1, 5.2, 5.5, 5.6, 5.7):
        world.clock = clock
        turns.append(made.turn())
    assert [kind for kind, _ in machine.told] == ["Tick", "NoOp", "StopRun", "Tick", "NoOp"]
    assert [now for _, now in machine.told] == pytest.approx([0.0, 0.1, 0.2, 0.5, 0.6])
    assert turns == [True] * 5 + [False]
    assert world.seconds == pytest.approx(0.3)


def test_heartbeats_that_wait_come_before_a_tick():
    """At the tick a scheduler that stood still would take their senders for silent."""
    machine, world = Machine(), World()
    made = driver.Driver(machine, world)
    world.inbox, world.heartbeats = [messages.NoOp()], [BEAT, BEAT]
    for _ in range(4):
        made.turn()
    assert [kind for kind, _ in machine.told] == ["Heartbeat", "Heartbeat", "Tick", "NoOp"]


def test_a_clock_that_is_set_back_does_not_stop_the_ticks():
    """A process that waits until its clock is there again sends no heartbeat for as long."""
    machine, world = Machine(), World(1000.0)
    made = driver.Driver(machine, world, tick_seconds=0.5)
    for clock in (1000.0, 1000.25, 3.0, 3.25, 3.5, 4.0):
        world.clock = clock
        made.turn()
    assert [now for _, now in machine.told] == pytest.approx([0.0, 0.5, 1.25])


def test_what_a_machine_continues_with_comes_after_its_replies_and_before_all_else():
    machine = Machine(([effects.Send("worker/0", BEAT)], [effects.Continue(messages.GetReady())]))
    world = World(5.0)
    made = driver.Driver(machine, world, tick_seconds=0.5)
    world.inbox = [messages.NoOp()]
    made.turn()
    assert world.asked == [("send", "worker/0", BEAT)]
    world.clock = 6.0
    for _ in range(3):
        made.turn()
    assert [name for name, _ in machine.told] == ["Tick", "GetReady", "Tick", "NoOp"]


def test_a_message_counts_as_handled_once_its_replies_are_sent():
    """Until then it takes room where messages arrive, so a process that is busy is sent no more than it can hold."""
    world = World()
    made = driver.Driver(Machine(([], []), ([effects.Send("worker/0", BEAT)], [])), world)
    world.inbox = [messages.NoOp()]
    assert made.turn()
    assert made.turn()
    assert world.asked == [("send", "worker/0", BEAT), ("handled",)]


def test_a_heartbeat_is_repeated_while_one_message_takes_long_and_not_forever():
    world = World(10.0)
    made = driver.Driver(Machine(([effects.Send("scheduler", BEAT)], [])), world)
    made.pulse()
    made.turn()
    for clock in (10.1, 10.6, 100.0, 131.0):
        world.clock = clock
        made.pulse()
    assert world.asked == [("send", "scheduler", BEAT)] * 3


@pytest.mark.parametrize(("times", "sent"), [(0, 0), (1, 1), (2, 2)])
def test_a_point_decides_how_often_a_message_is_sent(times, sent):
    seen = []

    def point(verb, what):
        seen.append((verb, type(what).__name__))
        return times if verb == "send" else 1

    end, world = effects.Exit(7, "max_steps"), World()
    driver.Driver(Machine(([effects.Send("worker/0", messages.NoOp())], [end])), world, point=point).turn()
    assert len(world.asked) == sent
    assert seen == [("hear", "Tick"), ("do", "Exit"), ("did", "Exit"), ("send", "NoOp")]
