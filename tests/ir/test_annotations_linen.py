"""Annotations of Linen models: boxes, scanned boxes, constraints on activations."""

from __future__ import annotations

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from autoshard.ir.errors import InputError
from autoshard.ir.trace import trace
from autoshard.ir.train_step import train_step

X = jax.ShapeDtypeStruct((8, 4), jnp.float32)
INIT = nn.initializers.lecun_normal()
RULES = (("batch", "x"), ("mlp", "y"), ("embed", None))


class Mlp(nn.Module):
    """Two layers; `box` annotates the kernels, `seen` the hidden activation."""

    box: object = nn.with_logical_partitioning
    up: tuple = ("embed", "mlp")
    down: tuple = ("mlp", "embed")
    seen: object = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, kernel_init=self.box(INIT, self.up))(x)
        if self.seen is not None:
            x = self.seen(x)
        return nn.Dense(4, kernel_init=self.box(INIT, self.down))(jnp.tanh(x))


def step_of(module, optimizer=None):
    return train_step(
        lambda params, x: (module.apply({"params": params}, x) ** 2).mean(),
        optimizer or optax.adam(1e-3),
        model=lambda key: module.init(key, jnp.ones((2, 4)))["params"],
    )


def logical(traced):
    return {i.path: i.logical for i in traced.inputs if any(i.logical)}


def seeds(traced):
    paths = dict(zip(traced.program.inputs, traced.inputs, strict=True))
    return {
        paths[s.value].path if s.value in paths else s.origin: s.dims
        for s in traced.seeds
    }


def test_logical_boxes_name_parameters_and_their_moments():
    traced = trace(step_of(Mlp()), [X])
    up, down = ("embed", "mlp"), ("mlp", "embed")
    assert logical(traced) == {
        "params/Dense_0/kernel/value": up,
        "params/Dense_1/kernel/value": down,
        "opt_state/0/mu/Dense_0/kernel/value": up,
        "opt_state/0/mu/Dense_1/kernel/value": down,
        "opt_state/0/nu/Dense_0/kernel/value": up,
        "opt_state/0/nu/Dense_1/kernel/value": down,
        "batch": ("batch", None),
    }
    assert traced.annotations.found == {"nn.LogicallyPartitioned": 6}
    assert traced.annotations.reached == {"nn.LogicallyPartitioned": 6}
    assert traced.seeds == ()


def test_mesh_boxes_are_seeds():
    module = Mlp(nn.with_partitioning, (None, "model"), ("model", ("dp", "fsdp")))
    traced = trace(step_of(module, optax.sgd(0.1)), [X])
    assert seeds(traced) == {
        "params/Dense_0/kernel/value": ((), ("model",)),
        "params/Dense_1/kernel/value": (("model",), ("dp", "fsdp")),
    }
    assert traced.seeds[0].origin == "nn.Partitioned of params/Dense_0/kernel/value"
    assert logical(traced) == {"batch": ("batch", None)}
    assert traced.annotations.found == {"nn.Partitioned": 2}


def test_rules_of_a_box_or_in_force_give_mesh_axes_and_a_hint():
    box = functools.partial(nn.with_logical_partitioning, rules=RULES)
    own = trace(step_of(Mlp(box), optax.sgd(0.1)), [X])
    with nn.logical_axis_rules(RULES):
        context = trace(step_of(Mlp(), optax.sgd(0.1)), [X])
    for traced in (own, context):
        assert seeds(traced) == {
            "params/Dense_0/kernel/value": ((), ("y",)),
            "params/Dense_1/kernel/value": (("y",), ()),
        }
        [hint] = traced.annotations.hints
        assert "batch -> x, mlp -> y, embed -> None" in hint


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        kernel = nn.with_logical_partitioning(INIT, ("embed", "mlp"))
        x = nn.with_logical_constraint(x, ("batch", "embed"))
        return jnp.tanh(nn.Dense(4, use_bias=False, kernel_init=kernel)(x)), None


