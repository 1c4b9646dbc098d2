"""32 bits for an array: every bit and every place counts, and nothing else does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.guards import array_hash


@given(place=st.integers(0, 99), bit=st.integers(0, 31))
@settings(max_examples=20)
def test_every_flipped_bit_changes_them(place, bit):
    values = np.random.default_rng(0).normal(size=100).astype("f4")
    flipped = values.copy()
    flipped.view("u4")[place] ^= np.uint32(1 << bit)
    assert int(array_hash.of_array(jnp.asarray(values))) != int(array_hash.of_array(jnp.asarray(flipped)))


def test_two_flipped_signs_do_not_cancel():
    values = np.random.default_rng(1).normal(size=64).astype("f4")
    prints = jax.jit(jax.vmap(array_hash.of_array))
    pairs = [(first, second) for first in range(64) for second in range(first)]
    changed = np.tile(values, (len(pairs), 1))
    for row, (first, second) in zip(changed, pairs, strict=True):
        row[[first, second]] *= -1
    assert int(array_hash.of_array(jnp.asarray(values))) not in set(np.asarray(prints(changed)).tolist())


def test_swapped_elements_and_zeros_of_either_sign_differ():
    assert len({int(array_hash.of_array(jnp.array(values))) for values in ([1.0, 2.0], [2.0, 1.0])}) == 2
    assert len({int(array_hash.of_array(jnp.array(values))) for values in ([0.0], [-0.0])}) == 2


@pytest.mark.parametrize("dtype", ["f4", "bfloat16", "f2", "i4", "u1", "bool", "c8"])
def test_any_dtype_has_one(dtype):
    ones = jnp.ones(3).astype(dtype)
    assert int(array_hash.of_array(ones)) != int(array_hash.of_array(ones.at[1].set(jnp.zeros((), dtype))))


def test_a_key_and_an_empty_array_have_one():
    keys = jax.random.key(0), jax.random.key(1)
    assert len({int(array_hash.of_array(key)) for key in keys}) == 2
    assert int(array_hash.of_array(jnp.zeros(0))) == 0


@pytest.mark.parametrize("size", [1 << 15, (1 << 15) + 5])
def test_a_large_array_has_the_sum_of_the_terms_of_all_its_words(size):
    words = np.random.default_rng(2).integers(0, 1 << 32, size, dtype=np.uint32)
    mixed = words ^ (np.arange(size, dtype=np.uint32) * np.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    assert int(array_hash.of_array(jnp.asarray(words))) == int(np.sum(mixed ^ (mixed >> 16), dtype=np.uint32))
