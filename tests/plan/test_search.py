"""Ways to train, tried and ranked."""

import dataclasses

import tiny_experiment
from plan_cases import eight_devices, plan

from jaxdist import errors
from jaxdist.plan import search


def test_a_search_ranks_what_works_and_keeps_what_was_refused():
    said = []
    found = search.search(tiny_experiment.get_config(), eight_devices(), show=said.append)
    works = [each for each in found if each.works]
    assert found[: len(works)] == works
    assert [each.estimate.step_seconds for each in works] == sorted(each.estimate.step_seconds for each in works)
    assert len(said) == len(found)
    assert {each.assignments[0] for each in works} == {f"strategy={name}" for name in search.STRATEGIES}


def test_working_candidates_come_first_and_the_fastest_of_them():
    _, made = plan()

    def candidate(seconds, memory=1 << 40, refused=""):
        bounds = {"compute": seconds}
        estimate = dataclasses.replace(made, bound_seconds=bounds, device_memory=memory)
        return search.Candidate(("strategy=zero1", "num_microbatches=1"), None if refused else estimate, refused)

    fast, slow, large, refused = candidate(1.0), candidate(2.0), candidate(0.5, memory=1), candidate(0, refused="no")
    assert search.rank([refused, large, slow, fast]) == [fast, slow, large, refused]
    assert [each.works for each in (fast, slow, large, refused)] == [True, True, False, False]


def test_more_microbatches_are_tried_only_until_one_fits(monkeypatch):
    _, made = plan()
    tried = []

    def estimate(experiment, topology):
        tried.append((experiment.strategy, experiment.num_microbatches))
        if experiment.strategy == "zero1":
            raise errors.UserError("no")
        needs = made.bytes.total
        fits = experiment.strategy == "data-parallel" or experiment.num_microbatches >= 4
        return dataclasses.replace(made, device_memory=needs if fits else needs - 1)

    monkeypatch.setattr(search, "estimate", estimate)
    found = search.search(tiny_experiment.get_config(), eight_devices(), show=lambda text: None)
    assert tried == [
        ("data-parallel", 1), *[("zero1", count) for count in (1, 2, 4, 8)], *[("fsdp", count) for count in (1, 2, 4)],
    ]  # fmt: skip
    assert [each.refused for each in found if each.estimate is None] == ["no"] * 4
