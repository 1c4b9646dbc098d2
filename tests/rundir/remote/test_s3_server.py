"""A local S3 server behind it all: objects, exclusive creation, outages, processes killed while they upload."""

import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import moto.server
import pytest
import s3fs
import test_mirror

from jaxdist.cli import main
from jaxdist.launch.joining import runtime
from jaxdist.rundir.remote import mirror, run_store, uploads, working_copy
from jaxdist.rundir.remote.run_address import Address

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(moto|botocore|aiobotocore|werkzeug).*"),
]
TESTS = pathlib.Path(__file__).parents[2]
_FILES, _BYTES = 300, 2000
_DEADLINE_SECONDS = 60.0

# Uploads one checkpoint after another for as long as it lives.
_UPLOADER = """
import pathlib, sys
from jaxdist.rundir.remote import mirror, run_store
from jaxdist.rundir.remote.run_address import Address
mirror.Mirror(pathlib.Path(sys.argv[1]), run_store.open_store(Address(sys.argv[2]))).once()
"""


@pytest.fixture(scope="module")
def server():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    made = moto.server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    _, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "for-a-local-server")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv(working_copy.FOLDER_VARIABLE, str(tmp_path / "copies"))
    name = f"bucket-{os.getpid()}-{time.monotonic_ns()}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    return f"s3://{name}"


def test_an_object_is_created_by_one_of_two_jobs(bucket):
    store = run_store.open_store(Address(f"{bucket}/run"))
    assert [store.create("lock.json", content) for content in (b"a", b"b")] == [True, False]
    assert store.read("lock.json") == b"a"


def test_a_run_trains_resumes_and_is_used_at_its_address(bucket, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "start", lambda num_devices=None, threads=None: jax.devices()[: num_devices or 1])
    address, tiny = f"{bucket}/runs/first", str(TESTS / "tiny_experiment.py")
    assert main.run(["train", tiny, "--run-dir", address, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["step"], made["run_dir"]) == (10, address)
    assert main.run(["train", tiny, "--run-dir", address]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main.run(["train", tiny, "--run-dir", address, "--set", "model.width=16", "--resume"]) == 2
    assert f"{address} holds a run of another experiment: model.width 8 -> 16" in capsys.readouterr().err
    assert main.run(["train", tiny, "--run-dir", address, "--max-steps", "14", "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 14
    assert mirror.uploaded_names(run_store.open_store(Address(address))) == {"12", "14"}
    assert main.run(["eval", address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 14
    assert main.run(["runs", f"{bucket}/runs"]) == 0
    assert "max_steps" in capsys.readouterr().out
    assert main.run(["report", address, "--out", str(tmp_path / "report.html")]) == 0
    assert list((tmp_path / "copies").iterdir()) == []


def test_a_process_killed_in_the_middle_of_an_upload_leaves_the_checkpoint_before(bucket, tmp_path):
    store = run_store.open_store(Address(f"{bucket}/run"))
    test_mirror.save(tmp_path, 4)
    mirror.Mirror(tmp_path, store).once()
    test_mirror.save(tmp_path, 8)
    for number in range(_FILES):
        (tmp_path / "checkpoints" / "8" / "state" / str(number)).write_bytes(os.urandom(_BYTES))
    command = [sys.executable, "-c", _UPLOADER, str(tmp_path), f"{bucket}/run"]
    uploader = subprocess.Popen(command, cwd=TESTS.parent, start_new_session=True)
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not store.sizes("checkpoints/8"):
        assert time.monotonic() < deadline
        assert uploader.poll() is None
    uploader.send_signal(signal.SIGKILL)
    uploader.wait()
    assert uploads.object_name("8") not in store.sizes(), "it was too fast to be killed in the middle"
    assert test_mirror.newest_readable(store) == 4
    subprocess.run(command, cwd=TESTS.parent, check=True)
    assert test_mirror.newest_readable(store) == 8
    assert len(store.sizes("checkpoints/8")) == _FILES + len(test_mirror.content(8))


def test_a_server_that_is_gone_for_a_while_costs_nothing(bucket, server, tmp_path, capsys):
    store = run_store.open_store(Address(f"{bucket}/run"))
    made = mirror.Mirror(tmp_path, store)
    test_mirror.save(tmp_path, 4)
    made.once()
    port = server.get_host_and_port()[1]
    server.stop()
    test_mirror.save(tmp_path, 8)
    with pytest.raises(run_store.StoreError):
        made.once()
    server._port = port
    server._server_ready_event.clear()
    server.start()
    assert made.finish(patience_seconds=_DEADLINE_SECONDS)
    assert test_mirror.newest_readable(store) == 8
