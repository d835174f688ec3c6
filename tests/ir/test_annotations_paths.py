"""Path maps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from autoshard.ir.annotations.paths import seeds_of_paths, with_specs
from autoshard.ir.errors import InputError, NameUnknownError
from autoshard.ir.trace import trace
from autoshard.ir.train_step import train_step

X = jax.ShapeDtypeStruct((8, 4), jnp.float32)


def model(key):
    del key
    names = ("q", "k", "v")
    attention = {name: {"kernel": jnp.ones((4, 4))} for name in names}
    return {"attn": attention, "out": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}


def loss(params, x):
    for name in ("q", "k", "v"):
        x = jnp.tanh(x @ params["attn"][name]["kernel"])
    return (x @ params["out"]["kernel"] + params["out"]["bias"]).mean()


def traced(optimizer=None):
    return trace(train_step(loss, optimizer or optax.sgd(0.1), model=model), [X])


def found(specs, optimizer=None):
    program = traced(optimizer)
    return {
        program.inputs[s.value].path: s.dims
        for s in seeds_of_paths(program.inputs, specs)
    }


def test_the_first_that_matches_decides():
    specs = {
        r"attn/(q|k)/kernel": P(None, "tensor"),
        r"params/.*kernel": P("fsdp", None),
    }
    assert found(specs) == {
        "params/attn/k/kernel": ((), ("tensor",)),
        "params/attn/q/kernel": ((), ("tensor",)),
        "params/attn/v/kernel": (("fsdp",), ()),
        "params/out/kernel": (("fsdp",), ()),
    }


def test_entries_as_a_strategy_file_writes_them():
    specs = {
        "attn/q": ["", "tensor"],
        "attn/k": [[], "*"],
        "attn/v": [["data", "fsdp"], "*"],
        "out/": [],
    }
    assert found(specs) == {
        "params/attn/q/kernel": ((), ("tensor",)),
        "params/attn/k/kernel": ((), None),
        "params/attn/v/kernel": (("data", "fsdp"), None),
        "params/out/bias": ((),),
        "params/out/kernel": ((), ()),
    }


def test_moments_are_found_by_the_path_of_their_parameter():
    got = found({"out/kernel": P("fsdp", None)}, optax.adam(1e-3))
    assert sorted(got) == [
        "opt_state/0/mu/out/kernel",
        "opt_state/0/nu/out/kernel",
        "params/out/kernel",
    ]


def test_factored_moments_are_left_alone():
    optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=2)
    got = found({"out/kernel": P("fsdp", None)}, optimizer)
    assert sorted(got) == ["params/out/kernel"]


def test_they_count_and_go_before_other_seeds():
    program = traced()
    both = with_specs(with_specs(program, {"out/b": P("fsdp")}), {"attn/q": ["", "tp"]})
    assert [s.origin for s in both.seeds] == [
        "path map 'attn/q' of params/attn/q/kernel",
        "path map 'out/b' of params/out/bias",
    ]
    values = [both.program.values[s.value].shape for s in both.seeds]
    assert values == [(4, 4), (2,)]
    assert both.annotations.found == both.annotations.reached == {"path map": 2}
    assert with_specs(program, {}) is program


@pytest.mark.parametrize(
    ("specs", "kind", "message"),
    [
        ({"attn/z/kernel": P()}, NameUnknownError, "Close paths: .*params/attn/"),
        ({"attn/(q": P()}, InputError, "is no regular expression"),
        ({"out/bias": P("a", "b")}, InputError, r"params/out/bias has 2 .*\(2,\)"),
        ({"out/kernel": ["a"]}, InputError, r"params/out/kernel has 1 .*\(4, 2\)"),
        ({"out/kernel": "tensor"}, InputError, "give one entry per dim"),
    ],
)
def test_what_a_map_may_not_say(specs, kind, message):
    with pytest.raises(kind, match=message):
        found(specs)
