"""What run.json says of workers that join, leave and restart."""

from jaxdist.paramserver.run.worker_changes import WorkerChanges


def after_start():
    changes = WorkerChanges([], num_workers=2, num_others=3)
    assert changes.note_members({0: 1}, 0, 0.0) == []
    changes.note_step(10.0)
    assert changes.note_members({0: 1, 1: 2}, 1, 10.5) == []  # a worker of the configuration that started slowly
    for step in range(11):
        changes.note_step(11.0 + step)
    assert changes.rows == []
    return changes


def test_a_worker_that_joins_costs_what_the_next_step_takes_longer():
    changes = after_start()
    told = changes.note_members({0: 1, 1: 2, 2: 3}, 12, 21.5)
    assert told == ["Worker 2 joins after step 12; 3 workers take part."]
    changes.note_step(24.5)
    assert changes.rows == [{"kind": "join", "step": 12, "processes": 6, "seconds_lost": 2.5}]
    changes.note_members({0: 1, 1: 2}, 13, 24.6)
    changes.note_step(25.5)
    assert changes.rows[1:] == [{"kind": "leave", "step": 13, "processes": 5, "seconds_lost": 0.0}]


def test_a_worker_that_died_and_is_back_has_restarted():
    changes = after_start()
    changes.note_members({0: 1}, 12, 21.2)
    changes.note_step(24.0)
    changes.note_members({0: 1, 1: 5}, 13, 26.0)
    changes.note_step(29.0)
    assert changes.rows == [{"kind": "restart", "step": 12, "processes": 5, "seconds_lost": 6.0}]
    changes.note_members({0: 1, 1: 6}, 14, 27.5)  # the scheduler heard of both at once
    assert changes.rows[1:] == [{"kind": "restart", "step": 14, "processes": 5, "seconds_lost": None}]


def test_a_return_to_a_saved_cut_is_one_restart_and_no_worker_has_left():
    changes = after_start()
    assert changes.note_members({}, 12, 21.2, returned=True) == []
    assert changes.note_members({1: 8}, 12, 22.0) == []
    assert changes.note_members({0: 9, 1: 8}, 12, 22.1) == []
    changes.note_step(25.0)
    assert changes.rows == [{"kind": "restart", "step": 12, "processes": 5, "seconds_lost": 3.0}]
    changes.note_members({1: 8}, 13, 25.1)
    changes.note_step(26.0)
    assert changes.rows[1:] == [{"kind": "leave", "step": 13, "processes": 4, "seconds_lost": 0.0}]


def test_the_changes_of_earlier_attempts_stay():
    earlier = [{"kind": "join", "step": 3, "processes": 4, "seconds_lost": 1.0}]
    assert WorkerChanges(earlier, num_workers=1, num_others=2).rows == earlier
