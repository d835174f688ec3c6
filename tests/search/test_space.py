"""What holes may become, against every combination that the documents allow."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from autoshard.ir.errors import InfeasibleError, InputError
from autoshard.ir.mesh import AXES
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy
from autoshard.plan.strategy import STATES, Rule, Schedule, Storage, Strategy
from autoshard.search import space
from autoshard.search.pinning import fixed_fields, opened

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
TENSOR_RULES = ("heads", "kv_heads", "mlp", "vocab", "seq.residual")
RULES = ("batch", "seq", "expert", *TENSOR_RULES)


def drawn(seed):
    """A strategy with some axes, some rules, and some of all its fields holes."""
    rng = np.random.default_rng(seed)

    def some(names, share):
        return [n for n in names if rng.random() < share]

    axes = some(MESH_AXES, 0.75)
    over = [(), *((a,) for a in axes)]
    spread = [(), *((a,) for a in axes if a not in ("expert", "tensor"))]

    def value(options, share):
        hole = rng.random() < share
        return "auto" if hole else options[int(rng.integers(len(options)))]

    holes = float(rng.choice([0.3, 0.8, 1.0]))
    return Strategy(
        name="drawn",
        about="",
        mesh={a: value([1, 2, 4], holes) for a in axes},
        rules=tuple(Rule(logical=n, axes=value(over, holes)) for n in some(RULES, 0.6)),
        storage=Storage(**{s: value(spread, holes) for s in STATES}),
        schedule=Schedule(
            microbatches=value([1, 2, 4], holes),
            remat=value(["none", "dots", "full"], holes),
        ),
    )


def key(strategy):
    storage = strategy.storage
    return (
        tuple((r.logical, r.axes) for r in strategy.rules),
        tuple(getattr(storage, s) for s in STATES),
        strategy.schedule.remat,
    )


def allowed_rules(mesh, asked, chosen):
    """Whether rules are what the documents allow for the axes there are."""
    for logical, axes in chosen.items():
        if asked[logical] != "auto":
            if axes != asked[logical]:
                return False
        elif logical in ("batch", "seq"):
            # All axes of their own that there are.
            own = ("data", "fsdp", "expert") if logical == "batch" else ("context",)
            if axes != tuple(a for a in own if a in mesh):
                return False
        elif logical == "expert" and "expert" in mesh:
            # Over the axis that is for them, and `tensor` with it or not.
            if axes not in (("expert",), ("tensor", "expert")):
                return False
        elif axes not in ((), ("tensor",)):
            return False
    holes = {logical for logical, axes in asked.items() if axes == "auto"}
    if {"heads", "kv_heads"} <= holes and chosen["kv_heads"] and not chosen["heads"]:
        return False
    cut = [n for n in ("mlp", "expert") if "tensor" in chosen.get(n, ())]
    if len(cut) == 2 and {"mlp", "expert"} & holes:
        return False
    if {"heads", "mlp"} <= holes and "tensor" in mesh:
        used = any("tensor" in axes for axes in chosen.values())
        return not used or bool(chosen["heads"] and cut)
    return True


def allowed_storage(mesh, asked, chosen):
    """Whether states are stored as the documents allow."""
    cumulative = [
        tuple(a for a in ("fsdp", "expert", "context", "data")[:n] if a in mesh)
        for n in (1, 3, 4)
    ]
    holes = [s for s in STATES if asked[s] == "auto"]
    if len(holes) == 3 and "fsdp" in mesh:
        # ZeRO-1 and ZeRO-2 in groups of replicas: parameters whole.
        in_groups = [((), (), ("fsdp",)), ((), ("fsdp",), ("fsdp",))]
        if tuple(chosen[s] for s in STATES) in in_groups:
            return True
    for state, axes in chosen.items():
        within = cumulative[:2] if state == "params" else cumulative
        if axes not in (within if state in holes else [asked[state]]):
            return False
    if any(not set(chosen[a]) <= set(chosen[b]) for a, b in itertools.pairwise(holes)):
        return False
    ends = [set(chosen["params"]), set(cumulative[2])]
    return len(holes) < 3 or all(set(axes) in ends for axes in chosen.values())


def every(strategy):
    """All that a strategy's structures may be, from all combinations of all axes."""
    mesh = dict(strategy.mesh)
    asked = {r.logical: r.axes for r in strategy.rules}
    stored = {s: getattr(strategy.storage, s) for s in STATES}
    names = ("fsdp", "expert", "context", "data")
    sets = {
        tuple(a for a in names if a in mesh and a in chosen)
        for n in range(5)
        for chosen in itertools.combinations(names, n)
    }
    several = [("data", "fsdp", "expert"), ("tensor", "expert")]
    anything = {tuple(a for a in axes if a in mesh) for axes in several}
    anything |= {(), *((a,) for a in mesh)}
    remats = ("none", "dots", "full")
    if strategy.schedule.remat != "auto":
        remats = (strategy.schedule.remat,)
    by_rule = []
    for chosen in itertools.product(anything, repeat=len(asked)):
        over = dict(zip(asked, chosen, strict=True))
        if all(set(axes) <= set(mesh) for axes in chosen) and allowed_rules(
            mesh, asked, over
        ):
            by_rule.append(tuple(over.items()))
    return {
        (rules, states, remat)
        for rules in by_rule
        for states in itertools.product({*sets, *stored.values()} - {"auto"}, repeat=3)
        for remat in remats
        if allowed_storage(mesh, stored, dict(zip(STATES, states, strict=True)))
    }


