"""Optional packages: imported where they are there, named with their extra where they are not."""

import math
import tomllib
from pathlib import Path

import pytest

from jaxdist import extras
from jaxdist.cli.commands import doctor_command


def test_a_package_that_is_there_is_imported():
    assert extras.require("math") is math


def test_a_missing_package_names_its_extra():
    with pytest.raises(extras.MissingExtra, match=r"pip install 'jaxdist\[data\]'"):
        extras.require("no_such_package_here")


def test_an_error_inside_a_package_is_its_own(tmp_path, monkeypatch):
    """Only a package that is missing is taken for one."""
    (tmp_path / "broken_package.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        extras.require("broken_package")


def test_the_extras_that_doctor_looks_for_are_those_of_the_package():
    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(doctor_command.EXTRAS) <= set(declared["optional-dependencies"])