class Scanned(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Block) if self.remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers(name="layers")(x, None)[0]


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_prepends_its_name_and_a_line_counts_once(remat):
    traced = trace(step_of(Scanned(remat), optax.sgd(0.1)), [X])
    assert logical(traced) == {
        "params/layers/Dense_0/kernel/value": ("layers", "embed", "mlp"),
        "batch": ("batch", None),
    }
    want = {"nn.LogicallyPartitioned": 1, "nn.with_logical_constraint": 1}
    assert traced.annotations.found == traced.annotations.reached == want
    assert traced.annotations.unused == ()
    traced.annotations.check()


def constrained(x):
    return nn.with_logical_constraint(x, ("batch", "mlp"))


PARTIAL = functools.partial(
    nn.with_logical_constraint, logical_axis_resources=("batch", "mlp")
)


def marks(traced):
    return [
        (op.params["kind"], op.params["names"], op.params["mesh_axes"])
        for op in traced.program.ops
        if op.primitive == "autoshard_annotate" and not op.params["role"]
    ]


@pytest.mark.parametrize("seen", [constrained, PARTIAL])
def test_constraints_reach_the_jaxpr_without_a_mesh_and_rules(seen):
    traced = trace(step_of(Mlp(seen=seen)), [X])
    # Once for the value and once for its gradient.
    assert marks(traced) == [("nn.with_logical_constraint", ("batch", "mlp"), None)] * 2
    assert traced.annotations.reached["nn.with_logical_constraint"] == 1
    plain = trace(step_of(Mlp()), [X])
    assert marks(plain) == []


def test_constraints_reach_the_jaxpr_although_a_trace_without_them_is_cached():
    module = Mlp(seen=constrained)
    params = module.init(jax.random.key(0), jnp.ones((8, 4)))["params"]

    @jax.jit
    def loss(params, x):
        return (module.apply({"params": params}, x) ** 2).mean()

    x = jnp.ones((8, 4))
    before = loss(params, x)
    assert "annotate" not in str(jax.make_jaxpr(loss)(params, x))
    assert len(marks(trace(loss, [params, x]))) == 1
    assert len(marks(trace(loss, [params, x]))) == 1  # cached, and counted as before
    # Nor does the trace leave anything behind.
    assert "annotate" not in str(jax.make_jaxpr(loss)(params, x))
    assert loss(params, x) == before
    assert nn.with_logical_constraint(x, ("batch", "mlp")) is x


def test_constraints_under_rules_are_seeds_with_and_without_a_mesh():
    step = step_of(Mlp(nn.with_partitioning, (None, None), (None, None), constrained))
    mesh = AbstractMesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    with nn.logical_axis_rules(RULES):
        without = trace(step, [X])
        with jax.sharding.use_abstract_mesh(mesh):
            with_mesh = trace(step, [X])
    for traced in (without, with_mesh):
        found = {
            (s.dims, s.origin)
            for s in traced.seeds
            if s.kind == "nn.with_logical_constraint"
        }
        [(dims, origin)] = found
        assert dims == (("x",), ("y",))
        assert "test_annotations_linen.py:" in origin
        assert "(constrained)" in origin


@pytest.mark.parametrize("explicit", [False, True])
def test_boxes_are_read_under_a_mesh_too(explicit):
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = AbstractMesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    module = Mlp(nn.with_partitioning, (None, "model"), ("model", None))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = trace(step_of(module, optax.sgd(0.1)), [X])
    found = seeds(traced)
    assert found["params/Dense_0/kernel/value"] == ((), ("model",))
    # Flax itself constrains the value that it takes out of a box.
    assert traced.annotations.reached["with_sharding_constraint"] > 0


def test_a_box_that_the_model_function_takes_off_is_lost():
    module = Mlp()
    step = train_step(
        lambda params, x: (module.apply({"params": params}, x) ** 2).mean(),
        optax.sgd(0.1),
        model=lambda key: nn.unbox(module.init(key, jnp.ones((2, 4))))["params"],
    )
    report = trace(step, [X]).annotations
    assert report.found == {"nn.LogicallyPartitioned": 2}
    assert report.reached == {"nn.LogicallyPartitioned": 0}
    with pytest.raises(InputError) as caught:
        report.check()
    message = str(caught.value)
    assert "2 annotations of the program did not reach its jaxpr" in message
    assert "('embed', 'mlp') (nn.LogicallyPartitioned)" in message
    assert "Return module.init(...)['params'] as it is" in message


