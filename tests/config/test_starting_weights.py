"""The settings of the weights that a run begins with: what they may be, and how the command line gives them."""

import pathlib

import pytest
import tiny_experiment

import jaxdist
from jaxdist.config import overrides
from jaxdist.errors import ConfigError

REFUSED = {
    "a rule that does nothing": (lambda: jaxdist.WeightRule(pattern="a"), "does nothing"),
    "a rule that does both": (lambda: jaxdist.WeightRule(pattern="a", to="b", leave_out=True), "does both"),
    "a pattern that is none": (lambda: jaxdist.WeightRule(pattern="(", leave_out=True), "must be a regular expression"),
    "a fresh that is none": (lambda: jaxdist.InitFrom(path="x", fresh=("[",)), "must be a regular expression"),
    "an empty path": (lambda: jaxdist.InitFrom(path=""), "names a run directory or a file"),
    "an unknown name": (lambda: jaxdist.InitFrom(path="x", names="torch"), "one of jaxdist, hugging-face"),
    "a checkpoint that is none": (lambda: jaxdist.InitFrom(path="x", checkpoint="first"), "got 'first'"),
    "a function that is none": (lambda: jaxdist.WeightRule(pattern="a", function=3), "takes a function"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(make, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        make()


def test_the_command_line_names_a_path_and_changes_single_settings():
    experiment = tiny_experiment.get_config()
    assert experiment.init_from is None
    begun = overrides.override(experiment, ["init_from=runs/a"])
    assert begun.init_from == jaxdist.InitFrom(path="runs/a")
    changed = overrides.override(begun, ["init_from.checkpoint=40", "init_from.fresh=head,norm"])
    assert changed.init_from == jaxdist.InitFrom(path="runs/a", checkpoint=40, fresh=("head", "norm"))
    assert overrides.override(begun, ["init_from.checkpoint=last"]).init_from.checkpoint == "last"
    assert overrides.override(changed, ["init_from=runs/b"]).init_from == jaxdist.InitFrom(path="runs/b")
    assert overrides.override(changed, ["init_from=none"]).init_from is None


def test_a_path_object_and_one_pattern_are_taken():
    assert jaxdist.InitFrom(path=pathlib.Path("a/b"), fresh="head") == jaxdist.InitFrom(path="a/b", fresh=("head",))
