"""The run that the tests of attempts compare with."""

import pytest
from tiny_runs import run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run of 10 steps that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run(run_dir)
    return run_dir
