import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdist.spmd import keys


def bits(key):
    return np.asarray(jax.random.key_data(key)).tolist()


@given(st.integers(0, 2**32 - 1))
def test_a_seed_of_32_bits_is_that_of_jax(seed):
    assert bits(keys.from_seed(seed)) == bits(jax.random.key(seed))


def test_every_one_of_64_bits_counts():
    seeds = [0, *(1 << bit for bit in range(64))]
    assert len({tuple(bits(keys.from_seed(seed))) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_other_seeds_are_refused(seed):
    with pytest.raises(ValueError, match=f"at least 0 and below 2\\*\\*64; got {seed}"):
        keys.from_seed(seed)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_a_typed_key_becomes_integers_and_comes_back(impl):
    key = jax.random.key(7, impl=impl)
    assert keys.is_key(key)
    assert keys.plain(key).dtype == jnp.uint32
    assert keys.typed(keys.plain(key), key) == key


def test_an_array_that_is_no_key_stays_as_it_is():
    array = jnp.arange(3)
    assert not keys.is_key(array)
    assert keys.plain(array) is array
    assert keys.typed(array, array) is array
