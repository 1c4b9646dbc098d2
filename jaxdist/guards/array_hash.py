"""32 bits that stand for the bits of an array: whole numbers, whose sum is the same in any order, on any device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdist.spmd import keys


def of_array(leaf: jax.Array) -> jax.Array:
    """Return 32 bits, a uint32 scalar, that depend on every bit of `leaf` and on where it stands.

    A single changed element always changes them; larger changes escape with a chance of 2**-32.
    """
    words = _words(leaf).reshape(-1)
    place = jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B9)
    # The finalizer of MurmurHash3 (Appleby) is a bijection, so changing one word always changes its term of the sum.
    mixed = words ^ place
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def of_arrays(leaves: Sequence[jax.Array]) -> jax.Array:
    """Return 32 bits for several arrays, in their order."""
    return of_array(jnp.stack([of_array(leaf) for leaf in leaves]))


def _words(leaf: jax.Array) -> jax.Array:
    """Return the bits of `leaf` as uint32; narrower elements take one word each."""
    leaf = keys.plain(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == jnp.bool_ or leaf.dtype.name in ("int4", "uint4", "int2", "uint2"):
        return leaf.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
