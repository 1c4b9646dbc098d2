"""32 bits that stand for the bits of an array: whole numbers, whose sum is the same in any order, on any device."""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdist.spmd import keys

_RUNS, _LARGE_SIZE = 8, 1 << 15
"""A large array is mixed in so many runs at once, which XLA fuses with their sum: it would write the mixed array to
memory to add it up. With twice as many it fuses no longer; of a small array, the additional kernels cost more.
"""


def of_array(leaf: jax.Array) -> jax.Array:
    """Return 32 bits, a uint32 scalar, that depend on every bit of `leaf` and on where it stands.

    A single changed element always changes them; larger changes escape with a chance of 2**-32.
    """
    mixed = _mixed(_words(leaf).reshape(-1))
    size = mixed.size // _RUNS if mixed.size >= _LARGE_SIZE else 0
    rest = jnp.sum(mixed[_RUNS * size :], dtype=jnp.uint32)
    if not size:
        return rest
    runs = [mixed[number * size : (number + 1) * size] for number in range(_RUNS)]
    return jnp.sum(functools.reduce(operator.add, runs), dtype=jnp.uint32) + rest


def of_arrays(leaves: Sequence[jax.Array]) -> jax.Array:
    """Return 32 bits for several arrays, in their order."""
    return of_array(jnp.stack([of_array(leaf) for leaf in leaves]))


def _mixed(words: jax.Array) -> jax.Array:
    """Return a term of the sum for each word.

    The finalizer of MurmurHash3 (Appleby) is a bijection, so changing one word always changes its term.
    """
    mixed = words ^ (jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return mixed ^ (mixed >> 16)


def _words(leaf: jax.Array) -> jax.Array:
    """Return the bits of `leaf` as uint32; narrower elements take one word each."""
    leaf = keys.plain(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == jnp.bool_ or leaf.dtype.name in ("int4", "uint4", "int2", "uint2"):
        return leaf.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