def few_rules(seed):
    """As `drawn`, with no more rules than can be combined in no time."""
    found = drawn(seed)
    return found.model_copy(update={"rules": found.rules[:4]})


@pytest.mark.parametrize("seed", range(40))
def test_structures_are_all_that_is_allowed_and_each_comes_once(seed):
    strategy = few_rules(seed)
    found = [key(s) for s in space.structures(strategy)]
    assert len(found) == len(set(found))
    assert set(found) == every(strategy)


def test_structures_change_neither_mesh_nor_microbatches():
    auto = load_strategy("auto")
    for structure in space.structures(auto):
        assert structure.mesh == auto.mesh
        assert structure.schedule.microbatches == "auto"


def test_a_rule_without_a_known_domain_is_refused():
    strategy = Strategy(
        name="s", about="", mesh={}, rules=(Rule(logical="mine", axes="auto"),)
    )
    with pytest.raises(InputError, match=r"mine = 'auto'.*heads.*Write the axes"):
        list(space.structures(strategy))


@pytest.mark.parametrize("seed", range(100, 140))
def test_what_is_kept_is_what_opening_some_of_the_fields_gives(seed):
    strategy = few_rules(seed)
    fields = [k for k in fixed_fields(strategy) if "." in k or k == "remat"]
    expected = {
        key(structure)
        for n in range(len(fields) + 1)
        for some in itertools.combinations(fields, n)
        for structure in space.structures(opened(strategy, some))
    }
    found = [key(s) for s in space.structures(opened(strategy, fields), strategy)]
    assert len(found) == len(set(found))
    assert set(found) == expected


# -- experts -------------------------------------------------------------------------


def test_without_experts_nothing_of_auto_is_for_them():
    auto = space.without_experts(load_strategy("auto"))
    assert "expert" not in auto.mesh
    assert "expert" not in [rule.logical for rule in auto.rules]
    for structure in space.structures(auto):
        axes = [rule.axes for rule in structure.rules]
        axes += [getattr(structure.storage, state) for state in STATES]
        assert not any("expert" in own for own in axes)


def test_without_experts_an_axis_that_is_named_has_one_device():
    ep = space.without_experts(load_strategy("ep"))
    assert ep.mesh["expert"] == 1
    assert {r.logical: r.axes for r in ep.rules}["expert"] == ("expert",)


def test_without_experts_what_is_fixed_stays():
    strategy = Strategy(name="s", about="", mesh={"data": "auto", "expert": 2})
    assert space.without_experts(strategy) == strategy


# -- meshes --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200, 230))
def test_meshes_are_all_whose_sizes_multiply_to_the_chips(seed):
    strategy = drawn(seed)
    chips = cluster(f"cpu:{[1, 2, 4, 6, 7, 8, 12, 16][seed % 8]}")
    sizes = [
        [n for n in range(1, 17) if strategy.mesh.get(axis, 1) in ("auto", n)]
        for axis in AXES
    ]
    expected = {m for m in itertools.product(*sizes) if math.prod(m) == chips.num_chips}
    if not expected:
        with pytest.raises(InfeasibleError, match="cannot be completed"):
            space.meshes(strategy, chips)
        return
    params = strategy.storage.params
    if params not in ("auto", ()):
        # What is to be stored over some axes is not stored over one device.
        spread = {
            m for m in expected if any(m[AXES.index(axis)] > 1 for axis in params)
        }
        expected = spread or expected
    found = [tuple(row) for row in space.meshes(strategy, chips).tolist()]
    assert len(found) == len(set(found))
    assert set(found) == expected


# -- microbatches --------------------------------------------------------------------


def cutting(microbatches):
    return Strategy(
        name="s", about="", mesh={}, schedule=Schedule(microbatches=microbatches)
    )


@pytest.mark.parametrize("batch", [1, 2, 7, 12, 36, 97, 1536])
def test_microbatches_are_the_divisors_of_the_batch(batch):
    expected = [n for n in range(1, batch + 1) if batch % n == 0]
    assert space.microbatches(cutting("auto"), batch, True) == expected
    assert space.microbatches(cutting("auto"), batch, False) == [1]
    for n in range(1, 14):
        if n in expected:
            assert space.microbatches(cutting(n), batch, True) == [n]
            continue
        with pytest.raises(InputError, match=rf"batch of {batch} .*into {n} "):
            space.microbatches(cutting(n), batch, True)


def test_what_cannot_be_cut_is_refused():
    assert space.microbatches(cutting("auto"), 0, True) == [1]
    assert space.microbatches(cutting(1), 8, False) == [1]
    with pytest.raises(InputError, match=r"2 microbatches.*train_step"):
        space.microbatches(cutting(2), 8, False)
