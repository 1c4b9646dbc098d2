"""What is kept of a compiled program, and the cache of it."""

import jax
import jax.numpy as jnp
import pytest

from jaxdist.errors import UserError
from jaxdist.plan.compiled import facts


@pytest.fixture
def lowered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return jax.jit(lambda x: (x @ x).sum()).lower(jax.ShapeDtypeStruct((32, 32), jnp.float32))


class NotCompiled:
    """A lowered program that may be read, but not compiled."""

    def __init__(self, lowered, text=""):
        self._text = lowered.as_text(debug_info=True) + text

    def as_text(self, *, debug_info):
        assert debug_info
        return self._text

    def compile(self):
        raise NotImplementedError


def test_the_second_time_nothing_is_compiled(lowered):
    devices = jax.devices()[:1]
    first = facts.of_lowered(lowered, devices, "cpu:1")
    assert first == facts.read(lowered.compile())
    assert facts.of_lowered(NotCompiled(lowered), devices, "cpu:1") == first


@pytest.mark.parametrize("change", ["text", "devices", "topology", "flags", "damage"])
def test_anything_else_is_compiled_again(lowered, change, monkeypatch):
    facts.of_lowered(lowered, jax.devices()[:1], "cpu:1")
    devices = jax.devices()[: 2 if change == "devices" else 1]
    if change == "flags":
        monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
    if change == "damage":
        (file,) = facts.cache_folder().iterdir()
        file.write_text(file.read_text()[:-5])
    with pytest.raises(NotImplementedError):
        facts.of_lowered(
            NotCompiled(lowered, "#" if change == "text" else ""), devices, "x" if change == "topology" else "cpu:1"
        )


def test_a_program_that_cannot_be_printed_is_a_message(lowered):
    class Unprintable:
        def memory_analysis(self):
            return None

        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nmore")

    with pytest.raises(facts.UnreadableProgramError, match=r"RET_CHECK failure\. Plan on fewer devices"):
        facts.read(Unprintable())


def test_a_cache_that_cannot_be_written_is_no_error(lowered, tmp_path):
    (tmp_path / "jaxdist").write_text("a file where the folder would be")
    assert facts.of_lowered(lowered, jax.devices()[:1], "cpu:1").argument_bytes == 32 * 32 * 4


def test_a_step_that_the_compiler_finds_too_large_is_said(lowered, monkeypatch):
    def compile_(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM.\nMore.")

    monkeypatch.setattr(NotCompiled, "compile", compile_)
    with pytest.raises(UserError, match="does not fit a device of tpu:v5e:2x2: RESOURCE_EXHAUSTED: Ran out of memory"):
        facts.of_lowered(NotCompiled(lowered), jax.devices()[:1], "tpu:v5e:2x2")
