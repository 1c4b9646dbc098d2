"""What ends a parameter server's run, and what is kept: the lines of docs/guide/endings.md about it.

python -m pytest -m 'soak or root' tests/multiprocess/test_server_endings.py        # root: small disks of their own
"""

import json
import os
import re
import signal
import sys

import ending_jobs
import held_experiment
import pytest

from jaxdist.rundir import record

STEPS = 60
MADE = "until [ $(cat run/ps/steps.jsonl 2>/dev/null | wc -l) -ge 2 ]; do sleep 0.1; done"
"""Waits until the run has made some steps."""
FILL = "dd if=/dev/zero bs=512 2>/dev/null >> fill"
WAITS = f"until grep -q waits out; do {FILL}; sleep 0.1; done"
"""Fills again what the run frees: it shortens its log and removes old checkpoints."""
FITS_NO_CHECKPOINT = "dd if=/dev/zero of=fill bs=1024 count=7600 2>/dev/null"
SCRIPTS = {
    "room again": f"{{train}} & {MADE}; {FILL}; {WAITS}; touch $GO; rm fill; wait $!; echo status $?",
    "stopped": f"{{train}} & {MADE}; {FILL}; {WAITS}; kill $!; wait $!; echo status $?; touch $GO; rm fill; "
    "{train} --restartable; echo status $?",
    "no checkpoint": f"{FITS_NO_CHECKPOINT}; {{train}}; echo status $?; ls /dev/shm; rm fill; "
    "{train} --restartable; echo status $?",
    "from the start": f"{FILL}; {{train}}; echo status $?; rm fill; {{train}} --restartable; echo status $?",
}


SERVERS = ("--strategy", "parameter-server", "--set", "ps.workers=1", "ps.servers=1")


@pytest.fixture
def start(tmp_path):
    with ending_jobs.starting(tmp_path) as make:
        yield lambda *arguments, **settings: make(*arguments, *SERVERS, processes=0, **settings)


def train_to(job, step):
    """Wait until the run has made this step; return the processes of its roles by name."""
    path = job.run_dir / "ps" / "steps.jsonl"
    job.wait_for(lambda: path.exists() and made_steps(path) >= step, f"step {step}")
    found = {}
    for number in ending_jobs.descendants(job.process.pid):
        words = ending_jobs.words(number).split("\0")
        if str(job.run_dir / "ps" / "spec.json") in words:
            found[words[-3]] = number
    return found


def made_steps(path):
    return max(
        [json.loads(line)["step"] for line in path.read_text().splitlines(keepends=True) if line[-1] == "\n"] or [0]
    )


