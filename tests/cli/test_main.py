import json
import os
import pathlib
import random
import shlex
import signal
import subprocess
import sys
import threading
import warnings

import held_experiment
import jax
import numpy as np
import pytest
import tiny_experiment

from jaxdist.cli import main
from jaxdist.launch import parent
from jaxdist.launch.joining import runtime

pytestmark = pytest.mark.usefixtures("shared_compilations")

TINY = str(pathlib.Path(tiny_experiment.__file__))


@pytest.fixture(autouse=True)
def on_the_test_devices(monkeypatch):
    """A command configures the devices of its process; here it gets those of this process."""
    monkeypatch.setattr(runtime, "start", lambda num_devices=None, threads=None: jax.devices()[: num_devices or 1])


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """For real processes: one compilation cache, which all of them share."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "2", **cache}


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_metrics(run_dir):
    """Return the rows, without their seconds, which are never the same."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("seconds") > 0 for row in rows)
    return rows


def test_training_prints_one_json_object_and_nothing_else(tmp_path, capsys):
    arguments = ["train", TINY, "--devices", "2", "--max-steps", "3", "--run-dir", str(tmp_path / "run"), "--json"]
    assert main.run(arguments) == 0
    shown = capsys.readouterr()
    made = json.loads(shown.out)
    assert shown.out.count("\n") == 1
    assert shown.err == ""
    assert made.pop("run_dir") == str(tmp_path / "run")
    assert made == json.loads((tmp_path / "run" / "run.json").read_text())
    assert (made["end_reason"], made["step"], made["num_devices"]) == ("max_steps", 3, 2)
    assert made["command"] == shlex.join(["jaxdist", *arguments])


