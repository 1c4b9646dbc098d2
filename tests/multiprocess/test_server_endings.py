"""A parameter server's run on a full disk: the lines of docs/guide/endings.md about it, on a small disk of its own.

python -m pytest -m root tests/multiprocess/test_server_endings.py
"""

import re
import subprocess
import sys

import ending_jobs
import pytest

from jaxdist.rundir import record

STEPS = 60
MADE = "until [ $(cat run/ps/steps.jsonl 2>/dev/null | wc -l) -ge 6 ]; do sleep 0.1; done"
"""Waits until the run has made some steps."""
FILL = "dd if=/dev/zero of=fill bs=512 2>/dev/null"
WAITS = "until grep -q waits out; do sleep 0.1; done"
FITS_NO_CHECKPOINT = "dd if=/dev/zero of=fill bs=1024 count=7600 2>/dev/null"
SCRIPTS = {
    "room again": f"{{train}} & {MADE}; {FILL}; {WAITS}; rm fill; wait $!; echo status $?",
    "stopped": f"{{train}} & {MADE}; {FILL}; {WAITS}; kill $!; wait $!; echo status $?; rm fill; "
    "{train} --restartable; echo status $?",
    "no checkpoint": f"{FITS_NO_CHECKPOINT}; {{train}}; echo status $?; ls /dev/shm; rm fill; "
    "{train} --restartable; echo status $?",
    "from the start": f"{FILL}; {{train}}; echo status $?; rm fill; {{train}} --restartable; echo status $?",
}


@pytest.mark.root
@pytest.mark.parametrize("case", SCRIPTS)
def test_a_full_disk(tmp_path, case):
    disk = tmp_path / "disk"
    disk.mkdir()
    train = f"{sys.executable} -m jaxdist.cli train {ending_jobs.EXPERIMENT} --strategy parameter-server --devices 1"
    train += f" --run-dir {disk}/run --max-steps {STEPS} --set ps.workers=1 ps.servers=1 checkpoints.every_steps=20"
    train += " eval.every_steps=20 log_every=1 2>>out"
    mounts = f"mount -t tmpfs -o size=8m tmpfs {disk} && mount -t tmpfs -o size=8m tmpfs /dev/shm && cd {disk} && "
    # What the run says goes to another disk.
    script = f"{mounts} ln -s {tmp_path}/out out; {SCRIPTS[case].format(train=train)}; cp run/run.json {tmp_path}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=200, check=False
    )
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
        assert "is full, so the newest state could not be saved. Free space and continue with --resume" in said
    if case == "no checkpoint":
        assert said.count("has no room for a checkpoint. The run continues") == 1
        assert "Its state stays in /dev/shm/jaxdist-" in said
        assert f"Step {STEPS} was saved from memory" in said
