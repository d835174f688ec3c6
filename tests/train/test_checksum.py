import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from autoshard.train import tree_checksums

DTYPES = [
    "bool",
    "int4",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "float8_e4m3fn",
    "bfloat16",
    "float16",
    "float32",
    "complex64",
]


def checksum(x):
    return tree_checksums({"x": x})["x"]


def test_the_sharding_does_not_change_it():
    x = np.random.default_rng(0).normal(size=(8, 24)).astype(np.float32)
    sums = {checksum(x)}
    for shape, spec in (
        ((8, 1), P("a")),
        ((2, 4), P("a", "b")),
        ((4, 2), P("b", "a")),
        ((4, 2), P(None, ("a", "b"))),
        ((4, 2), P()),
    ):
        mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        sums.add(checksum(jax.device_put(x, NamedSharding(mesh, spec))))
    assert len(sums) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_told_apart_by_one_element(dtype):
    x, one = jnp.zeros((3, 5), dtype), jnp.ones((), dtype)
    sums = {checksum(x.at[i, j].set(one)) for i in range(3) for j in range(5)}
    assert len(sums | {checksum(x)}) == 16


def test_each_bit_of_a_word_and_the_order_of_words_count():
    x = np.arange(6, dtype=np.uint32).reshape(2, 3)
    flipped = [
        x ^ np.eye(1, 6, 4, dtype=np.uint32).reshape(2, 3) << b for b in range(32)
    ]
    variants = [*flipped, x, x[::-1], x[:, ::-1], x.T, x.reshape(3, 2), x.ravel()]
    assert len({checksum(v) for v in variants}) == len(variants)


def test_scalars_empty_arrays_and_random_keys():
    assert checksum(jnp.int32(1)) != checksum(jnp.int32(2))
    assert checksum(jnp.zeros((0, 4))) == "0" * 16
    assert checksum(jax.random.key(1)) != checksum(jax.random.key(2))
    assert tree_checksums({}) == {}
    assert list(tree_checksums({"a": [jnp.ones(2), {"b": jnp.ones(3)}]})) == [
        "a/0",
        "a/1/b",
    ]