def test_what_an_experiment_prints_keeps_out_of_the_json(tmp_path, capsys):
    experiment = tmp_path / "talking.py"
    experiment.write_text("import tiny_experiment\nprint('hello')\nget_config = tiny_experiment.get_config\n")
    arguments = ["train", str(experiment), "--max-steps", "1", "--run-dir", str(tmp_path / "run"), "--json"]
    assert main.run([*arguments, "--set", "writers=console"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["step"] == 1
    assert shown.err.startswith("hello\nstep 1 ")


def test_without_json_a_person_is_told_where_everything_lies(tmp_path, capsys):
    run_dir = tmp_path / "run"
    arguments = ["train", TINY, "--set", "seed=3", "stop.max_steps=2", "--set", "model.width=4"]
    assert main.run([*arguments, "--run-dir", str(run_dir)]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    for expected in (
        "end reason",
        "max_steps",
        "eval/accuracy",
        f"{run_dir}/run.json",
        f"{run_dir}/checkpoints (step 2)",
    ):
        assert expected in shown.err
    made = json.loads((run_dir / "run.json").read_text())
    assert (made["config"]["seed"], made["config"]["model"]["width"]) == (3, 4)


def test_the_short_options_are_overrides(tmp_path, capsys):
    arguments = ["--reduction", "canonical", "--strategy", "data-parallel", "--max-steps", "1", "--json"]
    assert main.run(["train", TINY, *arguments, "--run-dir", str(tmp_path / "run")]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["reduction"], made["strategy"], made["step"]) == ("canonical", "data-parallel", 1)


def test_the_default_directory_and_its_resume(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.run(["train", TINY, "--resume"]) == 2
    assert "no run of tiny to resume in runs/" in capsys.readouterr().err
    assert main.run(["train", TINY, "--max-steps", "1", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["run_dir"]
    assert main.run(["train", TINY, "--max-steps", "2", "--json", "--resume"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["run_dir"], again["step"], again["restarts"]) == (first, 2, 1)
    assert main.run(["train", TINY, "--max-steps", "2", "--json", "--resume"]) == 0
    assert "had ended at step 2 already (max_steps); nothing was trained." in capsys.readouterr().err


def test_a_resume_that_trains_nothing_leaves_what_the_record_says_of_the_training(tmp_path, capsys):
    run = ["train", TINY, "--max-steps", "2", "--json", "--run-dir", str(tmp_path / "run")]
    assert main.run([*run, "--reduction", "canonical", "--set", "stop.target=none"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main.run([*run, "--resume", "--set", "optimizer.learning_rate=0.5", "stop.target=none"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {name for name in first if first[name] != again[name]} <= {"restarts", "time_seconds", "changes"}
    assert again["restarts"] == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == {
        name: value for name, value in again.items() if name != "run_dir"
    }


def test_a_resume_that_makes_steps_again_does_not_say_that_it_trained_nothing(tmp_path, capsys):
    run = ["train", TINY, "--max-steps", "4", "--json", "--run-dir", str(tmp_path / "run")]
    run += ["--set", "checkpoints.every_steps=2", "stop.target=none"]
    made = []
    for more in ([], ["--resume", "--checkpoint", "2"], ["--resume"]):
        assert main.run([*run, *more]) == 0
        shown = capsys.readouterr()
        made.append(json.loads(shown.out))
        assert ("nothing was trained" in shown.err) == (more == ["--resume"])
    assert len({each["params_sha256"] for each in made}) == 1


def refused(capsys, match, *arguments):
    """Assert exit 2 and one clear message: no traceback, nothing on standard output."""
    assert main.run(["train", *map(str, arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("jaxdist: ")
    assert "Traceback" not in shown.err
    assert match in shown.err


def test_a_bad_experiment_file_is_the_users_mistake(tmp_path, capsys):
    run_dir = ["--run-dir", tmp_path / "run"]
    refused(capsys, "there is none", tmp_path / "absent.py", *run_dir)
    for text, message in {
        "def get_config(:": "cannot be loaded: SyntaxError",
        "1 / 0": "cannot be loaded: ZeroDivisionError: division by zero (",
        "x = 1": "defines get_config()",
        "def get_config(): return 3": "must return a jaxdist.Experiment",
        "def get_config(): return {}[3]": "get_config() of",
        "import sys; sys.exit(3)": "cannot be loaded: SystemExit: 3",
        "def get_config(): raise SystemExit": "failed: SystemExit",
    }.items():
        (tmp_path / "broken.py").write_text(text)
        refused(capsys, message, tmp_path / "broken.py", *run_dir)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("learning_rate=1", "Did you mean 'optimizer.learning_rate'?"),
        ("optimizer.learnig_rate=1", "Did you mean 'learning_rate'?"),
        ("seed=many", "seed takes a whole number; got 'many'"),
        ("optimizer=adam", "optimizer is a group of settings"),
        ("seed", "--set takes NAME=VALUE"),
        ("global_batch_size=15", "14 or 16"),
        ("strategy=magic", "There is no strategy 'magic'"),
        ("optimizer.momentum=2", "optimizer.momentum must be at least 0 and below 1"),
        ("log_every=0", "log_every must be at least 1"),
        ("stop.target_metric=eval/f1 stop.target=1", "which this experiment does not report"),
        ("inputs=pixels", "inputs must be fields of the batch"),
        ("global_batch_size=64", "global_batch_size is 64"),
    ],
)
def test_a_bad_setting_is_the_users_mistake(tmp_path, capsys, assignment, message):
    arguments = [TINY, "--devices", "2", "--run-dir", tmp_path / "run"]
    refused(capsys, message, *arguments, "--set", *assignment.split(" "))
    assert not (tmp_path / "run").exists()


def test_a_bad_run_directory_is_the_users_mistake_and_stays_as_it_was(tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main.run(["train", TINY, "--max-steps", "1", "--run-dir", str(run_dir), "--json"]) == 0
    (tmp_path / "file").write_text("a file")
    before = contents(tmp_path)
    capsys.readouterr()
    refused(
        capsys,
        "already holds a run. Continue it with --resume",
        TINY,
        "--run-dir",
        run_dir,
    )
    refused(capsys, "holds a run of another experiment", TINY, "--run-dir", run_dir, "--set", "name=other")
    refused(capsys, "holds a run of another experiment", TINY, "--run-dir", run_dir, "--resume", "--set", "seed=7")
    refused(capsys, "got both. Leave one out", TINY, "--run-dir", run_dir, "--overwrite", "--resume")
    refused(capsys, "'size'", TINY, "--run-dir", run_dir, "--overwrite", "--set", "inputs=size")
    refused(capsys, "--resume needs a run", TINY, "--run-dir", tmp_path / "absent", "--resume")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("file", "link"):
        refused(capsys, "is a file, or a link to nothing", TINY, "--run-dir", tmp_path / name)
    refused(capsys, "must be writable", TINY, "--run-dir", tmp_path / "file" / "run")
    refused(capsys, "must be writable", TINY, "--run-dir", "/proc/jaxdist")
    assert contents(tmp_path) == before


def test_a_loss_that_is_not_finite_fails(tmp_path, capsys):
    experiment = tmp_path / "diverging.py"
    experiment.write_text(
        "import tiny_experiment, dataclasses, jaxdist\n"
        "import numpy as np\n"
        "def get_config():\n"
        "    source = tiny_experiment.make_source(52, 0)\n"
        "    source.arrays['image'][:] = np.nan\n"
        "    made = tiny_experiment.get_config()\n"
        "    return dataclasses.replace(made, data=jaxdist.Data(train=source))\n"
    )
    assert main.run(["train", str(experiment), "--run-dir", str(tmp_path / "run"), "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["end_reason"] == "nonfinite"
    assert "Step 1: the loss is nan." in shown.err


def test_the_traceback_is_shown_when_it_is_asked_for(tmp_path, capsys):
    (tmp_path / "broken.py").write_text("1 / 0")
    for more, shown in (([], False), (["--traceback"], True)):
        assert main.run(["train", str(tmp_path / "broken.py"), *more]) == 2
        error = capsys.readouterr().err
        assert ("Traceback" in error) is shown
        assert error.splitlines()[-1].startswith("jaxdist: ")


def test_ctrl_c_is_one_line(capsys, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(main.parser, "find_handler", interrupted)
    assert main.run(["verify", TINY]) == 130
    assert capsys.readouterr().err == "jaxdist: Interrupted; nothing was left to save.\n"


def test_an_exit_in_the_middle_of_a_command_is_no_status_of_the_command(capsys, monkeypatch):
    monkeypatch.setattr(main.parser, "find_handler", lambda name: lambda options: sys.exit(0))
    assert main.run(["verify", TINY]) == 2
    assert "sys.exit() was called in the middle of a command: SystemExit: 0 (" in capsys.readouterr().err


def test_a_working_directory_that_was_removed_is_the_users_mistake(tmp_path, capsys, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main.run(["train", TINY, "--run-dir", str(tmp_path / "run")]) == 2
    assert "change to another" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_thread_that_keeps_the_process_alive_is_named(capsys):
    ended = threading.Event()
    held = threading.Thread(target=ended.wait, name="of-an-experiment")
    held.start()
    try:
        main.tell_what_holds()
    finally:
        ended.set()
        held.join()
    assert "of-an-experiment" in capsys.readouterr().err


# Real processes from here on.

NUM_STEPS, HELD_AT = 300, 280
LONG = ["--devices", "2", "--max-steps", str(NUM_STEPS), "--json"]
TELLING = ["--set", "writers=jsonl,console", "checkpoints.every_steps=25"]


def start(environment, run_dir, *arguments, go=None):
    """Start the run, which does not come to its end before the file `go` exists."""
    held = {held_experiment.AT: str(HELD_AT), held_experiment.GO: str(go)} if go else {}
    command = [sys.executable, "-m", "jaxdist.cli", "train", held_experiment.__file__, *LONG, *TELLING]
    return subprocess.Popen(
        [*command, "--run-dir", str(run_dir), *arguments],
        env=environment | held,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    """Return the exit status and the run record that was printed."""
    output, _ = process.communicate(timeout=200)
    records = [line for line in output.splitlines() if line.startswith("{")]
    assert len(records) == 1, output
    return process.returncode, records[0]


def wait_for(process, text):
    """Wait for a line that begins so."""
    for line in process.stdout:
        if line.startswith(text):
            return
    raise AssertionError(f"the run ended before it said {text}")


@pytest.fixture(scope="module")
def never_stopped(environment, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("never") / "run"
    status, printed = finish(start(environment, run_dir))
    assert status == 0
    return run_dir, json.loads(printed)


def assert_as_never_stopped(environment, run_dir, never_stopped):
    """Resume the run of `run_dir` in a new process; it must end as the one that was never stopped."""
    status, printed = finish(start(environment, run_dir, "--resume"))
    other_dir, expected = never_stopped
    made = json.loads(printed)
    assert status == 0
    for key in ("end_reason", "step", "examples_seen", "params_sha256", "metrics"):
        assert made[key] == expected[key]
    assert made["restarts"] == 1
    assert read_metrics(run_dir) == read_metrics(other_dir)


def test_sigterm_saves_and_exits_with_75_and_the_resumed_run_ends_the_same(environment, tmp_path, never_stopped):
    process = start(environment, tmp_path / "run", go=tmp_path / "go")
    wait_for(process, "step 40 ")
    process.send_signal(signal.SIGTERM)
    wait_for(process, "SIGTERM: Saving and stopping")
    (tmp_path / "go").touch()
    status, _ = finish(process)
    made = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (status, made["end_reason"]) == (75, "preempted")
    assert 40 <= made["step"] < NUM_STEPS
    assert (tmp_path / "run" / "checkpoints" / str(made["step"])).is_dir()
    assert_as_never_stopped(environment, tmp_path / "run", never_stopped)


def test_a_run_killed_at_a_random_moment_and_resumed_ends_the_same(environment, tmp_path, never_stopped):
    process = start(environment, tmp_path / "run", go=tmp_path / "go")
    wait_for(process, f"step {random.Random(os.getpid()).randrange(1, HELD_AT - 40)} ")
    process.kill()
    process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL
    made = json.loads((tmp_path / "run" / "run.json").read_text())
    assert made["end_reason"] is None
    assert_as_never_stopped(environment, tmp_path / "run", never_stopped)


def test_an_experiment_that_cannot_be_found_in_a_real_process(environment):
    done = subprocess.run(
        [sys.executable, "-m", "jaxdist.cli", "train", "no/such/file.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("jaxdist: An experiment is a Python file")


def test_the_metrics_of_a_run_are_finite(never_stopped):
    run_dir, made = never_stopped
    assert [row["step"] for row in read_metrics(run_dir)] == list(range(1, NUM_STEPS + 1))
    assert all(np.isfinite(value) for value in made["metrics"].values())


STARTED = """
import importlib, os, sys
from jaxdist.cli import __main__ as program
original = importlib.import_module

def importing(name):
    os.kill(os.getpid(), int(sys.argv[1]))
    return original(name)

importlib.import_module = importing
program.main()
"""


@pytest.mark.parametrize(
    ("number", "environment", "status", "said"),
    [
        (signal.SIGINT, {}, 130, "jaxdist: Interrupted; nothing was left to save.\n"),
        (signal.SIGTERM, {}, 75, "jaxdist: Interrupted; nothing was left to save.\n"),
        (signal.SIGTERM, {parent.PARENT_ID: "1"}, -signal.SIGTERM, ""),
    ],
)
def test_a_signal_during_the_first_imports_is_one_line(number, environment, status, said):
    """Of a process of a job the supervisor says what is to say."""
    command = [sys.executable, "-c", STARTED, str(int(number))]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, timeout=200, check=False
    )
    assert (done.returncode, done.stderr) == (status, said)


INTERRUPTED = """
import atexit, os, signal, sys
from jaxdist.cli import __main__ as program, parser

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

class Late:
    def __del__(self):  # of a global: when Python has given up its handlers
        interrupt()

def handler(options):
    if sys.argv[2] == "late":
        program.late = Late()
        return 0
    if sys.argv[2] == "after":
        atexit.register(interrupt)
        return 0
    try:
        interrupt()
    finally:
        print("cleaned up", flush=True)

parser.find_handler = lambda name: handler
sys.argv[1:] = ["runs", *sys.argv[1:]]
program.main()
"""


@pytest.mark.parametrize(
    ("when", "status", "cleaned"), [("during", 130, "cleaned up\n"), ("after", 130, ""), ("late", 0, "")]
)
def test_ctrl_c_during_a_command_lets_it_clean_up_and_later_never_ends_it_by_the_signal(when, status, cleaned):
    """The end of a process takes a while, too: a KeyboardInterrupt there would be lost, or end it by the signal."""
    command = [sys.executable, "-c", INTERRUPTED, when]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout) == (status, cleaned)
    assert done.stderr == ("jaxdist: Interrupted; nothing was left to save.\n" if status else "")


def test_a_warning_of_the_package_does_not_show_its_own_source():
    shown = [
        main._format_warning(warnings.formatwarning, "It is so.", UserWarning, file, 3)
        for file in (main.__file__, "a.py")
    ]
    assert shown == ["jaxdist: Warning: It is so.\n", "a.py:3: UserWarning: It is so.\n"]
