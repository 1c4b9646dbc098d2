import gzip
import json
import types

import jax
import jax.numpy as jnp
import pytest
import tiny_experiment

from jaxdist.cli import main
from jaxdist.errors import UserError
from jaxdist.launch.joining import runtime
from jaxdist.run.diagnosis import profiling


@pytest.mark.parametrize("text", ["", "5", "5:", "7:5", "0:3", "a:b", "1:2:3", "-1:3"])
def test_what_names_no_steps_is_refused(text):
    with pytest.raises(UserError, match="such as 20:25"):
        profiling.steps_of(text)


def test_both_ends_are_traced():
    assert list(profiling.steps_of("4:6")) == [4, 5, 6]


def made(folder, steps, first, last):
    """Make the steps `first` to `last` under a trace of `steps`; return the steps that JAX traced, by number."""
    with profiling.Trace(steps, folder) as trace:
        trace.begin(first)
        for number in range(first, last + 1):
            with trace.step(number):
                state = jnp.sin(jnp.arange(4.0)).block_until_ready()
            trace(types.SimpleNamespace(step=number, state=state))
    files = list((folder / profiling.FOLDER).rglob("*.trace.json.gz"))
    if not files:
        return None
    [file] = files
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return sorted(int(event["args"]["step_num"]) for event in events if event.get("name") == "step")


@pytest.mark.parametrize(
    ("first", "last", "traced"),
    [(1, 9, [3, 4]), (4, 9, [4]), (1, 3, [3])],
    ids=["within", "resumed within", "ends early"],
)
def test_the_steps_asked_for_are_traced_and_no_others(tmp_path, first, last, traced):
    assert made(tmp_path, range(3, 5), first, last) == traced


def test_a_run_without_those_steps_says_so(tmp_path, capsys):
    assert made(tmp_path, range(3, 5), 5, 9) is None
    assert capsys.readouterr().err == "jaxdist: Nothing was traced: the run made no step of 3 to 4.\n"
    assert made(tmp_path, range(0), 1, 3) is None
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_traced(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "start", lambda num_devices, threads=None: jax.devices()[:num_devices])
    arguments = ["train", tiny_experiment.__file__, "--run-dir", str(tmp_path / "run"), "--json", "--profile", "2:3"]
    assert main.run([*arguments, "--devices", "2", "--max-steps", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 4
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["2"], "such as 20:25"),
        (["2:3", "--strategy", "parameter-server"], "with another --strategy"),
        (["11:12"], "it ends after 10, and the first to trace is 11"),
        (["11:12", "--processes", "2"], "it ends after 10, and the first to trace is 11"),
        (["4:5", "--fast-dev-run"], "it ends after 3, and the first to trace is 4"),
    ],
)
def test_a_trace_that_cannot_be_made_is_refused_before_the_run(tmp_path, capsys, monkeypatch, given, message):
    monkeypatch.setattr(runtime, "start", lambda num_devices, threads=None: jax.devices()[:num_devices])
    command = ["train", tiny_experiment.__file__, "--run-dir", str(tmp_path / "run"), "--profile", *given]
    assert main.run(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
