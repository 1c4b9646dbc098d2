"""Processes forked from one that has done the imports: like those started afresh, and the caller's own children."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time

import pytest

from jaxdist.launch.supervising import fork_server

SHOW = """
import gc, json, os, sys
import numpy as np
print(json.dumps({
    "name": __name__, "argv": sys.argv[1:], "said": os.environ.get("SAID"), "parent": os.getppid(),
    "leader": os.getsid(0) == os.getpid(), "preloaded": "colorsys" in sys.modules,
    "random": int(np.random.randint(1 << 30)), "frozen": gc.get_freeze_count() > 0,
}))
sys.exit(3)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return the command of a module that the test writes."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def write(code, *arguments):
        (tmp_path / "born.py").write_text(code)
        return [sys.executable, "-m", "born", *arguments]

    return write


def start(server, command, path, **environment):
    with open(path, "wb") as output:
        child = server.start(command, {**os.environ, **environment}, output)
    assert child is not None
    return child


def test_a_child_is_like_a_process_started_afresh_minus_the_imports(module, tmp_path):
    with contextlib.closing(fork_server.ForkServer(["colorsys"])) as server:
        command = module(SHOW, "a", "b")
        children = [start(server, command, tmp_path / name, SAID=name) for name in ("first", "second")]
        assert [child.wait(timeout=200) for child in children] == [3, 3]
        assert [child.poll() for child in children] == [3, 3]
    said = [json.loads((tmp_path / name).read_text()) for name in ("first", "second")]
    assert said[0].pop("random") != said[1].pop("random")
    common = {"name": "__main__", "argv": ["a", "b"], "parent": os.getpid(), "leader": True}
    common |= {"preloaded": True, "frozen": True}
    assert said == [common | {"said": "first"}, common | {"said": "second"}]


def test_what_is_prepared_is_there_in_every_child(module, tmp_path):
    (tmp_path / "prepared.py").write_text("made = []\ndef prepare():\n    made.append(1)\n")
    command = module("import prepared, sys\nsys.exit(5 + len(prepared.made))\n")
    with contextlib.closing(fork_server.ForkServer(["prepared:prepare"])) as server:
        children = [start(server, command, tmp_path / name) for name in ("first", "second")]
        assert [child.wait(timeout=200) for child in children] == [6, 6]


