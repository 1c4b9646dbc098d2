"""Proposals of Optuna itself: inside the ranges, better than chance, and continued after a restart."""

import math

import pytest

from jaxdist import errors, extras
from jaxdist.run.sweeps import optuna_proposals, space

SETTINGS = space.parse(["rate=1e-5:1:log", "width=4:64", "name=a,b"])


def loss(settings):
    """Return a loss that is least at the rate 1e-2 and the name b."""
    distance = abs(math.log10(float(settings["rate"])) + 2)
    return distance + (settings["name"] == "a")


def test_proposals_are_in_the_ranges_and_become_better():
    proposals = optuna_proposals.OptunaProposals(SETTINGS, "min", seed=0)
    losses = []
    for _ in range(40):
        settings = proposals.propose()
        assert list(settings) == ["rate", "width", "name"]
        assert 1e-5 <= float(settings["rate"]) <= 1
        assert 4 <= int(settings["width"]) <= 64
        losses.append(loss(settings))
        proposals.tell(settings, losses[-1])
    assert sorted(losses[-20:])[10] < sorted(losses[:10])[5]


def test_a_study_that_is_told_again_continues_and_does_not_repeat():
    first = optuna_proposals.OptunaProposals(SETTINGS, "max", seed=0)
    known = [first.propose() for _ in range(3)]
    again = optuna_proposals.OptunaProposals(SETTINGS, "max", seed=0, known=3)
    for number, settings in enumerate(known):
        again.tell(settings, None if number == 1 else 0.5 + number)
    assert again.propose() not in known
    assert again._study.best_value == 2.5
    assert [trial.state.name for trial in again._study.trials[:3]] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_without_optuna_the_message_names_the_extra(monkeypatch):
    def missing(module, *, extra):
        raise extras.MissingExtra(f"{module} is not installed, it comes with the extra {extra!r}.")

    monkeypatch.setattr(extras, "require", missing)
    with pytest.raises(errors.UserError, match="extra 'sweep'"):
        optuna_proposals.OptunaProposals(SETTINGS, "min", seed=0)
