"""A run does not end because its output has no reader any more."""

import json
import os
import subprocess
import sys

import pytest
import run_records

from jaxdist.launch import viewer
from jaxdist.rundir import record

TALKATIVE = """
import os, pathlib, sys
from jaxdist.launch import viewer
with viewer.Viewer() as shown:
    shown.log = pathlib.Path(sys.argv[1]) / "logs" / "rest.log" if sys.argv[1] else None
    print("first", flush=True)
    sys.stdin.readline()  # until the reader has gone
    for number in range(3):
        print("line", number, flush=True)
    os.write(1, b"native\\n")
    print("warning", file=sys.stderr)
print("after", flush=True)
"""


def lose_reader(log, *, errors=subprocess.PIPE):
    process = subprocess.Popen(
        [sys.executable, "-c", TALKATIVE, str(log)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    said = process.stderr.read() if process.stderr else ""
    if process.stderr:
        process.stderr.close()
    return process.wait(timeout=200), said


def test_output_continues_in_the_log_when_its_reader_has_gone(tmp_path):
    status, said = lose_reader(tmp_path)
    assert (status, said) == (0, "warning\n")
    assert (tmp_path / "logs" / "rest.log").read_text() == "line 0\nline 1\nline 2\nnative\nafter\n"


def test_a_viewer_inside_another_has_the_word(tmp_path, monkeypatch):
    """The command line has one without a log, and a run inside it one with a log."""
    inside = "with viewer.Viewer(), viewer.Viewer() as shown"
    monkeypatch.setitem(globals(), "TALKATIVE", TALKATIVE.replace("with viewer.Viewer() as shown", inside))
    assert lose_reader(tmp_path) == (0, "warning\n")
    assert (tmp_path / "logs" / "rest.log").read_text() == "line 0\nline 1\nline 2\nnative\nafter\n"


@pytest.mark.parametrize(
    ("arguments", "closed", "expected"),
    [(["--help"], "both", 0), (["runs", "."], "stdout", 0), (["no-command"], "both", 2)],
)
def test_a_command_without_a_reader_has_the_status_that_it_has_with_one(tmp_path, arguments, closed, expected):
    """`jaxdist runs | head -1`: no traceback, on neither stream."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / record.FILE_NAME).write_text(json.dumps(run_records.EMPTY))
    told, tell = os.pipe()
    os.close(told)
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxdist.cli", *arguments],
        stdout=tell, stderr=tell if closed == "both" else subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    os.close(tell)
    _, said = process.communicate(timeout=200)
    assert process.returncode == expected
    assert "Error" not in (said or "")
    assert "Traceback" not in (said or "")


def test_a_name_that_the_terminal_cannot_show_is_shown_otherwise(tmp_path):
    (tmp_path / "läuf\udcff").mkdir()
    (tmp_path / "läuf\udcff" / record.FILE_NAME).write_text(json.dumps(run_records.EMPTY))
    for encoding in ("ascii", "utf-8"):
        done = subprocess.run(
            [sys.executable, "-m", "jaxdist.cli", "runs", "."],
            env={**os.environ, "PYTHONIOENCODING": encoding}, cwd=tmp_path, capture_output=True, timeout=200,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"uf\\udcff" in done.stdout


def test_without_a_log_the_rest_is_dropped():
    assert lose_reader("") == (0, "warning\n")


def test_a_log_on_a_full_disk_ends_nothing(tmp_path):
    with open("/dev/full", "w") as full:
        assert lose_reader(tmp_path, errors=full) == (0, "")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_output_that_was_closed_from_the_start_is_dropped(monkeypatch, name):
    """After `>&-` Python has no stream at all."""
    monkeypatch.setattr(sys, name, None)
    with viewer.Viewer(), viewer.Viewer():
        stream = getattr(sys, name)
        print("nothing", file=stream, flush=True)
        assert os.fstat(stream.fileno())
    assert getattr(sys, name) is None
