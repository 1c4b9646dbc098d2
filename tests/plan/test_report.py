"""Plans as text."""

import dataclasses

import pytest
from plan_cases import plan

from jaxdist.plan import report, search


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (5 << 30, "5.00 GiB"), (2 << 40, "2.00 TiB")]
)
def test_sizes_have_binary_units(size, text):
    assert report.size_text(size) == text


@pytest.mark.parametrize(("seconds", "text"), [(2.5, "2.5 s"), (0.02, "20 ms"), (3e-5, "30 us"), (4e-8, "40 ns")])
def test_durations_have_a_fitting_unit(seconds, text):
    assert report.seconds_text(seconds) == text


def test_a_plan_fits_eighty_columns_and_says_whether_it_fits_the_device():
    _, made = plan()
    small = dataclasses.replace(made, device_memory=made.bytes.total - 1)
    exact = dataclasses.replace(made, device_memory=made.bytes.total)
    assert "DOES NOT FIT, 1 B too much" in report.render(small)
    assert "fits, 0 B to spare" in report.render(exact)
    assert "this machine's memory" in report.render(dataclasses.replace(made, device_memory=None))
    assert max(map(len, report.render(made).splitlines())) <= 80


@pytest.mark.parametrize(("price", "shown"), [(None, "7,200 steps: 2.00 h"), (3.5, "2.00 h, 7.00 at 3.5 an hour")])
def test_time_and_price_of_a_run_that_ends(price, shown):
    made = dataclasses.replace(plan()[1], steps=7200, bound_seconds={"compute": 1.0, "network": 0.5})
    text = report.render(made, price_per_hour=price)
    assert shown in text
    assert "bound by compute: at most 16 examples/s" in text
    assert " at " not in text.splitlines()[-1] or price


def test_efficiency_is_that_of_the_first_row():
    made = dataclasses.replace(plan()[1], num_devices=2, global_batch_size=10, bound_seconds={"compute": 1.0})
    double = dataclasses.replace(made, num_devices=4, global_batch_size=20, bound_seconds={"network": 2.0})
    _, first, second = report.render_sweep([made, double]).splitlines()
    assert first.split()[-4:] == ["100%", *report.size_text(made.bytes.total).split(), "compute"]
    assert second.split()[-4:] == ["50%", *report.size_text(made.bytes.total).split(), "network"]


def test_a_search_names_the_best_or_says_that_nothing_fits():
    _, made = plan()
    good = search.Candidate(("strategy=fsdp", "num_microbatches=1"), made)
    large = search.Candidate(("strategy=fsdp", "num_microbatches=1"), dataclasses.replace(made, device_memory=1))
    refused = search.Candidate(("strategy=zero1", "num_microbatches=1"), None, "It does not divide.")
    assert report.render_search([good, refused]).splitlines()[-1] == "Best: --set strategy=fsdp num_microbatches=1"
    text = report.render_search([large, refused])
    assert "Nothing fits" in text
    assert "refused: It does not divide." in text
