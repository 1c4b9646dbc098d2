"""The hook that records hashes: some steps late, on the first process, and it tells of steps made with other bits."""

import itertools
import json
import types

import jax
import jax.numpy as jnp
import pytest
import tiny_experiment

from jaxdist.config import overrides
from jaxdist.run import components
from jaxdist.run.loop import LOOK_EVERY
from jaxdist.run.replay import recording, step_chain
from jaxdist.rundir import record
from jaxdist.spmd.step import STEP_HASHES


class Recorder:
    """Keeps what it is given; every step in `unequal` had other bits before."""

    def __init__(self, unequal=()):
        self.added, self.ended, self.unequal = [], None, unequal

    def add(self, first_step, hashes):
        steps = range(first_step, first_step + len(hashes))
        self.added += [(step, int(row[0])) for step, row in zip(steps, hashes, strict=True)]
        return [step_chain.Difference(step, (1,), ()) for step in steps if step in self.unequal]

    def cut(self, step):
        self.ended = step


def call(hook, steps):
    for step in steps:
        hook(types.SimpleNamespace(step=step, metrics={STEP_HASHES: jnp.full(2, step, jnp.uint32)}))


@pytest.mark.parametrize(("seconds", "first"), [(0.0, 64), (1.0, LOOK_EVERY)])
def test_hashes_are_read_many_at_once_or_after_a_second_and_all_of_them_at_the_end(seconds, first):
    recorder, times = Recorder(), itertools.chain([0.0], itertools.repeat(seconds))
    hook = recording.ChainRecorder(recorder, clock=lambda: next(times))
    call(hook, range(1, first + LOOK_EVERY))
    assert recorder.added == []
    call(hook, [first + LOOK_EVERY])  # the newest may not be computed
    assert recorder.added == [(step, step) for step in range(1, first + 1)]
    hook.finish(first)
    assert [step for step, _ in recorder.added] == list(range(1, first + LOOK_EVERY + 1))
    assert recorder.ended == first  # a later step was not finite, for example


def test_a_step_with_other_bits_is_told_and_recorded_beside_those_of_earlier_attempts(capsys):
    earlier = {"unequal": [{"step": 2, "shards": [0], "leaves": []}]}
    hook = recording.ChainRecorder(Recorder(unequal=(7,)), earlier)
    call(hook, [6, 7])
    hook.flush()
    assert "step 7: logical shard 1" in capsys.readouterr().err
    assert [found["step"] for found in hook.summary()["unequal"]] == [2, 7]


def test_many_unequal_steps_are_told_a_few_times(capsys):
    hook = recording.ChainRecorder(Recorder(unequal=range(500)))
    call(hook, range(1, 200))
    hook.flush()
    assert capsys.readouterr().err.count("must have the same bits") == 3
    assert len(hook.summary()["unequal"]) == 100


def test_other_processes_record_nothing():
    hook = recording.ChainRecorder(None)
    call(hook, range(1, 20))
    hook.finish(19)
    assert hook.summary()["unequal"] == []


def test_the_file_of_a_run_is_closed_with_what_was_recorded(tmp_path):
    form = step_chain.Form(2, ("grads/w", "loss and metrics", "params/w"))
    with recording.recorded(tmp_path, form, step=0, compares=False, earlier=None) as hook:
        hook(types.SimpleNamespace(step=1, metrics={STEP_HASHES: jnp.arange(5, dtype=jnp.uint32)}))
        hook.finish(1)
    found = step_chain.read(tmp_path)
    assert found.form == form
    assert found.entry(1)["shards"].tolist() == [0, 1]


@pytest.mark.parametrize("reduction", ["mean", "canonical"])
def test_a_resumed_run_tells_that_settings_of_jax_have_changed(tmp_path, capsys, reduction):
    experiment = overrides.override(tiny_experiment.get_config(), [f"reduction={reduction}"])
    parts = components.put_together(experiment, devices=jax.devices()[:1])
    settings = record.jax_settings() | {"jax_enable_x64": "True"}
    config = json.loads(json.dumps(record.plain(experiment)))
    earlier = types.SimpleNamespace(versions=record.versions(), extra={"jax_settings": settings}, config=config)
    with recording.recorder_of(parts, tmp_path, step=3, earlier=earlier):
        pass
    said = capsys.readouterr().err
    assert "jax_enable_x64 True -> False" in said
    assert "rom step 4 on" in said
    earlier.extra = {"jax_settings": record.jax_settings()}
    with recording.recorder_of(parts, tmp_path, step=3, earlier=earlier):
        pass
    assert capsys.readouterr().err == ""
