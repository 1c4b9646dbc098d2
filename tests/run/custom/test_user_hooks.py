"""The hooks of an experiment: when they are called, what they may keep, and how their errors are reported."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
import tiny_experiment
import trained_tiny

import jaxdist
from jaxdist import errors
from jaxdist.run.custom import user_hooks
from jaxdist.rundir import rich_values
from jaxdist.stop import Progress


class Recorder:
    """Keeps what it is given at every point."""

    every_steps = 3

    def __init__(self):
        self.seen = []

    def on_start(self, info):
        self.seen.append(("start", info.step, sorted(info.metrics)))

    def on_step(self, info):
        self.seen.append(("step", info.step, sorted(info.metrics)))

    def on_evaluation(self, info):
        self.seen.append(("evaluation", info.step, sorted(info.metrics)))

    def on_checkpoint(self, info):
        self.seen.append(("checkpoint", info.step, (info.run_dir / "checkpoints").exists()))

    def on_end(self, info):
        self.seen.append(("end", info.step, info.end_reason))


TRAIN, EVAL = ["train/accuracy", "train/grad_norm", "train/loss"], ["eval/accuracy", "eval/loss"]


def train(run_dir, *hooks):
    experiment = dataclasses.replace(tiny_experiment.get_config(), hooks=hooks, stop=jaxdist.Stop(max_steps=6))
    return trained_tiny.train(run_dir, experiment=experiment)


def test_hooks_are_called_at_each_point_and_what_they_keep_stays_as_it_was(tmp_path):
    recorder, kept, losses = Recorder(), {}, {}

    def keep(info):
        kept[info.step], losses[info.step] = info.params, info.metrics["train/loss"]
        info.log({"mine/twice": 2 * info.metrics["train/loss"]})

    made = train(tmp_path / "a", recorder, keep)
    assert recorder.seen == [
        ("start", 0, []),
        ("step", 3, TRAIN),
        ("evaluation", 4, EVAL),
        ("checkpoint", 4, True),
        ("step", 6, TRAIN),
        ("evaluation", 6, EVAL),
        ("checkpoint", 6, True),
        ("end", 6, "max_steps"),
    ]
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert [(row["train/loss"], row["mine/twice"]) for row in rows] == [(x, 2 * x) for x in losses.values()]
    assert "mine/twice" not in made.metrics

    without = train(tmp_path / "b")
    assert without.params_sha256 == made.params_sha256
    saved = jaxdist.load(tmp_path / "b", "last", experiment=tiny_experiment.get_config(), devices=jax.devices()[:1])
    jax.tree.map(np.testing.assert_array_equal, kept[6], jax.device_get(saved.params))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(kept[5]), jax.tree.leaves(kept[6]), strict=True))


def broken(info):
    return 1 / (info.step - 2)


def test_a_hook_that_raises_is_named_with_its_line_and_the_run_is_recorded(tmp_path):
    with pytest.raises(errors.UserError) as raised:
        train(tmp_path / "a", broken)
    message = str(raised.value)
    line = broken.__code__.co_firstlineno + 1
    assert message.startswith("The hook broken (")
    assert "failed in on_step after step 2: ZeroDivisionError: division by zero" in message
    assert f"test_user_hooks.py:{line}, in broken)" in message
    assert json.loads((tmp_path / "a" / "run.json").read_text())["end_reason"] == "error"


def make_info(*, step=6, written=None):
    return user_hooks.HookInfo(
        Progress(step=step),
        None,
        metrics=lambda: {"train/loss": 0.5},
        state=user_hooks.NO_STATE,
        write=lambda numbers, rich: [] if written is None else written.append((numbers, rich)),
    )


@pytest.mark.parametrize("left_by", [SystemExit(0), KeyboardInterrupt()])
def test_a_hook_that_exits_has_failed_and_does_not_end_the_run_with_a_status_of_its_own(left_by):
    def leaves(info):
        raise left_by

    with pytest.raises(errors.UserError, match=rf"The hook leaves \(.*after step 6: {type(left_by).__name__}"):
        user_hooks.UserHooks((leaves,), True).call("on_step", make_info)


def test_on_other_processes_only_the_hooks_that_ask_for_it_are_called():
    called = []

    class Everywhere:
        all_processes = True

        def on_step(self, info):
            called.append(info.step)

    hooks = (lambda info: called.append("first"), Everywhere())
    for is_first, expected in ((False, [6]), (True, ["first", 6])):
        called.clear()
        user_hooks.UserHooks(hooks, is_first).call("on_step", make_info)
        assert called == expected
    assert not user_hooks.UserHooks(hooks[:1], False).has("on_step")


def test_a_hook_is_called_at_the_multiples_of_its_interval():
    recorder = Recorder()
    hooks = user_hooks.UserHooks((recorder,), True)
    for step in range(1, 10):
        hooks.call("on_step", lambda step=step: make_info(step=step))
    assert [step for _, step, _ in recorder.seen] == [3, 6, 9]


def test_what_was_not_read_in_time_is_gone_with_a_message():
    info = make_info()
    assert info.metrics == {"train/loss": 0.5}
    info.close()
    assert info.metrics == {"train/loss": 0.5}
    for late in (lambda: info.params, lambda: info.log({"mine/x": 1})):
        with pytest.raises(ValueError, match="Read them in the hook"):
            late()


def test_the_params_of_a_step_on_servers_are_refused_with_where_to_read_them():
    with pytest.raises(ValueError, match="on_evaluation"):
        make_info().params  # noqa: B018


@pytest.mark.parametrize("name", ["step", "seconds", "train/loss", "eval/x"])
def test_a_metric_of_the_run_is_not_overwritten(name):
    written = []
    with pytest.raises(ValueError, match="a name that the run does not use"):
        make_info(written=written).log({"mine": 1, name: 2})
    assert written == []


def test_what_is_logged_becomes_numbers_and_images_stay(tmp_path):
    written, text = [], rich_values.Text("a text")
    make_info(written=written).log({"a": np.float32(0.5), "b": jax.numpy.ones(()), "c": math.nan, "d": text})
    assert str(written) == f"[({{'a': 0.5, 'b': 1.0, 'c': nan}}, {{'d': {text}}})]"


def test_an_image_that_no_writer_takes_is_refused(tmp_path):
    with pytest.raises(errors.UserError, match=r"need a writer that takes them; jsonl take numbers only"):
        train(tmp_path / "a", lambda info: info.log({"mine/text": rich_values.Text("a text")}))