def test_a_child_can_be_killed_and_outlives_the_fork_server(module, tmp_path):
    with contextlib.closing(fork_server.ForkServer()) as server:
        child = start(server, module("import threading; threading.Event().wait()"), tmp_path / "log")
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(timeout=0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait(timeout=200) == -signal.SIGKILL
    child.send_signal(signal.SIGTERM)  # it has ended: nothing happens


STARTS_A_THREAD = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"


@pytest.mark.parametrize("code", [STARTS_A_THREAD, "import jax; jax.devices()"])
def test_what_has_threads_is_not_forked(module, tmp_path, code):
    (tmp_path / "experiment.py").write_text(code)
    with contextlib.closing(fork_server.ForkServer(experiment=str(tmp_path / "experiment.py"))) as server:
        assert server.start(module(SHOW), os.environ, None) is None
        assert server.start(module(SHOW), os.environ, None) is None


def test_an_experiment_that_fails_is_left_to_the_process_that_trains_it(module, tmp_path):
    (tmp_path / "experiment.py").write_text("import colorsys, missing_module")
    with contextlib.closing(fork_server.ForkServer(experiment=str(tmp_path / "experiment.py"))) as server:
        assert (
            start(server, module("import sys; sys.exit('colorsys' not in sys.modules)"), tmp_path / "log").wait() == 0
        )


def test_a_fork_server_that_was_killed_starts_nothing(module):
    with contextlib.closing(fork_server.ForkServer()) as server:
        os.killpg(server._process.pid, signal.SIGKILL)
        server._process.wait()
        assert server.start(module(SHOW), os.environ, None) is None


def test_a_fork_server_that_is_stopped_is_not_waited_for(module):
    with contextlib.closing(fork_server.ForkServer()) as server:
        os.kill(server._process.pid, signal.SIGSTOP)
        begin = time.monotonic()
        assert server.start(module(SHOW), os.environ, None) is None
        assert time.monotonic() - begin < 200.0
        assert server._process.wait(timeout=200) == -signal.SIGKILL


def test_a_signal_to_the_whole_group_ends_the_children_and_not_the_fork_server(module, tmp_path):
    with contextlib.closing(fork_server.ForkServer()) as server:
        command = module("import threading; print('ready', flush=True); threading.Event().wait()")
        child = start(server, command, tmp_path / "log")
        while "ready" not in (tmp_path / "log").read_text():
            time.sleep(0.01)
        for process_id in (server._process.pid, child.pid):
            os.kill(process_id, signal.SIGTERM)
        assert child.wait(timeout=200) == -signal.SIGTERM
        assert start(server, module("import sys; sys.exit(7)"), tmp_path / "log").wait(timeout=200) == 7


OWNER = """
import os, pathlib, signal, sys
from jaxdist.launch.supervising import fork_server
server = fork_server.ForkServer()
server.run_at_end("born", "rescue", sys.argv[2])
with open(sys.argv[1], "wb") as output:
    child = server.start([sys.executable, "-m", "born"], os.environ | {"JAXDIST_PARENT_ID": str(os.getpid())}, output)
print(server._process.pid, child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_outlives_an_owner_that_is_killed(module, tmp_path):
    module(
        "import os, sys, threading; from jaxdist.launch import parent\n"
        "if sys.argv[1:2] == ['rescue']: sys.exit(os.rmdir(sys.argv[2]))\n"
        "parent.die_with_parent(); threading.Event().wait()"
    )
    command = [sys.executable, "-c", OWNER, str(tmp_path / "log"), str(tmp_path / "doomed")]
    (tmp_path / "doomed").mkdir()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=200)
    for process_id in map(int, done.stdout.split()):
        with contextlib.suppress(ProcessLookupError):
            # These are not children of this process; a process descriptor can be waited for all the same.
            descriptor = os.pidfd_open(process_id)
            assert select.select([descriptor], [], [], 200)[0]
            os.close(descriptor)
    assert not (tmp_path / "doomed").exists()


SHOW_LOADED = "import sys; print('wave' in sys.modules, 'threading_starter' in sys.modules)"


def loaded(server, module, tmp_path):
    assert start(server, module(SHOW_LOADED), tmp_path / "log").wait(timeout=200) == 0
    return (tmp_path / "log").read_text().strip()


def test_what_children_import_is_imported_for_the_next(module, tmp_path):
    (tmp_path / "threading_starter.py").touch()
    (tmp_path / "names").write_text("wave\nno.such.module\nthreading_starter\n")
    with contextlib.closing(fork_server.ForkServer()) as server:
        server.preload(tmp_path / "names")
        while loaded(server, module, tmp_path) != "True True":
            pass


def test_what_starts_threads_is_not_imported_for_the_next(module, tmp_path):
    (tmp_path / "threading_starter.py").write_text(STARTS_A_THREAD)
    (tmp_path / "tried.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'found')!r}).touch()")
    (tmp_path / "names").write_text("wave\nthreading_starter\ntried\n")
    with contextlib.closing(fork_server.ForkServer()) as server:
        server.preload(tmp_path / "names")
        while not (tmp_path / "found").exists():
            assert loaded(server, module, tmp_path) == "False False"
        assert {loaded(server, module, tmp_path) for _ in range(3)} == {"False False"}


def test_a_process_is_started_while_such_imports_are_tried(module, tmp_path):
    """They take minutes where the processes that train take all the time: a restart must not wait for them."""
    os.mkfifo(tmp_path / "gate")
    code = f"import pathlib; folder = pathlib.Path({str(tmp_path)!r})\n"
    code += "if not (folder / 'go').exists(): (folder / 'trying').touch(); (folder / 'gate').read_text()"
    (tmp_path / "threading_starter.py").write_text(code)
    (tmp_path / "names").write_text("wave\nthreading_starter\n")
    with contextlib.closing(fork_server.ForkServer()) as server:
        server.preload(tmp_path / "names")
        while not (tmp_path / "trying").exists():
            pass
        assert loaded(server, module, tmp_path) == "False False"
        (tmp_path / "go").touch()
        (tmp_path / "gate").write_text("")
        while loaded(server, module, tmp_path) != "True True":
            pass


def test_a_file_of_names_that_is_gone_harms_nothing(module, tmp_path):
    with contextlib.closing(fork_server.ForkServer()) as server:
        server.preload(tmp_path / "gone")
        assert start(server, module(SHOW_LOADED), tmp_path / "log").wait(timeout=200) == 0
