"""Rotary positions: what makes them relative, and the Llama 3.1 stretching."""

import jax.numpy as jnp
import numpy as np
import pytest

from autoshard.models import RopeScaling
from autoshard.models.layers import rotate, rotation_table


def vectors(seq, head_dim, seed):
    """The same random vector at every position, ``[1, seq, 1, head_dim]``."""
    rng = np.random.default_rng(seed)
    vector = jnp.asarray(rng.normal(size=head_dim), jnp.float32)
    return jnp.broadcast_to(vector, (1, seq, 1, head_dim))


def test_dot_products_depend_on_distance_only():
    table = rotation_table(12, 8, 50.0)
    q = rotate(vectors(12, 8, 0), table)[0, :, 0]
    k = rotate(vectors(12, 8, 1), table)[0, :, 0]
    dots = np.asarray(q @ k.T)
    for distance in range(-11, 12):
        diagonal = np.diagonal(dots, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert abs(dots[0, 0] - dots[0, 5]) > 0.1


def test_rotation_keeps_lengths_and_the_first_position():
    x = vectors(6, 8, 2)
    turned = rotate(x, rotation_table(6, 8, 10_000.0))
    np.testing.assert_array_equal(turned[0, 0], x[0, 0])
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6
    )


def test_rotation_keeps_the_dtype():
    x = vectors(4, 8, 3).astype(jnp.bfloat16)
    assert rotate(x, rotation_table(4, 8, 10_000.0)).dtype == jnp.bfloat16


def frequencies(scaling):
    """Radians per token of each pair, read off position one."""
    cos, sin = rotation_table(2, 128, 500_000.0, scaling)
    return np.arctan2(np.asarray(sin)[0, 1, 0], np.asarray(cos)[0, 1, 0])


def test_scaling_slows_long_waves_keeps_short_ones_and_blends_between():
    scaling = RopeScaling(factor=8.0, original_max_seq=8192)
    plain, scaled = frequencies(None), frequencies(scaling)
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192 / 1
    assert short.any()
    assert long.any()
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-5)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-4)
    ratio = plain[~short & ~long] / scaled[~short & ~long]
    assert ((ratio > 1) & (ratio < 8)).all()
    assert (np.diff(ratio) > 0).all()


@pytest.mark.parametrize(("pair", "exponent"), [(0, 0.0), (16, 0.25), (32, 0.5)])
def test_frequencies_fall_geometrically(pair, exponent):
    np.testing.assert_allclose(frequencies(None)[pair], 500_000.0**-exponent, rtol=1e-5)
