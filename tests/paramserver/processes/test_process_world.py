"""A process does what its state machine asks: log, files, gradients in a thread of their own."""

import errno
import os
import threading
import time
import zlib
from concurrent import futures

import numpy as np
import pytest

from jaxdist.paramserver.processes import driver as drivers
from jaxdist.paramserver.processes import process_world
from jaxdist.paramserver.protocol import effects, journal, messages
from jaxdist.paramserver.wire import encoding
from jaxdist.rundir import full_disk

RECORD = journal.SavedCutRecord("cut", messages.Trained(3, (5,)))
END = effects.Exit(7, "max_steps")


class Machine:
    """Answers each message as `answers[type]` says, and keeps what it was told."""

    def __init__(self, **answers):
        self.answers, self.told = answers, []

    def handle(self, message, now):
        self.told.append(message)
        return self.answers.get(type(message).__name__, lambda message: ([], []))(message)


class Wire:
    """Keeps what was sent; `look` runs at each sending."""

    def __init__(self, look=lambda message: None):
        self.sent, self.look = [], look

    def send(self, to, message):
        self.look(message)
        self.sent.append((to, message))


def run(machine, directory, wire=None, **given):
    """Run `machine` in a world with what is given."""
    world = process_world.ProcessWorld(directory, **given)
    return world.run(drivers.Driver(machine, world), wire or Wire())


def once(*effects_, replies=()):
    """Return an answer for the first time a message comes."""
    left = [(list(replies), list(effects_))]
    return lambda message: left.pop() if left else ([], [])


@pytest.fixture
def open_log():
    """Yield a function that opens a log, closed after the test: a process keeps its log open until it ends."""
    opened = []

    def open_(path):
        opened.append(process_world.Log(path, outlives_machine=False))
        return opened[-1]

    yield open_
    for log in opened:
        log._file.close()


def test_a_log_keeps_whole_records_and_drops_a_torn_one(tmp_path, open_log):
    path = tmp_path / "folder" / "log"
    log = open_log(path)
    log.append(RECORD)
    log.append(journal.StopRecord(1, "x"))
    path.write_bytes(path.read_bytes()[:-1])
    log = open_log(path)
    assert log.records == [RECORD]
    log.append(journal.StopRecord(2, "y"))
    assert open_log(path).records == [RECORD, journal.StopRecord(2, "y")]
    log.replace(journal.NormRecord(4.0))
    log.append(RECORD)
    assert open_log(path).records == [journal.NormRecord(4.0), RECORD]


def test_a_log_on_a_full_disk_waits_and_is_whole_then(tmp_path, monkeypatch, open_log):
    """A step that is committed but not in the log would be made twice after a restart."""
    path, write, pauses = tmp_path / "log", os.write, []
    log = open_log(path)

    def filling(descriptor, data):
        if len(data) > 3 and len(pauses) < 2:
            return write(descriptor, bytes(data[:3]))
        if len(pauses) < 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", filling)
        patched.setattr(full_disk.time, "sleep", lambda seconds: pauses.append(path.read_bytes()))
        log.append(RECORD)
        assert pauses == [b"", b""]
    assert open_log(path).records == [RECORD]


def test_effects_are_done_before_replies_leave(tmp_path, open_log):
    log = open_log(tmp_path / "log")
    reply = effects.Send("worker/0", messages.NoOp())
    machine = Machine(Tick=once(effects.Append(RECORD), END, replies=[reply]))
    wire = Wire(lambda message: durable.append(open_log(tmp_path / "log").records))
    durable = []
    assert run(machine, tmp_path, wire, log=log) == END
    assert durable == [[RECORD]]
    assert wire.sent == [("worker/0", messages.NoOp())]


def test_a_file_is_written_and_read_again_and_a_damaged_one_is_none(tmp_path):
    def load(written):
        (tmp_path / "damaged").write_bytes(b"x" + (tmp_path / "cut/shard-0").read_bytes()[1:])
        return [], [effects.Load(name) for name in ("cut/shard-0", "damaged", "missing")]

    def end(loaded):
        return [], [END] if loaded.name == "missing" else []

    machine = Machine(Tick=once(effects.Write("cut/shard-0", RECORD)), Written=load, Loaded=end)
    run(machine, tmp_path)
    told = [message for message in machine.told if not isinstance(message, messages.Tick)]
    crc = zlib.crc32(encoding.to_bytes(RECORD))
    assert told == [
        messages.Written("cut/shard-0", crc, ""),
        messages.Loaded("cut/shard-0", RECORD),
        messages.Loaded("damaged", None),
        messages.Loaded("missing", None),
    ]


def test_a_file_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "taken").write_text("a file where the folder should be")
    machine = Machine(Tick=once(effects.Write("taken/shard-0", RECORD)), Written=lambda message: ([], [END]))
    run(machine, tmp_path)
    assert [m.error.startswith("Not a directory") or "exists" in m.error for m in machine.told[1:]] == [True]


def test_a_gradient_is_computed_beside_the_machine(tmp_path):
    asked = effects.Compute(1, 2, messages.Lease(0, 0, 0, 0, 4), ((np.ones(2),),))
    computed = messages.Computed(1, 2, 4.0, 4.0, True, 1.0, ((np.ones(2),),), ())
    threads = []

    def gradient(compute):
        threads.append((threading.current_thread() is threading.main_thread(), compute is asked))
        return computed

    machine = Machine(Tick=once(asked), Computed=lambda message: ([], [END]))
    run(machine, tmp_path, gradient=gradient)
    assert threads == [(False, True)]
    assert machine.told[-1] is computed


