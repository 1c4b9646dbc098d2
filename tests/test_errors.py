"""Which errors become a user's message, and where it says they come from."""

import numpy as np
import pytest

from jaxdist import errors
from jaxdist.data import ArraySource


def raises(error):
    raise error


def message_of(function):
    with pytest.raises(errors.UserError) as raised, errors.as_user_error():
        function()
    return str(raised.value)


def test_what_the_users_code_raises_is_told_with_file_line_and_function():
    line = raises.__code__.co_firstlineno + 1
    assert message_of(lambda: raises(TypeError("no"))).endswith(f"TypeError: no ({_here()}:{line}, in raises)")
    assert message_of(lambda: raises(KeyError("x"))).startswith("KeyError: 'x' (")
    assert message_of(lambda: raises(RuntimeError())).startswith("RuntimeError (")


def _here():
    return min(__file__, errors.os.path.relpath(__file__), key=len)


def test_the_line_is_the_users_where_a_library_raises_below_it():
    line = _multiplies.__code__.co_firstlineno + 1
    assert f"{_here()}:{line}, in _multiplies" in message_of(_multiplies)


def _multiplies():
    return np.ones(3) @ np.ones(4)


def test_a_rule_of_the_package_needs_no_place():
    with pytest.raises(errors.UserError) as raised, errors.as_user_error():
        _ArrayCheck.call()
    assert "at least one array" in str(raised.value)


class _ArrayCheck:
    call = staticmethod(lambda: ArraySource({}))


def test_errors_that_are_the_users_already_pass_through_unchanged():
    for error in (errors.ConfigError("a"), errors.TryAgain("b"), errors.RunFailedError("c")):
        with pytest.raises(type(error)) as raised, errors.as_user_error():
            raises(error)
        assert raised.value is error


def test_each_error_has_the_status_of_its_contract():
    statuses = {errors.UserError: 2, errors.ConfigError: 2, errors.TryAgain: 75, errors.RunFailedError: 1}
    assert {kind: int(kind.exit_status) for kind in statuses} == statuses
