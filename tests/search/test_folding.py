"""What is left of a deep program costs what all of it does.

The oracle is the same cost model on the whole program, no copy of a block left out.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest

from autoshard import models
from autoshard.api.building import token_batch
from autoshard.cost import Pricer, floors
from autoshard.cost.collectives import Meshes
from autoshard.cost.estimate import fastest_s, model_flops
from autoshard.cost.work import analyse
from autoshard.ir.train_step import train_step
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy
from autoshard.plan.sharded import Layout
from autoshard.propagate import propagate
from autoshard.search import reading, space
from autoshard.search.divisible import divisible, what_fails
from autoshard.search.folding import folded_by
from autoshard.search.pinning import with_pins
from autoshard.search.reading import Shallow, Sketch, classes_of, read
from autoshard.search.solver import Solver

BATCH, SEQ = 16, 32
SLOW = pytest.mark.slow
STRATEGIES = (
    *("auto", "dp", "fsdp", "zero1"),
    *(
        pytest.param(name, marks=SLOW)
        for name in ("fsdp-tp", "fsdp-tp-cp", "megatron-sp", "megatron-tp", "zero2")
    ),
)
PARTS = ("matmul_s", "other_s", "collective_s", "hidden_s", "peak_bytes")


def decoder(name="llama3-tiny", layers=10, seq=SEQ):
    """A step of an unrolled decoder of the zoo."""
    config = dataclasses.replace(
        models.get(name), layers=layers, scan_layers=False, dtype="bfloat16"
    )
    return train_step(
        models.next_token_loss,
        optax.adamw(1e-3),
        model=lambda rngs: models.build(config, rngs),
    )


def program_of(step, strategy, remat="none", microbatches=1):
    fn = step.with_schedule(microbatches=microbatches, remat=remat)
    traced = read(fn, (token_batch(BATCH, SEQ),), strategy)
    return traced, classes_of(traced, strategy)


def some_structures(strategy, remat, most=4):
    """Of a strategy's structures as many as asked for, from the first to the last."""
    found = [s for s in space.structures(strategy) if s.schedule.remat == remat]
    at = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return [found[k] for k in at]


def candidates(strategy, chips):
    rows = space.meshes(strategy, chips)
    cuts = np.array([1, 4])
    return np.repeat(rows, len(cuts), axis=0), np.tile(cuts, len(rows))


def check_prices(traced, classes, strategy, remat, name, structures=None):
    """Both programs, priced for many meshes and microbatches; those that divide."""
    chips = cluster(name)
    shallow = Shallow.of(traced, classes)
    work = analyse(traced, classes)
    sizes, cuts = candidates(strategy, chips)
    compared = 0
    for structure in structures or some_structures(strategy, remat):
        layout = Layout.of(structure)
        whole = Pricer(propagate(traced, classes, layout), work)
        left = Pricer(propagate(shallow.traced, shallow.classes, layout), shallow.work)
        fits = divisible(whole, sizes, cuts, BATCH)
        assert (divisible(left, sizes, cuts, BATCH) == fits).all()
        assert what_fails(left, sizes, cuts, BATCH) == what_fails(
            whole, sizes, cuts, BATCH
        )
        if not fits.any():
            continue
        given = chips, sizes[fits], cuts[fits].astype(float)
        expected, found = whole.price(*given), left.price(*given)
        for part in PARTS:
            np.testing.assert_allclose(
                getattr(found, part),
                getattr(expected, part),
                rtol=1e-10,
                atol=1e-18,
                err_msg=f"{part} of {structure}",
            )
        at = Meshes(chips, sizes[fits]), cuts[fits].astype(float)
        np.testing.assert_allclose(
            floors.rest_s(left, *at), floors.rest_s(whole, *at), rtol=1e-10
        )
        compared += int(fits.sum())
    assert compared
    return shallow


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("h100:16", "none"),
        ("v5p:16", "full"),
        pytest.param("h100:16", "full", marks=SLOW),
        pytest.param("v5p:16", "none", marks=SLOW),
    ],
)
def test_prices_are_those_of_the_whole(name, remat):
    strategy = load_strategy("auto")
    traced, classes = program_of(decoder(), strategy, remat)
    shallow = check_prices(traced, classes, strategy, remat, name)
    assert len(shallow.traced.program.ops) < len(traced.program.ops)