BROKEN = """
import dataclasses, tiny_experiment

class Broken:
    def on_step(self, info):
        if info.step == {step}:
            raise KeyError("mine")

    def on_evaluation(self, info):
        if {evaluation}:
            raise KeyError("mine")

def get_config():
    return dataclasses.replace(tiny_experiment.get_config(), hooks=(Broken(),))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("step", "evaluation"), [(9, False), (0, True)])
def test_an_error_of_a_hook_of_a_server_loses_no_step(start, tmp_path, step, evaluation):
    broken = tmp_path / "broken.py"
    broken.write_text(BROKEN.format(step=step, evaluation=evaluation))
    path = {"PYTHONPATH": os.pathsep.join([str(ending_jobs.EXPERIMENT.parent), os.environ.get("PYTHONPATH", "")])}
    job = start(experiment=broken, environment=path, eval_every=5)
    assert job.end() == 2, job.text()
    saved = job.saved_step()
    assert saved >= (5 if evaluation else 9)
    assert f"Step {saved} is saved" in job.text()
    assert "failed in on_" in job.text()
    broken.write_text(BROKEN.format(step=0, evaluation=False))
    for boot in (job.run_dir / "ps" / "boots").iterdir():
        boot.write_bytes(b"")  # as a machine that failed may leave them
    again = start("--resume", experiment=broken, environment=path, steps=saved + 4)
    assert again.end() == 0, again.text()
    assert record.RunRecord.read(job.run_dir).step == saved + 4


@pytest.mark.slow
def test_a_stop_signal_before_a_worker_has_joined(start):
    """Its processes have begun to start, which takes them seconds."""
    job = start()
    job.wait_for((job.run_dir / "ps" / "spec.json").exists, "its processes")
    ending_jobs.kill(signal.SIGTERM, job.process.pid)
    assert job.end() == 75, job.text()
    assert "Traceback" not in job.text()
    again = start("--resume", steps=4)
    assert again.end() == 0, again.text()
    assert record.RunRecord.read(job.run_dir).step == 4


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("target", ["observer", "all"])
def test_a_stop_signal(start, number, target):
    """To the program alone, as Ctrl-C sends it, or to all processes at once, as systemd and container engines do."""
    job = start()
    roles = train_to(job, 6)
    assert set(roles) == {"scheduler", "server/0/a", "worker/0"}
    for _ in range(2 if target == "all" else 1):
        ending_jobs.kill(number, *(roles.values() if target == "all" else ()), job.process.pid)
    assert job.end() == 75, job.text()
    assert "Traceback" not in job.text()
    made = record.RunRecord.read(job.run_dir)
    assert (made.end_reason, made.step) == ("preempted", job.saved_step())
    assert made.step >= 6
    assert made.extra["ps"]["rollbacks"] == 0


@pytest.mark.soak
def test_a_role_that_is_killed_is_restarted_and_a_killed_program_continues_from_its_checkpoint(start):
    job = start(save_every=5)
    roles = train_to(job, 6)
    ending_jobs.kill(signal.SIGKILL, roles["worker/0"])
    after = made_steps(job.run_dir / "ps" / "steps.jsonl")
    again = train_to(job, after + 3)
    assert again["worker/0"] != roles["worker/0"]
    job.wait_for(job.saved_step, "a checkpoint")
    ending_jobs.kill(signal.SIGKILL, job.process.pid)
    assert job.end() == -signal.SIGKILL
    saved = job.saved_step()
    assert saved
    job = start("--resume", steps=saved + 20, save_every=5)
    assert job.end() == 0, job.text()
    assert record.RunRecord.read(job.run_dir).step == saved + 20
    assert "Traceback" not in job.text()


@pytest.mark.slow
def test_a_file_of_a_server_that_cannot_be_written_is_one_message(start):
    """The record of the run is a folder, once the run trains; the processes of the server write their own files."""
    job = start(save_every=10)
    train_to(job, 6)
    job.wait_for((job.run_dir / record.FILE_NAME).exists, "its record")
    (job.run_dir / record.FILE_NAME).unlink()
    (job.run_dir / record.FILE_NAME).mkdir()
    assert job.end() == 1, job.text()
    assert "run.json cannot be written: Is a directory" in job.text()
    assert "Traceback" not in job.text()


@pytest.mark.soak
def test_a_viewer_that_closes_its_end_ends_nothing_of_a_server(start):
    told, tell = os.pipe()
    job = start("--set", "writers=('console','jsonl')", "log_every=1", steps=60, output=tell)
    os.close(tell)
    os.close(told)
    assert job.end() == 0, job.text()
    assert record.RunRecord.read(job.run_dir).end_reason == "max_steps"


@pytest.mark.root
@pytest.mark.parametrize("case", SCRIPTS)
def test_a_full_disk(tmp_path, case):
    disk = tmp_path / "disk"
    disk.mkdir()
    # The experiment is held open until the run waits for room.
    go = tmp_path / "go"
    train = f"{sys.executable} -m jaxdist.cli train {held_experiment.__file__} --strategy parameter-server --devices 1"
    train += f" --run-dir {disk}/run --max-steps {STEPS} --set ps.workers=1 ps.servers=1 checkpoints.every_steps=20"
    train += " eval.every_steps=20 log_every=1 2>>out"
    mounts = f"mount -t tmpfs -o size=8m tmpfs {disk} && mount -t tmpfs -o size=8m tmpfs /dev/shm && cd {disk} && "
    # What the run says goes to another disk.
    held = f"export {held_experiment.GO}={go} GO={go}; " if WAITS in SCRIPTS[case] else ""
    script = f"{held}{mounts} ln -s {tmp_path}/out out; {SCRIPTS[case].format(train=train)}; cp run/run.json {tmp_path}"
    done = ending_jobs.in_own_mounts(script)
    said = (tmp_path / "out").read_text()
    assert "Traceback" not in said + done.stderr
    statuses = [int(each) for each in re.findall(r"^status (\d+)$", done.stdout, re.MULTILINE)]
    expected = {"room again": [0], "stopped": [1, 0], "no checkpoint": [1, 0], "from the start": [2, 0]}
    assert statuses == expected[case], said
    made = record.RunRecord.read(tmp_path)
    assert (made.end_reason, made.step) == ("max_steps", STEPS)
    if case in ("room again", "stopped"):
        assert said.count("is full. The parameter server waits until there is room.") == 1
    if case == "stopped":
        # Where it stopped at a cut, its state could be read from the servers.
        kept = (
            "checkpoint of step \\d+\\. Its state stays in /dev/shm/jaxdist-.*; free space and continue with --resume"
        )
        lost = "is full, so the newest state could not be saved\\. Free space and continue with --resume"
        assert re.search(f"{kept}|{lost}", said), said
    if case == "no checkpoint":
        assert said.count("has no room for a checkpoint. The run continues") == 1
        assert "Its state stays in /dev/shm/jaxdist-" in said
        assert f"Step {STEPS} was saved from memory" in said
