import dataclasses
import os
import pathlib
import signal
import threading
import uuid

import jax
import pytest
import tiny_experiment

import jaxdist
from jaxdist.errors import RunFailedError, UserError
from jaxdist.rundir import record
from jaxdist.rundir.remote import working_copy

pytestmark = [pytest.mark.usefixtures("shared_compilations"), pytest.mark.slow]


@pytest.fixture
def tiny():
    return dataclasses.replace(tiny_experiment.get_config(), stop=jaxdist.Stop(max_steps=4))


def train(experiment, *arguments, **options):
    return jaxdist.train(experiment, *arguments, devices=jax.devices()[:1], silent=True, **options)


def test_a_cell_that_is_run_twice_makes_two_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = train(tiny), train(tiny)
    assert (first.step, second.step) == (4, 4)
    assert first.run_dir.parent == pathlib.Path("runs")
    assert first.run_dir != second.run_dir
    assert first.predict(tiny.data.eval.arrays["image"]).shape == (tiny_experiment.NUM_HELD_OUT, 2)


def test_a_run_directory_that_is_used_says_what_to_do_in_python(tiny, tmp_path):
    train(tiny, tmp_path / "a")
    with pytest.raises(UserError, match=r"resume=True.*overwrite=True.*another run_dir"):
        train(tiny, tmp_path / "a")
    longer = dataclasses.replace(tiny, stop=jaxdist.Stop(max_steps=6))
    assert train(longer, tmp_path / "a", resume=True).step == 6
    assert train(tiny, tmp_path / "a", overwrite=True).step == 4
    with pytest.raises(UserError, match="got both"):
        train(tiny, tmp_path / "a", resume=True, overwrite=True)


def test_an_experiment_without_a_name_and_an_address_are_taken(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv(working_copy.FOLDER_VARIABLE, str(tmp_path))
    address = f"memory://{uuid.uuid4().hex}/run"
    run = train(dataclasses.replace(tiny, name=""), address)
    assert str(run.run_dir) == address
    assert jaxdist.load(address, experiment=run.experiment, devices=jax.devices()[:1]).step == 4


def test_what_cannot_be_trained_here_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="jaxdist train"):
        train(dataclasses.replace(tiny, strategy="parameter-server"), tmp_path)


@pytest.fixture
def interruptible():
    """A process in the background of a shell may have been started to ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_ends_the_run_with_a_checkpoint(tiny, tmp_path):
    def interrupt(info):
        if info.step == 2:
            signal.raise_signal(signal.SIGINT)

    run = train(dataclasses.replace(tiny, stop=jaxdist.Stop(max_steps=10**6), hooks=(interrupt,)), tmp_path)
    assert run.record.end_reason == "preempted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("own_handler", [False, True])
def test_a_signal_that_ends_programs_ends_the_script_when_the_run_is_saved(tiny, tmp_path, own_handler):
    def end(info):
        if info.step == 2:
            signal.raise_signal(signal.SIGTERM)

    handled = []
    before = signal.signal(signal.SIGTERM, (lambda *_: handled.append(1)) if own_handler else signal.SIG_DFL)
    experiment = dataclasses.replace(tiny, stop=jaxdist.Stop(max_steps=10**6), hooks=(end,))
    try:
        if own_handler:
            train(experiment, tmp_path)
        else:
            with pytest.raises(SystemExit) as left:
                train(experiment, tmp_path)
            assert left.value.code == 75
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(handled) == own_handler
    found = record.RunRecord.read(tmp_path)
    assert (found.end_reason, found.extra["checkpoint"] is not None) == ("preempted", True)


def test_another_thread_trains_without_signals(tiny, tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(tiny, tmp_path).step))
    thread.start()
    thread.join()
    assert found == [4]


def test_a_run_without_a_checkpoint_is_said_to_have_failed(tiny, tmp_path):
    bad = dataclasses.replace(tiny, optimizer=jaxdist.Optimizer(name="sgd", learning_rate=1e38))
    with pytest.raises(RunFailedError, match=r"ended as nonfinite.*before it saved"):
        train(bad, tmp_path)
    assert record.RunRecord.read(os.fspath(tmp_path)).end_reason == "nonfinite"