def test_examples_are_read_before_the_gradient_in_the_same_thread(tmp_path):
    lease, made = messages.Lease(0, 0, 0, 0, 4), []
    asked = effects.Compute(1, 2, lease, ())
    computed = messages.Computed(1, 2, 4.0, 4.0, True, 1.0, (), ())

    def gradient(compute):
        made.append((compute.lease, threading.get_ident()))
        return computed

    machine = Machine(Tick=once(effects.Prepare(lease), asked), Computed=lambda message: ([], [END]))
    run(machine, tmp_path, gradient=gradient, prepare=lambda lease: made.append((lease, threading.get_ident())))
    assert len(made) == 2
    assert made[0] == made[1] != (lease, threading.get_ident())


@pytest.mark.parametrize("asked", [effects.Compute(1, 2, messages.Lease(0, 0, 0, 0, 4), ()), effects.Prepare(None)])
def test_a_gradient_that_fails_ends_the_process(tmp_path, monkeypatch, asked):
    statuses = []

    def leave(status):
        statuses.append(status)
        raise SystemExit

    monkeypatch.setattr(process_world.os, "_exit", leave)
    left = [asked]

    def tick(message):
        return [], [left.pop()] if left else [END] * len(statuses)

    failing = {"gradient": lambda compute: 1 / 0, "prepare": lambda lease: 1 / 0}
    run(Machine(Tick=tick), tmp_path, **failing)
    assert statuses == [1]


def test_a_heartbeat_is_repeated_while_one_message_takes_long(tmp_path):
    beat = effects.Send("scheduler", messages.Heartbeat("worker/0", 1, 2, 3, True))

    def work(message):
        deadline = time.monotonic() + 200
        while len(wire.sent) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        return [], [END]

    machine = Machine(Tick=once(replies=[beat]), NoOp=work)
    world, wire = process_world.ProcessWorld(tmp_path), Wire()
    world.receive(messages.NoOp())
    world.run(drivers.Driver(machine, world, pulse_seconds=0.01), wire)
    assert set(wire.sent) == {tuple(beat)}
    assert len(wire.sent) >= 3


def test_a_heartbeat_overtakes_the_messages_that_wait(tmp_path):
    beat = messages.Heartbeat("worker/0", 1, 2, 3, True)
    machine = Machine(NoOp=once(), StopRun=once(END))
    world = process_world.ProcessWorld(tmp_path)
    for message in (messages.NoOp(), beat, messages.NoOp(), messages.StopRun(3, "")):
        world.receive(message)
    world.run(drivers.Driver(machine, world), Wire())
    assert [type(each).__name__ for each in machine.told if each != messages.Tick()] == [
        "Heartbeat",
        "NoOp",
        "NoOp",
        "StopRun",
    ]


@pytest.fixture
def running(tmp_path):
    """Yield a function that runs a machine in a thread of its own, and returns its world once it ticks, and its end."""
    ends = []

    def start(machine):
        world, ticks, end = process_world.ProcessWorld(tmp_path), threading.Event(), futures.Future()
        machine.answers["Tick"] = lambda message: ticks.set() or ([], [])
        driver = drivers.Driver(machine, world)

        def run():
            try:
                end.set_result(world.run(driver, Wire()))
            except BaseException as error:
                end.set_exception(error)

        thread = threading.Thread(target=run)
        thread.start()
        ends.append((thread, world))
        assert ticks.wait(60)
        return world, end

    yield start
    for thread, world in ends:
        world.receive(messages.StopRun(0, ""))
        thread.join(60)
        assert not thread.is_alive()


def test_a_small_message_and_what_follows_are_handled_in_the_thread_that_brings_it(running):
    threads = []
    machine = Machine(
        NoOp=lambda message: ([], [effects.Continue(messages.GetReady())]),
        GetReady=lambda message: threads.append(threading.get_ident()) or ([], []),
        StopRun=once(END),
    )
    world, end = running(machine)
    # The other thread may just have begun a turn; then it handles the message.
    assert until(lambda: world.receive_small(messages.NoOp()) or threading.get_ident() in threads)
    world.receive_small(messages.StopRun(3, ""))
    assert end.result(60) is END


def test_messages_of_many_threads_are_handled_one_at_a_time_and_all_of_them(running):
    inside, most, count = [], [], []

    def work(message):
        inside.append(1)
        most.append(len(inside))
        count.append(1)
        inside.pop()
        return [], []

    machine = Machine(NoOp=work, StopRun=once(END))
    world, end = running(machine)
    bring = [world.receive, world.receive_small] * 2
    threads = [threading.Thread(target=lambda b=b: [b(messages.NoOp()) for _ in range(300)]) for b in bring]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert until(lambda: len(count) == 1200)
    assert max(most) == 1
    world.receive_small(messages.StopRun(3, ""))
    assert end.result(60) is END


def test_a_small_message_that_comes_while_the_main_thread_begins_to_wait_is_handled_at_once(tmp_path):
    """Its thread was refused the turn, and the main thread has looked at the inbox before."""

    class Turn:
        lock = threading.Lock()
        acquire = lock.acquire

        def release(self):
            bring = threading.Thread(target=world.receive_small, args=(messages.NoOp(),))
            bring.start()
            bring.join(60)
            self.lock.release()

    world = process_world.ProcessWorld(tmp_path)
    world._turn, world._driver = Turn(), drivers.Driver(Machine(), world)
    world._turn.acquire()
    assert world.take(1e6)[0] == messages.NoOp()


def test_a_failure_in_the_thread_that_brings_a_message_ends_the_process(running):
    def fail(message):
        raise ArithmeticError("planted")

    world, end = running(Machine(NoOp=fail, StopRun=once(END)))
    world.receive_small(messages.NoOp())
    with pytest.raises(ArithmeticError, match="planted"):
        end.result(60)


def until(condition, seconds=60):
    """Wait until a condition holds; return whether it does."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()
