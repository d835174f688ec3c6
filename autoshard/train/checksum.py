"""Checksums of sharded arrays, computed where the data is.

A checksum is a function of the global array and does not depend on its sharding: no
array is gathered, and what one mesh saved is verified on another.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from autoshard.ir.train_step import path_string


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the order of the tree; the form in which a state is saved."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {path_string(path): leaf for path, leaf in flat}
    assert len(leaves) == len(flat), "two leaves of a state have the same path"
    return leaves


def tree_checksums(tree: Any) -> dict[str, str]:
    """A 64-bit checksum per leaf, by path; the same however the leaf is sharded.

    Each 32-bit word is hashed together with its position by a bijection of the word,
    and the hashes are summed modulo 2**32, twice. Sums of integers do not depend on
    their order, so the devices add up what they hold. A change within one word is
    always found, any other with probability 1 - 2**-64.

    Args:
        tree: Pytree of arrays of any dtype, typed random keys included.

    Returns:
        16 hex digits by leaf path.

    >>> tree_checksums({"w": jnp.zeros(3)}) == tree_checksums({"w": -jnp.zeros(3)})
    False
    """
    leaves = leaves_by_path(tree)
    # One computation has one set of devices, and the leaves may have several.
    groups: dict[Any, list[str]] = {}
    for path, leaf in leaves.items():
        devices = leaf.sharding.device_set if isinstance(leaf, jax.Array) else ()
        groups.setdefault(frozenset(devices), []).append(path)
    sums: dict[str, Any] = {}
    for paths in groups.values():
        results = _leaf_sums([leaves[path] for path in paths])
        sums.update(zip(paths, results, strict=True))
    sums = jax.device_get(sums)
    return {
        path: f"{int(sums[path][0]):08x}{int(sums[path][1]):08x}" for path in leaves
    }


@jax.jit
def _leaf_sums(leaves: list[Any]) -> list[Any]:
    return [_leaf_sum(leaf) for leaf in leaves]


def _leaf_sum(x: Any) -> tuple[Any, Any]:
    words = _words(x)
    # Sums and odd products modulo 2**32 instead of a flat index: arrays beyond 2**32
    # elements need no 64-bit integers, which JAX does not have by default.
    position = jnp.full(words.shape, words.ndim, jnp.uint32)
    for dim in range(words.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
        position = _avalanche(position * jnp.uint32(0x9E3779B1) + index)
    low = jnp.sum(_avalanche(words ^ position), dtype=jnp.uint32)
    other = _avalanche(position ^ jnp.uint32(0x5BD1E995))
    high = jnp.sum(_avalanche(words + other), dtype=jnp.uint32)
    return low, high


def _words(x: Any) -> Any:
    """The bits of an array as uint32, with one more dim for wider dtypes."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return _words(jax.random.key_data(x))
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_words(x.real), _words(x.imag)], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = (
        jnp.finfo(x.dtype).bits
        if jnp.issubdtype(x.dtype, jnp.floating)
        else (jnp.iinfo(x.dtype).bits)
    )
    if bits >= 32:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


def _avalanche(x: Any) -> Any:
    """A bijection of uint32 that spreads every bit (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
