"""Plans as text."""

import dataclasses

import pytest
from plan_cases import plan

from jaxdist.plan import device_sweep, search
from jaxdist.plan.showing import plan_text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (5 << 30, "5.00 GiB"), (2 << 40, "2.00 TiB")]
)
def test_sizes_have_binary_units(size, text):
    assert plan_text.size_text(size) == text


@pytest.mark.parametrize(("seconds", "text"), [(2.5, "2.5 s"), (0.02, "20 ms"), (3e-5, "30 us"), (4e-8, "40 ns")])
def test_durations_have_a_fitting_unit(seconds, text):
    assert plan_text.seconds_text(seconds) == text


def test_a_plan_fits_eighty_columns_and_says_whether_it_fits_the_device():
    _, made = plan()
    small = dataclasses.replace(made, device_memory=made.bytes.total - 1)
    exact = dataclasses.replace(made, device_memory=made.bytes.total)
    assert "DOES NOT FIT, 1 B too much" in plan_text.render(small)
    assert "fits, 0 B to spare" in plan_text.render(exact)
    assert "this machine's memory" in plan_text.render(dataclasses.replace(made, device_memory=None))
    assert max(map(len, plan_text.render(made).splitlines())) <= 80


@pytest.mark.parametrize(("price", "shown"), [(None, "7,200 steps: 2.00 h"), (3.5, "2.00 h, 7.00 at 3.5 an hour")])
def test_time_and_price_of_a_run_that_ends(price, shown):
    made = dataclasses.replace(plan()[1], steps=7200, bound_seconds={"compute": 1.0, "network": 0.5})
    text = plan_text.render(made, price_per_hour=price)
    assert shown in text
    assert "bound by compute: at most 16 examples/s" in text
    assert " at " not in text.splitlines()[-1] or price


def test_efficiency_is_that_of_the_first_row():
    made = dataclasses.replace(
        plan()[1], num_devices=2, global_batch_size=10, bound_seconds={"compute": 1.0, "memory": 0.1, "network": 0.2}
    )
    double = dataclasses.replace(
        made, num_devices=4, global_batch_size=20, bound_seconds={"compute": 1.0, "memory": 0.1, "network": 2.0}
    )
    _, first, second, *_, last = plan_text.render_sweep(device_sweep.rows([made, double])).splitlines()
    assert first.split()[-5:-1] == ["100%", *plan_text.size_text(made.bytes.total).split(), "compute"]
    assert second.split()[-5:-1] == ["50%", *plan_text.size_text(made.bytes.total).split(), "network"]
    assert last.startswith("step: gradients are sent once")


def test_a_search_names_the_best_or_says_that_nothing_fits():
    _, made = plan()
    good = search.Candidate(("strategy=fsdp", "num_microbatches=1"), made)
    large = search.Candidate(("strategy=fsdp", "num_microbatches=1"), dataclasses.replace(made, device_memory=1))
    refused = search.Candidate(("strategy=zero1", "num_microbatches=1"), None, "It does not divide.")
    best = plan_text.render_search([good, refused], ["jaxdist", "train", "x.py"]).splitlines()[-1]
    assert best == "Best: jaxdist train x.py --set strategy=fsdp num_microbatches=1"
    text = plan_text.render_search([large, refused], ["jaxdist", "train", "x.py"])
    assert "Nothing fits" in text
    for found in ([], [refused]):  # interrupted before the first was compiled; or none can be
        assert plan_text.render_search(found, ["jaxdist"]).endswith("Nothing was compiled, so nothing is known.")
    assert "refused: It does not divide." in text


def test_a_search_fits_eighty_columns_whatever_its_settings_are():
    settings = ("strategy=tensor", "mesh={'data': 128, 'model': 2}", "num_microbatches=8", "model.remat=True")
    found = [
        search.Candidate(settings, plan()[1]),
        search.Candidate(settings, None, "The reason is a long sentence. " * 4),
    ]
    rows = plan_text.render_search(found, ["jaxdist", "train", "x.py"]).splitlines()[:-1]
    assert max(map(len, rows)) <= 80
    assert all(setting in " ".join(rows) for setting in settings)


@pytest.mark.parametrize(
    ("hours", "text"), [(1234.5, "1,234.50 h"), (1, "1.00 h"), (0.5, "30.0 min"), (1 / 3600, "1 s"), (1e-6, "3.6 ms")]
)
def test_short_runs_are_not_zero_hours(hours, text):
    assert plan_text.hours_text(hours) == text


def test_lines_are_shown_relative_to_where_one_works_or_where_the_package_is(monkeypatch, tmp_path):
    inside = f"{plan_text.__file__}:7"
    monkeypatch.chdir(tmp_path)
    assert plan_text.short_line(f"{tmp_path}/mine.py:3") == "mine.py:3"
    assert plan_text.short_line(inside) == "jaxdist/plan/showing/plan_text.py:7"
    assert plan_text.short_line("/elsewhere/x.py:1") == "/elsewhere/x.py:1"