@pytest.mark.parametrize("named", STRATEGIES)
def test_prices_are_those_of_the_whole_under(named):
    strategy = load_strategy(named)
    for remat in ("none", "full"):
        if strategy.schedule.remat in (remat, "auto"):
            traced, classes = program_of(decoder("gpt2-tiny"), strategy, remat)
            check_prices(traced, classes, strategy, remat, "h100:8")


def test_flops_and_bounds_are_those_of_the_whole():
    strategy, chips = load_strategy("auto"), cluster("h100:16")
    traced, classes = program_of(decoder(layers=12), strategy)
    shallow, work = Shallow.of(traced, classes), analyse(traced, classes)
    assert model_flops(shallow.work, shallow.classes) == model_flops(work, classes)
    found = fastest_s(shallow.traced.program, shallow.classes, shallow.work, chips)
    expected = fastest_s(traced.program, classes, work, chips)
    assert found == pytest.approx(expected, rel=1e-12)


def test_more_layers_are_no_more_to_price():
    strategy = load_strategy("auto")
    left = [
        len(Shallow.of(*program_of(decoder(layers=n), strategy)).traced.program.ops)
        for n in (10, 24)
    ]
    assert left[0] == left[1]


def with_specs(strategy, specs):
    return strategy.model_copy(update={"specs": specs})


def test_a_spec_of_one_layer_keeps_all_layers():
    strategy = with_specs(
        load_strategy("auto"), {r"params/blocks/4/mlp/up$": ["", "tensor"]}
    )
    traced, classes = program_of(decoder(), strategy)
    assert traced.seeds
    folded, left = folded_by(traced, classes)
    assert folded.traced is traced
    assert left is classes


def test_a_spec_of_all_layers_is_that_of_what_is_left():
    strategy = with_specs(
        load_strategy("auto"), {r"params/blocks/\d+/mlp/up$": ["", "tensor"]}
    )
    traced, classes = program_of(decoder(), strategy)
    shallow = check_prices(traced, classes, strategy, "none", "h100:16")
    assert len(shallow.traced.program.ops) < len(traced.program.ops)
    assert 0 < len(shallow.traced.seeds) < len(traced.seeds)


def test_a_loop_over_layers_stays_as_it_is():
    config = models.get("llama3-tiny")
    step = train_step(
        models.next_token_loss,
        optax.adamw(1e-3),
        model=lambda rngs: models.build(config, rngs),
    )
    traced, classes = program_of(step, load_strategy("auto"))
    assert folded_by(traced, classes)[0].traced is traced


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_inside_a_loop_of_microbatches_cost_the_same(remat):
    strategy = load_strategy("fsdp-tp")
    traced, classes = program_of(decoder(layers=9), strategy, remat, microbatches=2)
    structures = some_structures(strategy, remat)
    check_prices(traced, classes, strategy, remat, "h100:8", structures)


def plan_of(step, named, chips):
    batch = token_batch(BATCH, SEQ)
    [plan] = Solver(step, (batch,), cluster(chips), load_strategy(named)).plans()
    return plan.model_dump(mode="json")


def rounded(found):
    """A document whose numbers have ten digits."""
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [rounded(value) for value in found]
    if isinstance(found, float):
        # What is left of differences, such as a gap of nothing, has no digits.
        return float(f"{found:.10g}") if abs(found) > 1e-12 else 0.0
    return found


@pytest.mark.parametrize("named", ["fsdp-tp", pytest.param("megatron-sp", marks=SLOW)])
def test_the_plan_is_that_of_a_search_of_the_whole(named, monkeypatch):
    step = decoder(layers=9)
    found = plan_of(step, named, "h100:16")

    def whole(traced, classes):
        from autoshard.ir.fold import unfolded

        return unfolded(traced), classes

    monkeypatch.setattr(reading, "folded_by", whole)
    expected = plan_of(step, named, "h100:16")
    # Sums in another order may differ in their last digits.
    found, expected = rounded(found), rounded(expected)
    assert found == expected


