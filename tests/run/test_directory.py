import datetime
import re
import types

import pytest

from jaxdist import errors
from jaxdist.run import directory


def test_the_default_run_dir_is_the_newest_when_resuming(tmp_path):
    assert re.fullmatch(r"tiny-\d{8}-\d{6}-\d{6}", directory.default_run_dir("tiny", resume=False, root=tmp_path).name)
    with pytest.raises(errors.UserError, match="no run of tiny to resume"):
        directory.default_run_dir("tiny", resume=True, root=tmp_path)
    for name in ("tiny-20260101-000000", "tiny-20270101-000000", "tiny-other-20280101-000000"):
        (tmp_path / name).mkdir()
    assert directory.default_run_dir("tiny", resume=True, root=tmp_path).name == "tiny-20270101-000000"


def test_two_runs_of_one_second_have_names_of_their_own_in_the_order_of_their_start(tmp_path):
    times = [datetime.datetime(2026, 11, 28, 12, 0, 0, microseconds) for microseconds in (7, 90, 1000)]
    names = [directory.default_run_dir("tiny", resume=False, root=tmp_path, now=lambda t=t: t).name for t in times]
    assert sorted(set(names)) == names


@pytest.mark.parametrize(("recorded", "step", "told"), [(6, 4, True), (6, 6, False), (6, 9, False), (None, 4, False)])
def test_a_newer_checkpoint_that_is_gone_is_named(tmp_path, capsys, recorded, step, told):
    earlier = types.SimpleNamespace(extra={"checkpoint": recorded})
    directory.tell_what_is_gone(earlier, tmp_path, step)
    said = f"names a checkpoint of step {recorded}, which is gone; training continues from step {step}."
    assert (said in capsys.readouterr().err) == told
