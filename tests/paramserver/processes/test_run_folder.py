"""Boot numbers grow with every start of a process, whatever the clock says."""

import time

from jaxdist.paramserver.processes.run_folder import last_boot, next_boot


def test_boot_numbers_grow_though_the_clock_is_set_back(tmp_path, monkeypatch):
    first = next_boot(tmp_path, "server/0/a")
    died = last_boot(tmp_path, "server/0/a")
    monkeypatch.setattr(time, "time_ns", lambda: 1_000)
    second = next_boot(tmp_path, "server/0/a")
    assert second > first + 1000  # a process counts its own rejoins upwards
    assert first + 1000 < died < second  # a death that is told concerns all rejoins of that start, and no later start
    assert last_boot(tmp_path, "worker/0") == 0
    assert next_boot(tmp_path, "worker/0") == 1_000_000
