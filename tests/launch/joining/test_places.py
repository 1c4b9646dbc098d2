"""What a process reads from its environment: the variables are those that each engine sets."""

import pytest

from jaxdist.errors import UserError
from jaxdist.launch.joining import places, runtime

SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "gpu[017-020,031]",
    "SLURM_NTASKS": "10",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
PLAIN = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
OURS = {"JAXDIST_COORDINATOR": "127.0.0.1:5", "JAXDIST_NUM_PROCESSES": "4", "JAXDIST_PROCESS_ID": "2"}


@pytest.fixture
def found(monkeypatch):
    def find(*environments):
        for environment in environments:
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
        return places.find()

    return find


def summary(place):
    return place.engine, place.coordinator, place.num_processes, place.process_id


def test_a_process_that_nobody_placed_is_alone(found):
    assert found() is None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (OURS, ("jaxdist", "127.0.0.1:5", 4, 2)),
        (PLAIN, ("JAX_COORDINATOR_ADDRESS", "10.0.0.1:1234", 2, 1)),
        (SLURM, ("SLURM", f"gpu017:{61440 + 4100 % 4096}", 10, 3)),
        (OPEN_MPI, ("Open MPI", f"10.96.0.1:{61440 + 1314521088 // 4096 % 4096}", 4, 2)),
    ],
    ids=["ours", "plain", "slurm", "open mpi"],
)
def test_each_engine_is_joined_as_it_is_found(found, environment, expected):
    assert summary(found(environment)) == expected


def test_our_launcher_comes_first_also_inside_an_engine(found):
    assert found(SLURM, PLAIN, OURS).engine == "jaxdist"


def test_an_address_may_be_stated_where_an_engine_numbers_the_processes(found):
    address = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}
    mpi_5 = {name: value for name, value in OPEN_MPI.items() if "orte" not in name}
    assert summary(found(mpi_5, address)) == ("Open MPI", "10.0.0.1:1234", 4, 2)


def test_the_port_and_the_interface_may_be_chosen(found):
    place = found(SLURM, {"JAX_COORDINATOR_PORT": "7000", "JAX_COORDINATOR_BIND_ADDRESS": "10.1.1.1:7000"})
    assert (place.coordinator, place.bind_address) == ("gpu017:7000", "10.1.1.1:7000")


def test_the_coordinator_listens_at_its_own_address_by_default(found):
    assert found(PLAIN).bind_address == "10.0.0.1:1234"


def test_a_task_of_an_engine_drives_its_own_accelerator(found):
    assert found(SLURM).local_device_ids == (1,)


def test_a_job_of_one_task_is_alone(found):
    assert found(SLURM, {"SLURM_NTASKS": "1"}) is None
    assert found({"OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_a_notebook_in_a_pod_is_alone(found):
    assert found({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1"}, r"JAX_NUM_PROCESSES and JAX_PROCESS_ID is not set\. Set it"),
        ({**PLAIN, "JAX_PROCESS_ID": "2"}, "got process '2' of '2'"),
        ({**PLAIN, "JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "must be HOST:PORT, got '10.0.0.1'"),
        ({"JAX_PROCESS_ID": "1"}, "which needs JAX_COORDINATOR_ADDRESS too"),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "Start it with srun"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "Set JAX_COORDINATOR_ADDRESS to HOST:PORT"),
    ],
)
def test_a_process_that_cannot_find_its_job_is_refused(found, environment, message):
    with pytest.raises(UserError, match=message):
        found(environment)


def test_every_way_to_join_ends_up_in_the_same_call(found, monkeypatch):
    """`runtime.start` asks `find`, and nothing else, for the job."""
    joined = []
    monkeypatch.setattr(runtime, "_join_job", lambda place: joined.append(summary(place)))
    for environment in (PLAIN, OURS):
        found(environment)
        runtime.start(8)
    assert [place[0] for place in joined] == ["JAX_COORDINATOR_ADDRESS", "jaxdist"]