def mlp(widths):
    """A step of residual layers of some widths, and what is read of it."""

    def model(key):
        return [
            {
                "up": jax.random.normal(key, (32, width)),
                "down": jax.random.normal(key, (width, 32)),
            }
            for width in widths
        ]

    def loss(params, x):
        for layer in params:
            x = x + jax.nn.relu(x @ layer["up"]) @ layer["down"]
        return (x**2).mean()

    step = train_step(loss, optax.adamw(1e-3), model=model)
    strategy = load_strategy("auto")
    traced = read(step, (jax.ShapeDtypeStruct((BATCH, 32), "float32"),), strategy)
    return traced, classes_of(traced, strategy), strategy


@pytest.mark.parametrize(
    "widths",
    [
        [64] * 32,
        [48, 64] * 24,  # every other layer is wider
        [64] * 24 + [48] + [64] * 24,  # one is narrower
    ],
    ids=["one kind", "in turns", "one apart"],
)
def test_small_layers_cost_the_same(widths):
    """Of the last of them the forward pass is near enough the backward pass to fuse."""
    traced, classes, strategy = mlp(widths)
    shallow = check_prices(traced, classes, strategy, "none", "h100:8")
    assert len(shallow.traced.program.ops) < len(traced.program.ops)


def test_layers_too_few_to_be_alike_stay_as_they_are():
    traced, classes, _ = mlp([64] * 7)
    assert folded_by(traced, classes)[0].traced is traced


def without_trail(plan):
    """A plan as rounded numbers; sums and the way to an origin may come otherwise.

    Of few copies, a way back to an annotation may be another one that is as true.
    """
    found = {key: value for key, value in rounded(plan).items() if key != "trail"}
    found["delayed"] = sorted(found["delayed"], key=str)
    found["program"] = {
        key: value for key, value in found["program"].items() if key != "fingerprint"
    }
    return found


@pytest.mark.parametrize(
    ("named", "pins"),
    [
        ("fsdp-tp", {"remat": "none", "microbatches": 1}),
        pytest.param(
            "megatron-sp",
            {"remat": "full", "microbatches": 2, "tensor": 2},
            marks=SLOW,
        ),
        pytest.param("fsdp", {"remat": "dots", "microbatches": 2}, marks=SLOW),
    ],
)
def test_a_plan_for_few_copies_is_that_for_all(named, pins, monkeypatch):
    step, said = decoder(layers=17), []
    strategy = with_pins(load_strategy(named), pins)

    def solved():
        batch = token_batch(BATCH, SEQ)
        given = step, (batch,), cluster("h100:8"), strategy
        [plan] = Solver(*given, log=said.append).plans()
        return plan.model_dump(mode="json")

    found = solved()
    assert not any("every copy" in line for line in said)
    monkeypatch.setattr(reading, "few_of", lambda *_: "asked for")
    expected = solved()
    assert any("every copy" in line and "asked for" in line for line in said)
    assert without_trail(found) == without_trail(expected)


def test_a_path_map_for_one_layer_has_all_of_them_traced():
    step, said = decoder(layers=17), []
    strategy = with_specs(
        load_strategy("fsdp"), {r"params/blocks/7/mlp/up$": ["", "tensor"]}
    )
    given = step, (token_batch(BATCH, SEQ),), cluster("h100:8"), strategy
    sketch = Solver(*given, log=said.append).space.sketch("none")
    assert sketch.stretch is None
    [line] = [line for line in said if "every copy" in line]
    assert "blocks/7/mlp/up" in line


def test_a_mix_of_policies_has_all_copies_traced():
    # Which copies recompute what hangs on their number, so none stands for others.
    step = decoder(layers=17)
    given = (token_batch(BATCH, SEQ),), load_strategy("fsdp")
    for remat, few in (("full", True), ("full=8,none=9", False)):
        of = step.with_schedule(microbatches=1, remat=remat)
        assert (Sketch.of(of, *given).stretch is not None) == few