def plain_step(state, x):
    def loss(params):
        return (state.apply_fn({"params": params}, x) ** 2).mean()

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


@pytest.mark.parametrize("frozen", [False, True])
def test_boxes_in_the_arguments_of_a_plain_function(frozen):
    module = Mlp()

    def make():
        params = module.init(jax.random.key(0), jnp.ones((2, 4)))["params"]
        if frozen:
            params = flax.core.freeze(params)
        return TrainState.create(
            apply_fn=module.apply, params=params, tx=optax.adam(1e-3)
        )

    traced = trace(plain_step, [jax.eval_shape(make), X])
    names = logical(traced)
    assert names["0/params/Dense_0/kernel/value"] == ("embed", "mlp")
    assert names["0/opt_state/0/nu/Dense_1/kernel/value"] == ("mlp", "embed")
    assert traced.out_source[: len(traced.inputs) - 1] == tuple(
        range(len(traced.inputs) - 1)
    )


def test_a_box_on_a_factored_moment_says_nothing():
    step = step_of(Mlp(), optax.adafactor(1e-3, min_dim_size_to_factor=2))
    traced = trace(step, [X])
    rows = {i.path: i.logical for i in traced.inputs if "v_row/Dense_0/k" in i.path}
    assert list(rows.values()) == [(None,)]
    assert logical(traced)["params/Dense_0/kernel/value"] == ("embed", "mlp")


def test_a_box_with_too_many_names():
    step = step_of(Mlp(up=("embed", "mlp", "heads")), optax.sgd(0.1))
    with pytest.raises(InputError, match=r"Dense_0/kernel.*names 3 dims"):
        trace(step, [X])


def test_an_unknown_box_is_lost():
    @flax.struct.dataclass
    class Box(nn.meta.AxisMetadata):
        value: jax.Array

        def unbox(self):
            return self.value

        def replace_boxed(self, val):
            return Box(val)

        def add_axis(self, index, params):
            return self

        def remove_axis(self, index, params):
            return self

    report = trace(
        lambda p, x: (x @ p["w"].unbox()).sum(), [{"w": Box(jnp.ones((4, 2)))}, X]
    ).annotations
    assert report.found == {"Box": 1}
    with pytest.raises(InputError, match="0/w is in a Box, a box that autoshard does"):
        report.check()


def test_fallbacks_of_a_constraint():
    def fn(fallback, x):
        return nn.with_logical_constraint(
            x, ("batch", "odd"), rules=RULES, fallback=fallback
        ).sum()

    kinds = nn.spmd.RulesFallback
    default = trace(functools.partial(fn, kinds.AXIS_IS_UNSHARDED), [X])
    assert [s.dims for s in default.seeds] == [(("x",), ())]
    none = trace(functools.partial(fn, kinds.NO_CONSTRAINT), [X])
    assert none.seeds == ()
    assert "asks for no constraint" in none.annotations.hints[0]
    with pytest.raises(InputError, match=r"have none for \['odd'\]"):
        trace(functools.partial(fn, kinds.RAISE_ERROR), [X])


def test_an_open_dim_of_a_constraint():
    def fn(x):
        spec = (PartitionSpec.UNCONSTRAINED, "mlp")
        return nn.with_logical_constraint(x, spec, rules=RULES).sum()

    assert [s.dims for s in trace(fn, [X]).seeds] == [(None, ("y",))]


def test_a_model_with_constraints_is_initialised_without_a_mesh():
    def seen(x):
        x = jax.lax.with_sharding_constraint(x=x, shardings=PartitionSpec("x"))
        x = jax.sharding.reshard(x, PartitionSpec("y"))
        return nn.with_logical_constraint(x, ("batch", "mlp"))

    step = step_of(Mlp(seen=seen))
    state = step.init(0)
    assert state.params["Dense_0"]["kernel"].names == ("embed", "mlp")
    assert state.params["Dense_0"]["kernel"].value.shape == (4, 16)
    kinds = {s.kind for s in trace(step, [X]).seeds}
    assert kinds == {"with_sharding_constraint", "reshard"}
