"""Settings that contradict each other are refused; names of processes and files can be read back."""

import pytest
from stages import settings

from jaxdist.config.parameter_server import ParameterServer
from jaxdist.paramserver.protocol.settings import (
    Timers,
    server_name,
    server_shard,
    worker_name,
    worker_number,
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "hogwild"}, "ps.mode must be one of"),
        ({"durability": "raid"}, "ps.durability must be one of"),
        ({"workers": 0}, "ps.workers must be at least 1, got 0. Leave it out"),
        ({"servers": -1}, "ps.servers must be at least 1, got -1"),
        ({"dead_after_seconds": float("nan")}, "ps.dead_after_seconds must be larger than 1"),
        ({"port": 70000}, "ps.port must be from 1 to 65535"),
        ({"max_staleness": 2}, "ps.max_staleness applies to ps.mode=bounded"),
        ({"mode": "async", "backup_workers": 1, "workers": 2}, "ps.backup_workers needs a synchronous mode"),
        ({"backup_workers": 2, "workers": 2}, "must be smaller than ps.workers"),
        ({"workers": 7}, "cannot be divided into 7 slices.* Set ps.workers to at most 6,"),
        ({"durability": "snapshot"}, "needs ps.snapshot_every"),
        ({"snapshot_every": 3}, "has no effect with ps.durability=none"),
        ({"damp_staleness": True}, "no effect without staleness"),
        ({"read_every": (0,)}, "periods in read_every"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        settings(**changes)


@pytest.mark.parametrize("times", [(0.0, 1.0, 5.0, 60.0), (6.0, 1.0, 5.0, 60.0), (0.5, 0.0, 5.0, 60.0), (1, 1, 9, 8)])
def test_timers_that_would_drop_everyone_are_refused(times):
    with pytest.raises(ValueError, match="0 < heartbeat < dead_after"):
        Timers(*times)


def test_hosts_belong_to_the_local_engine():
    with pytest.raises(ValueError, match=r"ps\.hosts needs"):
        ParameterServer(hosts=("10.0.0.1",), engine="ray")


def test_process_names_can_be_read_back():
    assert worker_number(worker_name(12)) == 12
    assert server_shard(server_name(3, 1)) == 3
    for name in ("scheduler", "observer", "worker/x", "server/0"):
        assert worker_number(name) is None
        assert server_shard(name) is None


@pytest.mark.parametrize(("workers", "backup", "mode", "slices"), [(4, 1, "sync", 3), (4, 0, "async", 1)])
def test_a_batch_is_divided_only_where_a_step_waits_for_several_workers(workers, backup, mode, slices):
    assert settings(workers=workers, backup_workers=backup, mode=mode).num_slices == slices


def test_a_ragged_epoch_counts_its_last_step():
    assert [settings(num_examples=n).steps_per_epoch for n in (18, 19, 24)] == [3, 4, 4]
