"""The tests of the local launcher once more, with processes that Ray starts, on a cluster of two nodes.

pip install 'jaxdist[ray]' && pytest -m cluster tests/paramserver/processes/test_ray_crew.py
"""

import functools
import inspect
import signal
import subprocess

import held_experiment
import pytest
import test_faults
import test_processes
import test_start
from test_processes import calm  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

CASES = [
    test_processes.test_a_calm_run_leaves_the_record_every_run_leaves,
    test_processes.test_killed_after_a_decision_and_before_an_answer,
    functools.partial(test_processes.test_a_process_that_stood_still_comes_back_as_a_stranger, name="worker/1"),
    functools.partial(test_processes.test_a_process_that_stood_still_comes_back_as_a_stranger, name="server/0/a"),
    functools.partial(test_processes.test_a_process_that_stood_still_comes_back_as_a_stranger, name="scheduler"),
    test_processes.test_a_lost_shard_goes_back_to_the_snapshot_and_ends_in_the_same_bits,
    test_processes.test_a_run_is_resumed_from_its_snapshot,
    functools.partial(test_processes.test_stale_modes_train_and_tell_their_staleness, chosen={"mode": "async"}),
    functools.partial(
        test_processes.test_stale_modes_train_and_tell_their_staleness, chosen={"mode": "bounded", "max_staleness": 2}
    ),
    functools.partial(
        test_faults.test_killed_at_a_labelled_point, labels=("send Push", "send Replicate", "send Commit")
    ),
    test_faults.test_answers_lost_after_they_were_applied,
    test_faults.test_a_tenth_of_all_messages_lost_and_a_tenth_repeated,
    test_faults.test_one_worker_five_times_slower,
    test_faults.test_no_room_on_the_disk_for_a_snapshot,
    test_faults.test_a_gradient_that_is_not_finite_ends_the_run,
]


def name_of(case):
    chosen = getattr(case, "keywords", {}).values()
    return "-".join(map(str, [getattr(case, "func", case).__name__, *chosen]))


@pytest.fixture(scope="module", autouse=True)
def ray():
    import ray as library
    from ray import cluster_utils

    cluster = cluster_utils.Cluster()
    try:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv(test_processes.ENGINE, "ray")
            for _ in range(2):
                cluster.add_node(num_cpus=2, object_store_memory=80_000_000)
            environment.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
    finally:
        library.shutdown()  # a client that is connected keeps a cluster from ending
        cluster.shutdown()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_ray_passes(request, case):
    given = getattr(case, "keywords", {})
    wanted = [name for name in inspect.signature(case).parameters if name not in given]
    case(**{name: request.getfixturevalue(name) for name in wanted})


def test_a_run_on_ray_is_stopped_and_goes_on(tmp_path, monkeypatch):
    steps = ["ps.engine=ray", "ps.servers=2"]
    subprocess.run(test_start.command(tmp_path / "calm", *steps), check=True)
    monkeypatch.setenv(held_experiment.GO, str(tmp_path / "go"))
    process = subprocess.Popen(test_start.command(tmp_path / "run", *steps))
    test_start.wait_for_steps(process, tmp_path / "run", 6)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 75
    (tmp_path / "go").touch()
    subprocess.run(test_start.command(tmp_path / "run", *steps, flags=["--resume"]), check=True)
    calm_record, resumed = (test_start.record_of(tmp_path / name) for name in ("calm", "run"))
    assert (resumed["params_sha256"], resumed["step"]) == (calm_record["params_sha256"], 40)


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # Ray starts its nodes so
def test_the_processes_of_a_lost_node_run_on_the_others(ray, tmp_path, monkeypatch, capsys):
    """It takes Ray some seconds to know of the loss: meanwhile the copies of the shards train on."""
    chosen = {**test_processes.REPLICATED, "steps": 5000}
    undisturbed = test_processes.disturbed(tmp_path / "calm", monkeypatch, [], **chosen)
    extra = ray.add_node(num_cpus=2, object_store_memory=80_000_000)

    def lose(mischief):
        ray.remove_node(extra, allow_graceful=False)

    made = test_processes.disturbed(tmp_path / "run", monkeypatch, [(3, lose)], **chosen)
    assert made.params_sha256 == undisturbed.params_sha256
    assert "A node of the cluster is lost. Its processes run on the others from now on" in capsys.readouterr().err
