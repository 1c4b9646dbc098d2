"""What each strategy holds and sends, read off the compiled step: the bounds, the textbook, and the table of the docs.

The table takes the programs of six rows, most of two minutes to compile, so it is checked by the soak.
"""

import importlib.util
import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "layouts.md"


@pytest.fixture(scope="module")
def communication():
    spec = importlib.util.spec_from_file_location("communication", ROOT / "benchmarks" / "communication.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_bounds(measured):
    whole, zero1, fsdp = (measured[name] for name in ("data-parallel", "zero1", "fsdp"))
    assert zero1["opt_state_bytes"] <= (1 / 8 + 0.02) * whole["opt_state_bytes"]
    assert whole["argument_bytes"] - zero1["argument_bytes"] >= (7 / 8 - 0.02) * whole["opt_state_bytes"]
    assert fsdp["argument_bytes"] <= (1 / 8 + 0.05) * whole["argument_bytes"]
    for name, row in measured.items():
        assert row["ratio"] == pytest.approx(1, rel=0.05), name
    assert set(whole["collectives"]) == {"all-reduce"}
    assert {"all-gather", "reduce-scatter"} <= set(zero1["collectives"]) & set(fsdp["collectives"])


@pytest.mark.slow
def test_memory_and_traffic_keep_their_bounds(communication):
    cases = (case for case in communication.CASES if str(case) in ("data-parallel", "zero1", "fsdp"))
    check_bounds({str(case): communication.row(case) for case in cases})


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_every_row_keeps_its_bounds_and_the_docs_show_it(communication):
    measured = {row["name"].removeprefix("communication/"): row for row in communication.rows()}
    check_bounds(measured)
    whole, remat = measured["data-parallel"], measured["data-parallel, remat"]
    assert remat["temporary_bytes"] < 0.9 * whole["temporary_bytes"]
    (tensor,) = [row for name, row in measured.items() if name.startswith("tensor")]
    assert set(tensor["collectives"]) == {"all-reduce"}, "column, then row: nothing moves inside a branch"
    check_page(communication, PAGE.read_text())


def check_page(communication, page):
    """Where this fails, make the table anew: python benchmarks/communication.py --docs docs/layouts.md"""
    made = communication.page_with(communication.rows(), page)
    if f"jax {jax.__version__}," in page:
        assert page == made
    else:  # Another version makes other temporaries and merges other collectives; the rest stays.
        assert lasting_figures(page) == [pytest.approx(row, rel=0.05) for row in lasting_figures(made)]


def lasting_figures(page):
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| `", line)]
    return [[float(row[column]) for column in (1, 2, 3, 5, 6)] for row in rows if len(row) == 8]
