"""A process reads what another wrote, completely or not at all."""

import os
import time

import pytest

from jaxdist.launch.supervising import board


def test_a_report_is_read_back_and_an_absent_or_torn_one_is_none(tmp_path):
    assert board.read(tmp_path, 0) is None
    writer = board.ReportWriter(tmp_path, 0)
    writer.write(12, "checkpoint")
    writer.write(3, "eval")
    report = board.read(tmp_path, 0)
    assert (report.step, report.phase, report.beat) == (3, "eval", 2)
    assert abs(report.time - time.time()) < 3600.0
    writer.close()
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:10])
    assert board.read(tmp_path, 0) is None
    board.clear(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("jump", [-1e9, 0.0, 1e9])
def test_the_first_verdict_is_everybodys_and_that_of_an_earlier_attempt_nobodys(tmp_path, jump):
    """Whatever happens to the clock between the two attempts."""
    assert board.published(tmp_path) is None
    board.publish(tmp_path, {"text": "first"})
    board.publish(tmp_path, {"text": "second"})
    assert board.published(tmp_path) == {"text": "first"}
    path = tmp_path / "verdict.json"
    os.utime(path, (path.stat().st_mtime + jump,) * 2)
    earlier = board.mark(tmp_path)
    assert board.published(tmp_path, earlier=earlier) is None
    board.publish(tmp_path, {"text": "third"}, earlier=earlier)
    board.publish(tmp_path, {"text": "fourth"}, earlier=earlier)
    assert board.published(tmp_path, earlier=earlier) == {"text": "third"}
    assert len(list(tmp_path.iterdir())) == 1
    board.clear(tmp_path)
    assert board.published(tmp_path) is None
