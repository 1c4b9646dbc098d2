"""Random keys: how a seed becomes the keys of a run, and how typed keys become plain integers and back."""

import dataclasses
from typing import Any, NamedTuple

import jax

SEED_BITS = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlainKey:
    """A typed key as the integers it consists of."""

    data: jax.Array
    impl: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, key: jax.Array) -> "PlainKey":
        """Return the integers of a typed key."""
        return cls(jax.random.key_data(key), jax.random.key_impl(key))

    def typed(self) -> jax.Array:
        """Return the typed key."""
        return jax.random.wrap_key_data(self.data, impl=self.impl)


class RunKeys(NamedTuple):
    """The two keys of a run: `init` is for the params; `train`, kept in the state, gives each step its key."""

    init: jax.Array
    train: jax.Array


def from_seed(seed: int) -> jax.Array:
    """Return the key of a seed. All 64 bits count: `jax.random.key` alone reads the lower 32.

    Raises:
      ValueError: the seed is negative or has more than 64 bits.
    """
    if not 0 <= seed < 2**SEED_BITS:
        raise ValueError(f"A seed must be at least 0 and below 2**{SEED_BITS}; got {seed}. Choose a smaller one.")
    high, low = divmod(seed, 2**32)
    key = jax.random.key(low)
    return jax.random.fold_in(key, high) if high else key


def run_keys(key: jax.Array) -> RunKeys:
    """Return the keys of a run whose seed has the key `key`."""
    return RunKeys(*jax.random.split(key))


def is_key(leaf: Any) -> bool:
    """Return whether an array, or a description of one, is a typed key."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def plain(leaf: Any) -> Any:
    """Return the integers that a typed key consists of; return any other array unchanged."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def typed(data: jax.Array, like: Any) -> jax.Array:
    """Return `data` as a typed key if `like` is one (an array or a description of one); otherwise unchanged."""
    if not is_key(like):
        return data
    impls: list[Any] = []
    jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct((), like.dtype))
    return jax.random.wrap_key_data(data, impl=impls[0])
