"""`jaxdist join` and `jaxdist leave` without a job; tests/multiprocess/test_changing_processes.py has one."""

import pytest

from jaxdist.cli import main


@pytest.mark.parametrize("command", ["join", "leave"])
def test_a_run_that_does_not_run_is_the_users_mistake(tmp_path, capsys, command):
    assert main.run([command, str(tmp_path), "--processes", "2"]) == 2
    assert "Only a running job" in capsys.readouterr().err
