"""Whole runs under the simulator, judged by an independent checker; and proofs that the checker sees what it should."""

import contextlib
import dataclasses
import math
import os
import pathlib
import subprocess
import sys
import types

import checker
import planted
import pytest
import workload
from planted import HARSH, settings

from jaxdist.paramserver.protocol import effects, journal, messages
from jaxdist.paramserver.protocol.scheduler.scheduler import Scheduler
from jaxdist.paramserver.protocol.server import Server
from jaxdist.paramserver.protocol.settings import Timers
from jaxdist.paramserver.simulator import CALM, FAST, Faults, Roles, Simulation, Stuck, simulated_world
from jaxdist.paramserver.simulator.simulation import Event

PLAIN = {"hardware": FAST, "num_params": 9, "own_bits": False, "halt_at": math.inf, "target_step": math.inf}


def play(seed, **instead):
    return workload.play(seed, **{**PLAIN, **instead})


def simulate(seed, **instead):
    return workload.simulate(seed, **{**PLAIN, **instead})


@pytest.mark.parametrize("block", range(10))
def test_schedules_keep_every_invariant(block):
    for seed in range(block * 15, (block + 1) * 15):
        workload.play(seed)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", range(50))
def test_ten_thousand_schedules_keep_every_invariant(block):
    """`schedules.py` plays them in several processes."""
    for seed in range(1_000_000 + block * 200, 1_000_000 + (block + 1) * 200):
        workload.play(seed)


def test_a_scheduler_that_was_cut_off_drops_no_last_copy():
    """Every heartbeat late by nearly the same: it once took the backup for dead a moment before the primary was."""
    workload.play(1_001_200)


@pytest.mark.parametrize(
    "seed",
    [
        900_049,  # a late copy of a read was answered after the verdict, and taken for a part of the cut
        900_178,  # a worker was silent for good between its leave and the answer, and was not ended
        901_133,  # a start that left before it could register sent heartbeats, and the one before it was dropped
        1_000_000,  # a server was silent for good before it had joined
        1_000_205,  # after a restart of the scheduler, a report on an earlier lease freed the worker of a later one
        1_000_423,  # the state of a shard took longer to send than its primary waited before it sent a newer one
        1_000_811,  # a slow connection carried little but entries that were sent again while they were on their way
        1_001_044,  # a simulated proxy counted what it took before the messages ahead of it
        706_045,  # a worker had the params before it was granted the lease, and waited for them forever
        713_346,  # a worker that had not heard that it had joined, and registered again and again, counted as silent
    ],
)
def test_schedules_that_once_broke_an_invariant_keep_it(seed):
    chosen = dataclasses.replace(workload.Drawn.of(seed).settings, stop_on_nonfinite=False)
    workload.play(seed, settings=chosen, own_bits=False, halt_at=math.inf, target_step=math.inf)


@pytest.mark.parametrize("seed", [5, 39])
def test_a_process_without_its_boot_numbers_joins_although_its_clock_is_behind(seed):
    forgetful = Faults(until=3.0, kills=2.0, lost_disk=0.5, jumps=3.0, drop=0.05, repeat=0.1)
    workload.play(seed, faults=forgetful)


@pytest.mark.parametrize(
    ("heard", "whole"),
    [
        ([7, 7, "read"], True),
        ([7, 8, "read"], False),
        ([8, 8, "read"], False),
        ([7, "read", 8], True),  # to a late copy of a request, after the verdict
        ([7, "read", 8, "read"], False),  # the rest was read later, of another step
        (["read"], False),
    ],
)
def test_a_cut_is_judged_by_the_parts_that_were_there_when_it_was_read(heard, whole):
    """Numbers are the histories of the parts that the observer received; the cut is of history 7."""
    offer = messages.Offer(1, 1, 1, "", messages.Trained(1, ()), ("server/0/a",))
    lease = messages.Lease(0, 0, 0, 0, 7)
    update = effects.Applied(0, 1, 1, 0, 7, (messages.Contributor(0, 1, 1, lease),), 0, 0, False)
    parts = {chain: messages.ReadAnswer(1, 0, 1, "params", 1, chain, ()) for chain in (7, 8)}
    done = [update, *(parts.get(each, effects.CutRead(offer, (7,), ((),), ())) for each in heard)]
    events = [Event(0.0, "observer", 0, what) for what in done]
    with contextlib.nullcontext() if whole else pytest.raises(checker.Broken, match="cuts"):
        checker.cuts_are_whole(types.SimpleNamespace(events=events, sync=True))


