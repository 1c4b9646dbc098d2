"""Ways to train, tried and ranked."""

import ast
import dataclasses
import math

import pytest
import tiny_experiment
from plan_cases import eight_devices, plan

from jaxdist import errors
from jaxdist.models import gpt
from jaxdist.plan import search
from jaxdist.plan.compiled import facts


def test_a_search_ranks_what_works_and_keeps_what_was_refused():
    said = []
    result = search.search(tiny_experiment.get_config(), eight_devices(), show=lambda *what: said.append(what))
    assert not result.interrupted
    found = result.candidates
    works = [each for each in found if each.works]
    assert found[: len(works)] == works
    assert [each.estimate.step_seconds for each in works] == sorted(each.estimate.step_seconds for each in works)
    ways = search.ways(8, None)
    assert said[-1][:2] == (len(ways), len(ways))
    assert {tuple(each for each in one.assignments if "num_microbatches" not in each) for one in found} == set(ways)
    assert {each.assignments[0] for each in works} == {f"strategy={name}" for name in search.STRATEGIES}
    assert all(each.refused for each in found if each.assignments[0] == "strategy=tensor"), "an MLP has no such rules"


def test_working_candidates_come_first_and_the_fastest_of_them():
    _, made = plan()

    def candidate(seconds, memory=1 << 40, refused=""):
        bounds = {"compute": seconds}
        estimate = dataclasses.replace(made, bound_seconds=bounds, device_memory=memory)
        return search.Candidate(("strategy=zero1", "num_microbatches=1"), None if refused else estimate, refused)

    fast, slow, large, refused = candidate(1.0), candidate(2.0), candidate(0.5, memory=1), candidate(0, refused="no")
    assert search.rank([refused, large, slow, fast]) == [fast, slow, large, refused]
    assert [each.works for each in (fast, slow, large, refused)] == [True, True, False, False]


def test_more_microbatches_are_tried_only_until_one_fits_and_only_for_memory(monkeypatch):
    _, made = plan()
    tried = []

    def estimate(experiment, topology):
        tried.append((experiment.strategy, experiment.num_microbatches))
        if experiment.strategy == "zero1":
            raise facts.TooLargeError("too large")
        if experiment.strategy == "tensor":
            raise errors.UserError("no rules")
        needs = made.bytes.total
        fits = experiment.strategy == "data-parallel" or experiment.num_microbatches >= 4
        return dataclasses.replace(made, device_memory=needs if fits else needs - 1)

    monkeypatch.setattr(search, "estimate", estimate)
    monkeypatch.setattr(search, "MODEL_AXES", (2,))
    found = search.search(tiny_experiment.get_config(), eight_devices(), show=lambda *what: None)
    assert sorted(tried) == [
        ("data-parallel", 1), *[("fsdp", count) for count in (1, 2, 4)], ("tensor", 1),
        *[("zero1", count) for count in (1, 2, 4, 8)],
    ]  # fmt: skip
    refused = [each.refused for each in found.candidates if each.estimate is None]
    assert sorted(refused) == ["no rules", *["too large"] * 4]


def test_an_interrupted_search_keeps_what_it_found(monkeypatch):
    _, made = plan()
    monkeypatch.setattr(search, "estimate", lambda experiment, topology: made)

    def show(done, total, what):
        raise KeyboardInterrupt

    found = search.search(tiny_experiment.get_config(), eight_devices(), show=show)
    assert found.interrupted
    assert 1 <= len(found.candidates) < len(search.ways(8, None))


def test_a_failure_of_the_search_is_not_an_answer(monkeypatch):
    def estimate(experiment, topology):
        raise RuntimeError("broken")

    monkeypatch.setattr(search, "estimate", estimate)
    with pytest.raises(RuntimeError, match="broken"):
        search.search(tiny_experiment.get_config(), eight_devices(), show=lambda *what: None)


def test_remat_is_tried_before_more_microbatches_where_the_model_has_it():
    experiment = tiny_experiment.get_config()
    assert search.savings(experiment)[:2] == [("num_microbatches=1",), ("num_microbatches=2",)]
    with_remat = dataclasses.replace(experiment, model=gpt.GPT(16, 8, num_layers=1, num_heads=1, width=8))
    expected = [("num_microbatches=1",), ("num_microbatches=1", "model.remat=True"), ("num_microbatches=2",)]
    assert search.savings(with_remat)[:3] == expected


@pytest.mark.parametrize(("devices", "host"), [(8, None), (16, None), (16, 4), (6, 4), (64, 8), (256, None), (1, None)])
@pytest.mark.parametrize("has_mesh", [False, True])
def test_every_mesh_has_all_devices(devices, host, has_mesh):
    for strategy, *mesh in search.ways(devices, host, has_mesh=has_mesh):
        axes = [ast.literal_eval(each.removeprefix("mesh=")) for each in mesh]
        assert all(each is None or math.prod(each.values()) == devices for each in axes), strategy
        assert axes or not has_mesh, "the mesh of the experiment would stay"
        assert has_mesh or None not in axes


@pytest.mark.parametrize(
    ("devices", "host", "fsdp"), [(8, None, []), (16, None, [8]), (16, 4, [4]), (6, 4, []), (4, 4, []), (64, 8, [8])]
)
def test_hsdp_shards_over_the_devices_of_a_host_where_there_are_several_whole_ones(devices, host, fsdp):
    meshes = [mesh for strategy, mesh in search.ways(devices, host, has_mesh=True) if strategy == "strategy=hsdp"]
    assert [ast.literal_eval(mesh.removeprefix("mesh="))["fsdp"] for mesh in meshes] == fsdp
