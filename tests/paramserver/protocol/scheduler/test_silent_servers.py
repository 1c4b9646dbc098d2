"""Which servers are silent, and what follows: a table of times."""

import pytest
import stages

from jaxdist.paramserver.protocol import effects, messages
from jaxdist.paramserver.protocol.scheduler.scheduler import Scheduler
from jaxdist.paramserver.protocol.settings import Settings, Timers

TIMERS = Timers(heartbeat=0.5, retry=1.0, dead_after=5.0, stuck_after=60.0)
SERVER = "server/0/a"


def running(**chosen):
    """Return a scheduler that has one server, heard of last at 0 s."""
    settings = Settings(num_examples=8, global_batch_size=4, max_steps=10, timers=TIMERS, **chosen)
    scheduler = Scheduler(settings=settings)
    scheduler.handle(messages.Register(SERVER, 1), 0.0)
    return scheduler


def ticks(scheduler, first, last):
    """Return the effects of four ticks a second, from `first` to `last`, with the second of each."""
    found = []
    for quarter in range(4 * first, 4 * last + 1):
        found += [(quarter // 4, effect) for effect in scheduler.handle(messages.Tick(), quarter / 4)[1]]
    return [(second, effect) for second, effect in found if not isinstance(effect, effects.Append)]


def test_a_silent_server_is_named_and_then_ends_the_run():
    scheduler = running()
    found = ticks(scheduler, 0, 31)
    assert [(second, type(effect)) for second, effect in found] == [(5, effects.Warn), (30, effects.Fail)]
    assert f"Server {SERVER} is silent. It holds the only copy of shard 0." in found[0][1].text
    assert f"Server {SERVER} was silent for 30 s, and there is no saved cut." in found[-1][1].text
    assert scheduler.state.stop.reason == "error"


def test_with_saved_cuts_it_is_started_again_once_and_then_given_up():
    scheduler = running(durability="snapshot", snapshot_every=2)
    found = ticks(scheduler, 0, 90)
    assert [(second, effect.name) for second, effect in found if isinstance(effect, effects.Replace)] == [(30, SERVER)]
    assert scheduler.state.stop is None
    assert "did not restart" in ticks(scheduler, 91, 92)[-1][1].text
    assert scheduler.state.stop.reason == "error"


def test_servers_that_do_not_join_are_named_once():
    cast = stages.Cast(stages.settings(servers=2))
    cast.tell(messages.Register("server/0/a", 1))
    done = []
    for _ in range(4 * 200):
        done += cast.tick(0.25)[1]
    (warning,) = done
    assert warning.text == "The run waits for servers that have not joined yet: server/1/a."


@pytest.mark.parametrize("durability", ["none", "snapshot", "replicated"])
def test_those_that_waited_long_for_the_last_one_to_join_are_not_silent(durability):
    """They register again and again meanwhile."""
    saved = {"snapshot_every": 2} if durability == "snapshot" else {}
    cast = stages.Cast(stages.settings(servers=2, durability=durability, **saved))
    *early, last = cast.servers()
    for _ in range(4 * 40):
        cast.tell(*(messages.Register(name, 1) for name in early))
        cast.tick(0.25)
    cast.tell(messages.Register(last, 1))
    assert cast.tick()[1] == []
    assert (cast.state.term, cast.state.stop) == (1, None)


def test_one_that_comes_back_in_time_is_forgiven():
    scheduler = running(durability="snapshot", snapshot_every=2)
    ticks(scheduler, 0, 29)
    scheduler.handle(messages.Heartbeat(SERVER, 1, scheduler.state.term, 1, False), 29.5)
    assert ticks(scheduler, 30, 34) == []
    assert scheduler.state.stop is None


@pytest.mark.parametrize("boot", [2, 3])
def test_one_that_was_started_again_returns_to_the_saved_cut(boot):
    scheduler = running(durability="snapshot", snapshot_every=2)
    ticks(scheduler, 0, 32)
    replies, _ = scheduler.handle(messages.Register(SERVER, boot), 33.0)
    views = [message for name, message in replies if isinstance(message, messages.Membership) and name == SERVER]
    assert [view.shards[0].primary_boot for view in views] == [boot]
    assert scheduler.counters["rollbacks"] == 1
    assert ticks(scheduler, 34, 37) == []