@pytest.mark.parametrize("heard", ["heartbeat", "request"])
@pytest.mark.parametrize(("boot", "needless"), [(4, False), (5, True), (6, False)])
def test_only_the_start_that_is_a_member_shows_that_a_worker_is_there(boot, needless, heard):
    """One before it is gone; one after it may have registered with a scheduler that died before it could admit it."""
    beat = simulated_world.Waits(messages.Heartbeat("worker/0", boot, 1, 0, False))
    said = beat if heard == "heartbeat" else messages.Register("worker/0", boot)
    warning = effects.Warn("Worker 0 is silent. Its lease goes to another worker.")
    before, joined = (
        journal.MembershipRecord(
            messages.Membership(term, (messages.Member(0, term, 0),), (), 1, ""),
            term,
            (messages.Register("worker/0", member),),
            None,
        )
        for term, member in ((1, 4), (2, 5))
    )
    for done in ([before, said, joined, warning], [before, joined, said, warning]):
        events = [Event(float(now), "scheduler", 0, what) for now, what in enumerate(done)]
        run = types.SimpleNamespace(events=events, settings=settings(timers=Timers(dead_after=6.0)))
        with pytest.raises(checker.Broken, match="needless") if needless else contextlib.nullcontext():
            checker.only_the_silent_are_dropped(run)


@pytest.mark.parametrize(("boot", "left"), [(5, {(0, 1)}), (6, set())])
def test_a_start_that_leaves_before_it_has_joined_is_not_the_one_before_it(boot, left):
    """That one was killed, and may have been in the middle of a push."""
    members = (messages.Member(0, 1, 0),), ()
    before, after = (
        journal.MembershipRecord(
            messages.Membership(term, each, (), 1, ""), 1, (messages.Register("worker/0", 5),), None
        )
        for term, each in enumerate(members, 1)
    )
    events = [Event(0.0, "scheduler", 0, what) for what in (before, messages.Leave("worker/0", boot), after)]
    assert checker.who_left(types.SimpleNamespace(events=events)) == left


def test_the_same_seed_is_the_same_run():
    first, second = (simulate(11, faults=HARSH) for _ in range(2))
    assert [repr(event) for event in first.events] == [repr(event) for event in second.events]


def test_a_seed_replays_in_another_process():
    """Sets of names are ordered otherwise in each process; a run must not be."""
    script = (
        "import sys, zlib; sys.path.insert(0, sys.argv[1]); import workload\n"
        "runs = [workload.simulate(seed) for seed in (1, 7, 20)]\n"
        "print(zlib.crc32(repr([run.events for run in runs]).encode()))"
    )
    command = [sys.executable, "-c", script, str(pathlib.Path(workload.__file__).parent)]
    found = [
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1]


def test_an_error_names_its_seed():
    bug = planted.BUGS["unordered sum"]
    seed = bug.found() - 1
    with pytest.raises(checker.Broken) as caught:
        bug.play(seed)
    assert f"seed {seed}:" in caught.value.__notes__[0]


@pytest.mark.parametrize("durability", ["none", "replicated"])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_sync_ends_in_the_same_bits_whatever_happens(workers, durability):
    chosen = settings(workers=workers, servers=2, durability=durability)
    calm = play(1, settings=chosen, faults=CALM, clip=False)
    harsh = play(2, settings=chosen, faults=HARSH, clip=False)
    assert bits(calm) == bits(harsh)


@pytest.mark.parametrize("servers", [1, 2, 3])
def test_bounded_by_zero_is_sync(servers):
    sync, bounded = (
        play(3, settings=settings(workers=3, servers=servers, mode=mode), faults=CALM) for mode in ("sync", "bounded")
    )
    assert bits(sync) == bits(bounded)


@pytest.mark.parametrize("mode", ["bounded", "async"])
def test_one_worker_is_never_stale_so_every_mode_is_sync(mode):
    bound = {"max_staleness": 2} if mode == "bounded" else {}
    sync = play(4, settings=settings(), faults=CALM, clip=False)
    other = play(4, settings=settings(mode=mode, **bound), faults=CALM, clip=False)
    assert bits(sync) == bits(other)


def test_backup_workers_do_not_change_the_bits():
    """The slices of a step are fixed by the workers it waits for, not by who computes them."""
    plain = play(5, settings=settings(workers=3), faults=CALM, clip=False)
    spare = play(6, settings=settings(workers=5, backup_workers=2), faults=HARSH, clip=False)
    assert bits(plain) == bits(spare)


def test_backup_workers_make_a_slow_worker_harmless():
    slow = Faults(until=1e9, slow_worker=20.0)
    waits = play(7, settings=settings(workers=3), faults=slow)
    spared = play(7, settings=settings(workers=4, backup_workers=1), faults=slow)
    steady = play(7, settings=settings(workers=3), faults=CALM)
    assert committed_at(spared) < 2 * committed_at(steady) < committed_at(waits)


