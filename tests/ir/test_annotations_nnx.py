"""Annotations of NNX models: metadata in every spelling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.experimental.layout import Format
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from autoshard.ir.errors import InputError
from autoshard.ir.trace import trace
from autoshard.ir.train_step import train_step

X = jax.ShapeDtypeStruct((8, 4), jnp.float32)
MESH = AbstractMesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def model_of(kind=nnx.Param, **metadata):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.w = kind(jax.random.normal(rngs.params(), (4, 16)), **metadata)
            self.v = nnx.Param(jnp.ones((16, 4)))

        def __call__(self, x):
            return jnp.tanh(x @ self.w[...]) @ self.v[...]

    return Net


def step_of(model, optimizer=None):
    return train_step(
        lambda net, x: (net(x) ** 2).mean(), optimizer or optax.sgd(0.1), model=model
    )


def read(optimizer=None, kind=nnx.Param, **metadata):
    """Logical names and mesh axes by path, and the report."""
    traced = trace(step_of(model_of(kind, **metadata), optimizer), [X])
    logical = {
        i.path: i.logical for i in traced.inputs if i.state != "data" and any(i.logical)
    }
    paths = {v: i.path for v, i in zip(traced.program.inputs, traced.inputs)}  # noqa: B905
    seeds = {paths[s.value]: s.dims for s in traced.seeds}
    return logical, seeds, traced.annotations


def test_strings_are_logical_axes():
    logical, seeds, report = read(out_sharding=("embed", "mlp"))
    assert logical == {"params/w": ("embed", "mlp")}
    assert seeds == {}
    assert report.found == report.reached == {"nnx out_sharding": 1}
    assert report.hints == ()


def test_moments_follow_their_parameter_by_path():
    logical, _, report = read(optax.adam(1e-3), out_sharding=("embed", "mlp"))
    names = ("embed", "mlp")
    assert logical == {
        "params/w": names,
        "opt_state/0/mu/w": names,
        "opt_state/0/nu/w": names,
    }
    assert report.found == {"nnx out_sharding": 1}


def test_factored_moments_do_not_follow():
    logical, _, _ = read(
        optax.adafactor(1e-3, min_dim_size_to_factor=2), out_sharding=("embed", "mlp")
    )
    assert list(logical) == ["params/w"]


def test_names_of_mesh_axes_are_seeds():
    logical, seeds, _ = read(optax.adam(1e-3), out_sharding=("fsdp", "tp"))
    dims = (("fsdp",), ("tp",))
    assert logical == {}
    assert seeds == {
        "params/w": dims,
        "opt_state/0/mu/w": dims,
        "opt_state/0/nu/w": dims,
    }


def test_a_name_that_is_both_is_logical():
    logical, seeds, _ = read(out_sharding=("expert", "tp"))
    assert logical == {"params/w": ("expert", None)}
    assert seeds == {"params/w": (None, ("tp",))}


@pytest.mark.parametrize(
    "sharding",
    [
        P(("x", "z"), "y"),
        NamedSharding(
            AbstractMesh((2, 2, 2), ("x", "z", "y"), axis_types=(AxisType.Auto,) * 3),
            P(("x", "z"), "y"),
        ),
    ],
)
def test_specs_and_shardings_are_seeds(sharding):
    logical, seeds, _ = read(out_sharding=sharding)
    assert logical == {}
    assert seeds == {"params/w": (("x", "z"), ("y",))}


def test_a_format_is_a_seed():
    device = jax.make_mesh((1, 1), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    given = Format(sharding=NamedSharding(device, P(None, "y")))
    _, seeds, _ = read(out_sharding=given)
    assert seeds == {"params/w": ((), ("y",))}


def test_rules_of_a_variable_give_mesh_axes_and_a_hint():
    rules = (("embed", None), ("mlp", "y"))
    logical, seeds, report = read(out_sharding=("embed", "mlp"), sharding_rules=rules)
    assert logical == {}
    assert seeds == {"params/w": ((), ("y",))}
    assert report.found == {"nnx sharding_rules": 1}
    assert "embed -> None, mlp -> y" in report.hints[0]


def test_rules_in_force_give_mesh_axes_and_leave_other_names():
    with nnx.logical_axis_rules((("mlp", ("x", "y")),)):
        logical, seeds, report = read(out_sharding=("embed", "mlp"))
    assert logical == {"params/w": ("embed", None)}
    assert seeds == {"params/w": (None, ("x", "y"))}
    assert "mlp -> ('x', 'y')" in report.hints[0]


def test_rules_that_contradict():
    step = step_of(
        model_of(out_sharding=("embed", "mlp"), sharding_rules=(("mlp", "y"),))
    )
    with (
        nnx.logical_axis_rules((("mlp", "x"),)),
        pytest.raises(InputError, match="params/w: sharding_rules maps 'mlp' to 'y'"),
    ):
        trace(step, [X])


@pytest.mark.parametrize("key", ["optimizer_sharding", "opt_sharding"])
def test_the_optimizer_state_may_have_a_sharding_of_its_own(key):
    logical, seeds, report = read(
        optax.adam(1e-3), out_sharding=("embed", "mlp"), **{key: ("fsdp", None)}
    )
    assert logical == {"params/w": ("embed", "mlp")}
    assert seeds == {
        "opt_state/0/mu/w": (("fsdp",), ()),
        "opt_state/0/nu/w": (("fsdp",), ()),
    }
    assert report.found == {"nnx out_sharding": 1, "nnx optimizer_sharding": 2}
    assert bool(report.hints) == (key == "opt_sharding")


@pytest.mark.parametrize("key", ["sharding", "sharding_names"])
def test_deprecated_spellings_work_with_a_hint(key):
    logical, _, report = read(**{key: ("embed", "mlp")})
    assert logical == {"params/w": ("embed", "mlp")}
    [hint] = report.hints
    assert f"{key}= of a variable is an old spelling" in hint
    report.check()


def test_metadata_that_flax_ignores_is_lost():
    _, _, report = read(sharding_metadata=("embed", "mlp"))
    assert report.found == {"nnx sharding_metadata": 1}
    assert report.reached == {"nnx sharding_metadata": 0}
    with pytest.raises(InputError) as caught:
        report.check()
    assert "sharding_metadata=('embed', 'mlp') of params/w" in str(caught.value)
    assert "Write out_sharding=('embed', 'mlp')" in str(caught.value)


def test_rules_without_names_are_lost():
    _, _, report = read(sharding_rules=(("mlp", "y"),))
    with pytest.raises(InputError, match=r"of params/w has no out_sharding"):
        report.check()


def test_variables_that_are_no_parameters():
    logical, _, _ = read(kind=nnx.BatchStat, out_sharding=("embed", "mlp"))
    assert logical == {"rest/w": ("embed", "mlp")}


def test_an_initializer_with_partitioning_and_a_scan_over_layers():
    class Layers(nnx.Module):
        def __init__(self, rngs):
            kernel = nnx.with_partitioning(
                nnx.initializers.lecun_normal(), ("embed", "mlp")
            )

            @nnx.split_rngs(splits=3)
            @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
            def make(rngs):
                return nnx.Linear(4, 4, rngs=rngs, use_bias=False, kernel_init=kernel)

            self.layers = make(rngs)

        def __call__(self, x):
            @nnx.scan
            def run(x, layer):
                return layer(x), None

            return run(x, self.layers)[0]

    traced = trace(step_of(Layers), [X])
    names = {i.path: i.logical for i in traced.inputs}
    assert names["params/layers/kernel"] == ("layers", "embed", "mlp")


@pytest.mark.parametrize("rank", [1, 3])
def test_a_name_per_dim(rank):
    with pytest.raises(InputError, match=rf"'params/w' names {rank} dims"):
        read(out_sharding=("embed", "mlp", None)[:rank])


def test_two_names_on_one_dim():
    with pytest.raises(InputError, match="names one dim twice"):
        read(out_sharding=(("embed", "mlp"), None))
    with pytest.raises(InputError, match="mixes mesh axes with logical"):
        read(out_sharding=(("embed", "fsdp"), None))


def test_variables_in_the_arguments_of_a_plain_function():
    net = model_of(out_sharding=("embed", "mlp"), optimizer_sharding=("fsdp", None))

    def make():
        built = net(nnx.Rngs(0))
        return built, nnx.Optimizer(built, optax.adam(1e-3), wrt=nnx.Param)

    with nnx.use_eager_sharding(False):
        graph, state = nnx.split(nnx.eval_shape(make))

    def step(state, x):
        model, optimizer = nnx.merge(graph, state)
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    traced = trace(step, [state, X])
    paths = dict(zip(traced.program.inputs, traced.inputs, strict=True))
    logical = {i.path: i.logical for i in traced.inputs if any(i.logical)}
    assert logical == {"0/0/w/value": ("embed", "mlp"), "batch": ("batch", None)}
    assert {paths[s.value].path: s.dims for s in traced.seeds} == {
        "0/1/opt_state/0/mu/w/value": (("fsdp",), ()),
        "0/1/opt_state/0/nu/w/value": (("fsdp",), ()),
    }


def test_a_module_as_argument():
    with nnx.use_eager_sharding(False):
        net = nnx.eval_shape(
            lambda: model_of(out_sharding=("embed", "mlp"))(nnx.Rngs(0))
        )
    traced = trace(lambda net, x: net(x).sum(), [net, X])
    names = {i.path: i.logical for i in traced.inputs}
    assert names["0/w/value"] == ("embed", "mlp")
