import pathlib
import types

import pytest

from jaxdist.errors import UserError
from jaxdist.rundir.chosen_checkpoint import chosen_step

BEST = types.SimpleNamespace(extra={"best": {"metric": "eval/loss", "value": 1.0, "step": 4}})
NO_BEST = types.SimpleNamespace(extra={})


@pytest.mark.parametrize(
    ("made", "checkpoint", "step"), [(BEST, "best", 4), (BEST, "last", 8), (NO_BEST, "best", 8), (BEST, 2, 2)]
)
def test_best_is_the_last_without_a_watched_metric(made, checkpoint, step):
    assert chosen_step(made, pathlib.Path("runs/a"), [2, 4, 8], checkpoint) == step


def test_a_missing_step_and_a_run_without_any_are_named():
    with pytest.raises(UserError, match=r"no checkpoint 3 .* steps 2, 4"):
        chosen_step(BEST, pathlib.Path("runs/a"), [2, 4], 3)
    with pytest.raises(UserError, match="ended before it saved one"):
        chosen_step(BEST, pathlib.Path("runs/a"), [], "best")