def steps_a_second(slowness, **chosen):
    """Return the speed of workers that need a second for a step's equal share, worker 0 `slowness` times as long."""
    made = settings(workers=8, global_batch_size=8, num_examples=80, max_steps=20, **chosen)
    seconds = 8 / made.num_slices
    simulation = Simulation(
        seed=1,
        settings=dataclasses.replace(made, timers=Timers(dead_after=60.0)),
        faults=CALM,
        params=workload.initial_params(made.servers),
        gradient=workload.gradient,
        make_updater=workload.Momentum,
        compute_seconds=lambda rng, worker: rng.uniform(0.9, 1.1) * seconds * (slowness if worker == 0 else 1.0),
    ).run(patience=1000.0)
    times = [event.time for event in checker.named(simulation.events, "CommitRecord")]
    return (len(times) - 1) / (times[-1] - times[0])


def test_with_a_backup_worker_a_slow_one_costs_a_fifth_at_most():
    full = steps_a_second(1.0)
    assert steps_a_second(5.0) < 0.3 * full
    assert steps_a_second(5.0, backup_workers=1) > 0.8 * full


def committed_at(simulation):
    return max(event.time for event in checker.named(simulation.events, "CommitRecord"))


def bits(simulation):
    cut = checker.named(simulation.events, "CutRead")[-1].what
    return [array.tobytes() for shard in cut.params for array in shard]


@pytest.mark.parametrize(("scheduler", "drops"), [(Scheduler, False), (planted.WallClockScheduler, True)])
def test_a_scheduler_that_stands_still_drops_no_one(scheduler, drops):
    """Its clock jumps, or it is paused; when it wakes, a tick comes before the heartbeats that wait."""

    class Sleepy(scheduler):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.late = 0.0

        def handle(self, message, now):
            # Not at every step: as many jumps within one heartbeat as dead_after has of them would look like silence.
            if isinstance(message, messages.CommitAck) and message.shard == 0 and message.step % 4 == 0:
                self.late += 5.0
            return super().handle(message, now + self.late)

    chosen = settings(workers=3, servers=2, durability="replicated")
    runs = (simulate(seed, settings=chosen, faults=CALM, roles=Roles(scheduler=Sleepy)) for seed in range(3, 13))
    assert any(checker.named(run.events, "Warn") for run in runs) == drops


def test_a_long_run_keeps_a_short_log():
    chosen = settings(workers=2, max_steps=300, durability="snapshot", snapshot_every=5)
    run = play(9, settings=chosen, faults=dataclasses.replace(HARSH, until=20.0, kills=0.5))
    assert len(run.disk.log) < 8_000


def test_a_lost_shard_without_durability_ends_the_run_and_says_so():
    class Fragile(Server):
        lost = False

        def handle(self, message, now):
            if now > 0.8 and isinstance(message, messages.Push) and not self.lost:
                self.lost, self.boot, self.membership = True, self.boot + 1, None
                self.make_shard()
                self._forget()
                return [], []
            return super().handle(message, now)

    run = simulate(1, settings=settings(servers=1), faults=CALM, roles=Roles(server=Fragile))
    ends = {(event.what.reason) for event in checker.named(run.events, "Exit")}
    assert ends == {"error"}
    assert any("there is no saved cut" in event.what.text for event in checker.named(run.events, "Fail"))


def test_no_server_is_killed_while_the_other_copy_of_its_shard_is_cut_off():
    """The scheduler may just be dropping that one for the one that is killed: then both copies are lost."""
    run = Simulation(
        seed=1,
        settings=settings(**{**planted.REPLICATED, "servers": 1, "max_steps": 200}),
        faults=CALM,
        params=workload.initial_params(1),
        gradient=workload.gradient,
        make_updater=workload.Momentum,
    )
    with pytest.raises(Stuck):
        run.run(patience=1.0)
    assert {"server/0/a", "server/0/b"} <= {process.name for process in run._victims()}
    run.network.isolate("server/0/a", 1.0, breaks=False)
    while run.now < 1.4:
        run.timeline.step()
    assert not any(process.name.startswith("server") for process in run._victims())


def test_the_rules_are_all_exercised():
    """A few hundred drawn runs meet every mode, roll-backs, fail-overs, fenced pushes and duplicates."""
    met = set()
    for seed in range(60):
        run = workload.simulate(seed)
        met.add(run.settings.mode)
        met |= {event.what.status for event in checker.named(run.events, "PushAck")}
        scheduler = run.processes["scheduler"].machine
        met |= {name for name, count in scheduler.counters.items() if count}
        met |= {"restart"} if run.processes["scheduler"].life > 1 else set()
    assert met >= {"sync", "bounded", "async", "duplicate", "fenced", "obsolete", "failovers", "rollbacks", "restart"}
