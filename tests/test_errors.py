"""Which errors become a user's message, and where it says they come from."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
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


def uncaught(code, *flags):
    """Run a script that ends with an error; return its exit status and what it has shown."""
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)
    return done.returncode, done.stderr


def test_a_mistake_that_no_one_catches_ends_a_script_with_its_message_and_status():
    start = "from jaxdist import errors\n"
    assert uncaught(f"{start}raise errors.ConfigError('Too few.')") == (2, "jaxdist: Too few.\n")
    assert uncaught(f"{start}raise errors.TryAgain('Later.')") == (75, "jaxdist: Later.\n")
    assert uncaught(f"{start}raise errors.RunFailedError('Full.')") == (1, "jaxdist: Full.\n")
    assert uncaught(f"{start}raise ValueError('other')")[0] == 1
    assert "Traceback" in uncaught(f"{start}raise ValueError('other')")[1]


def test_a_mistake_in_a_script_has_the_line_that_made_it(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("import jaxdist\n\njaxdist.Stop(steps=3)\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(f"Did you mean 'max_steps'? ({script}:3, in <module>)\n")


KEPT = []


def branches(x):
    return x if x > 0 else -x


def counts(x):
    return jnp.ones(int(x)).sum()


def uses_numpy(x):
    return np.asarray(x)


def indexes(x):
    return (x + jnp.arange(3.0))[x > jnp.arange(3)]


def leaks(x):
    KEPT.append(x + 1)
    return x + KEPT[0]


@pytest.mark.parametrize(
    ("function", "advice"),
    [
        (branches, "use jnp.where or jax.lax.cond. ("),
        (counts, "a number of Python cannot come from a value: use jax.numpy. ("),
        (uses_numpy, "NumPy cannot compute with their values"),
        (indexes, "use jnp.where in place of a boolean index"),
        (leaks, "has no meaning in the next: return it. ("),
    ],
)
def test_what_tracing_does_not_allow_is_told_in_a_line_with_the_users_own(function, advice):
    def trace():
        for value in (jnp.float32(1), jnp.int32(1)):
            jax.jit(function)(value)

    message = message_of(trace)
    assert advice in message
    assert "while tracing" not in message
    first = function.__code__.co_firstlineno
    assert message.endswith(f", in {function.__name__})")
    assert int(re.search(r":(\d+), in", message)[1]) in (first + 1, first + 2)


def test_what_a_callback_raises_in_a_compiled_program_is_a_line(capfd):
    def refuse(value):
        raise KeyError(f"no {float(value)}\n here")

    def step(x):
        jax.debug.callback(refuse, x)
        return x + 1

    def run():
        jax.block_until_ready(jax.jit(step)(jnp.ones(())))
        jax.effects_barrier()

    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        run()
    found = str(errors.of_callback(raised.value))
    assert re.fullmatch(r"A callback that the step calls failed: KeyError: .*no 1\.0.* here.*, in refuse\)", found)
    assert errors.of_callback(ValueError("Callback error calling callback")) is None
    capfd.readouterr()  # the traceback that JAX logs
