"""What a user fixes beside the strategy: specs by path, names of axes, mesh sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import autoshard as ash
from autoshard.ir.errors import InfeasibleError, InputError, NameUnknownError
from autoshard.plan.strategy import Strategy

W, X = (
    jax.ShapeDtypeStruct((16, 32), "float32"),
    jax.ShapeDtypeStruct((8, 16), "float32"),
)
TWO = {"data": 2, "tensor": 4}


def strategy(mesh=None, **rules):
    return Strategy(name="test", about="", mesh=mesh or TWO, rules=rules)


def product(w, x):
    return jnp.tanh(x @ w["kernel"]), w["bias"]


STATE = {"kernel": W, "bias": jax.ShapeDtypeStruct((12,), "float32")}


def spec_of(plan, path):
    (tensor,) = [t for t in plan.tensors if t.path == path]
    return tensor.storage.dims


# -- specs by path ---------------------------------------------------------------


@pytest.mark.parametrize("entry", [P("tensor"), P("tp"), ["tensor", "..."]])
def test_a_spec_that_ends_early_leaves_the_other_dims_whole(entry):
    plan = ash.search(
        product, STATE, X, cluster="cpu:8", strategy=strategy(),
        specs={"kernel$": entry},
    )  # fmt: skip
    assert spec_of(plan, "0/kernel") == (("tensor",), ())


@pytest.mark.parametrize("entry", [P(None, "tensor"), P(None, "tp"), ["", "tensor"]])
def test_a_spec_by_path_fixes_a_parameter_and_travels_on(entry):
    plan = ash.search(
        product, STATE, X, cluster="cpu:8", strategy=strategy(),
        specs={"kernel$": entry},
    )  # fmt: skip
    assert spec_of(plan, "0/kernel") == ((), ("tensor",))
    assert plan.outputs[0].dims == ((), ("tensor",))
    assert plan.strategy.specs  # part of the plan, and of a strategy made from it


def test_a_spec_by_path_goes_before_the_strategys_own():
    policy = strategy().with_wishes({"kernel": P("tensor", None)}, {}, ())
    plan = ash.search(
        product, STATE, X, cluster="cpu:8", strategy=policy,
        specs={"kern": P(None, "tensor")},
    )  # fmt: skip
    assert spec_of(plan, "0/kernel") == ((), ("tensor",))


def test_a_spec_by_path_that_matches_nothing_names_close_paths():
    with pytest.raises((InputError, NameUnknownError), match=r"kern_l.*0/kernel"):
        ash.search(
            product, STATE, X, cluster="cpu:8", strategy=strategy(),
            specs={"kern_l": P(None, "tensor")},
        )  # fmt: skip


def test_a_spec_by_path_of_another_rank_names_the_path():
    with pytest.raises(InputError, match="0/bias"):
        ash.search(
            product, STATE, X, cluster="cpu:8", strategy=strategy(),
            specs={"bias": P(None, "tensor")},
        )  # fmt: skip


def test_a_strategy_file_holds_specs_aliases_and_opt_ins(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'name = "mine"\nabout = ""\nreplicate = ["nobody"]\n'
        "[mesh]\ndata = 2\ntensor = 4\n[rules]\n"
        '[specs]\n"kernel" = ["", "wide"]\n[aliases]\nwide = "tensor"\n'
    )
    plan = ash.search(product, STATE, X, cluster="cpu:8", strategy=str(file))
    assert spec_of(plan, "0/kernel") == ((), ("tensor",))


# -- names of axes ---------------------------------------------------------------


def constrained(w, x):
    mesh = jax.make_mesh((2, 4), ("rows", "tp"), axis_types=(AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, P("rows", "tp"))
    return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), sharding) * 2


def test_the_users_axes_are_known_by_alias():
    plan = ash.search(
        constrained, W, X, cluster="cpu:8", strategy=strategy(),
        aliases={"rows": "data"},
    )  # fmt: skip
    assert plan.outputs[0].dims == (("data",), ("tensor",))
    assert {c.kind: c.reached for c in plan.annotations.counts} == {
        "with_sharding_constraint": 1
    }
    parallel = ash.parallelize(constrained, plan, W, X)
    rng = np.random.default_rng(0)
    args = [rng.normal(size=s.shape).astype("float32") for s in (W, X)]
    expected = np.tanh(args[1] @ args[0]) * 2
    np.testing.assert_allclose(parallel(*args), expected, rtol=1e-4, atol=1e-5)


def test_an_axis_without_alias_says_how_to_give_one():
    with pytest.raises(NameUnknownError, match=r"'rows'.*\[aliases\] rows"):
        ash.search(constrained, W, X, cluster="cpu:8", strategy=strategy())


# -- mesh sizes ------------------------------------------------------------------


def manual(w, x):
    mesh = jax.sharding.AbstractMesh((4,), ("tp",), axis_types=(AxisType.Auto,))
    total = jax.shard_map(
        lambda w, x: jax.lax.psum(x @ w, "tp"),
        mesh=mesh,
        in_specs=(P("tp", None), P(None, "tp")),
        out_specs=P(None, None),
    )
    return jnp.tanh(total(w, x))


def test_a_manual_region_fixes_the_size_of_its_axis_and_its_collectives_are_planned():
    open_ = strategy({"data": "auto", "tensor": "auto"}, batch=["data"])
    plan = ash.search(manual, W, X, cluster="cpu:8", strategy=open_)
    assert (plan.sizes["data"], plan.sizes["tensor"]) == (2, 4)
    (sum_,) = [c for c in plan.predicted.collectives if c.kind == "all_reduce"]
    assert (sum_.axes, sum_.bytes_) == (("tensor",), 8 * 32 * 4)
    assert "test_wishes.py" in sum_.source
    parallel = ash.parallelize(manual, plan, W, X)
    rng = np.random.default_rng(0)
    w, x = (rng.normal(size=s.shape).astype("float32") for s in (W, X))
    np.testing.assert_allclose(parallel(w, x), np.tanh(x @ w), rtol=1e-5, atol=1e-6)


def test_a_mesh_without_that_size_is_infeasible_in_words():
    fixed = strategy({"data": 4, "tensor": 2}, batch=["data"])
    with pytest.raises(InfeasibleError, match=r"4 devices along 'tensor'.*sizes \[2\]"):
        ash.search(manual, W, X, cluster="cpu:8", strategy=fixed)


# -- padding ---------------------------------------------------------------------


def test_a_dim_of_an_intermediate_that_does_not_divide_is_padded_priced_and_noted():
    def fn(w, x):
        return (jnp.tanh(ash.annotate(x @ w, "batch", "mlp"))[:, :30] ** 2).sum()

    plan = ash.search(fn, W, X, cluster="cpu:8", strategy=strategy(mlp=["tensor"]))
    assert any("30 over tensor (4 ways) are padded to 32" in n for n in plan.notes)
    parallel = ash.parallelize(fn, plan, W, X)
    rng = np.random.default_rng(0)
    args = [rng.normal(size=s.shape).astype("float32") for s in (W, X)]
    np.testing.assert_allclose(parallel(*args), fn(*args), rtol=1e-5)


def test_an_argument_that_does_not_divide_leaves_no_plan():
    with pytest.raises(InputError, match=r"0/bias.* 12 is not divisible by 8"):
        ash.search(
            product, STATE, X, cluster="cpu:8", strategy=strategy({"data": 8}),
            specs={"bias": P("data")},
        )  # fmt: skip
