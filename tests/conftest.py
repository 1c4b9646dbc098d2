"""Eight fake CPU devices for every test, set before JAX starts; rank promotion raises."""

import os
from collections.abc import Iterator

import compile_cache
import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Child processes of a test choose their own number of devices: configuration, not an environment variable.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")
# The thread pool of XLA must not have exactly one thread: such a program rounds differently.
os.environ.setdefault("NPROC", "2")

hypothesis.settings.register_profile("jaxdist", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("jaxdist")


@pytest.fixture(scope="module")
def shared_compilations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tests of a module that asks for it compile equal programs once."""
    with compile_cache.compile_once(tmp_path_factory.mktemp("xla")):
        yield


@pytest.fixture(autouse=True)
def compilation_cache_as_it_was() -> Iterator[None]:
    """A command that a test runs in this process switches the cache on; the next test must compile what it counts."""
    name = "jax_compilation_cache_dir"
    before = jax.config.values[name]
    yield
    if jax.config.values[name] != before:
        jax.config.update(name, before)
        compilation_cache.reset_cache()
