"""Fields fixed by hand: every key, wrong ones, and that what is found obeys them."""

from __future__ import annotations

import re

import pytest
from helpers.spaces import floats, mlp_step, of_mesh

from autoshard.ir.errors import AutoshardError, InfeasibleError, InputError
from autoshard.ir.errors import NameUnknownError as Unknown
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy, plan_from_json, plan_to_json
from autoshard.search import search_plans
from autoshard.search.pinning import fixed_fields, opened, parse_pins, with_pins

AUTO = load_strategy("auto")

FORMS = [
    ("tensor", "2", lambda s: s.mesh["tensor"], 2),
    ("mesh.tensor", 4, lambda s: s.mesh["tensor"], 4),
    ("stage", 1, lambda s: s.mesh["stage"], 1),
    ("microbatches", "4", lambda s: s.schedule.microbatches, 4),
    ("schedule.microbatches", 2, lambda s: s.schedule.microbatches, 2),
    ("remat", "full", lambda s: s.schedule.remat, "full"),
    ("schedule.remat", "none", lambda s: s.schedule.remat, "none"),
    ("pipeline", "none", lambda s: s.schedule.pipeline, "none"),
    ("storage.params", "none", lambda s: s.storage.params, ()),
    ("storage.gradients", "data", lambda s: s.storage.gradients, ("data",)),
    ("storage.optimizer", "fsdp+data", lambda s: s.storage.optimizer, ("fsdp", "data")),
    ("storage.optimizer", ["fsdp"], lambda s: s.storage.optimizer, ("fsdp",)),
    ("storage.params", "auto", lambda s: s.storage.params, "auto"),
    ("rules.vocab", "tensor", lambda s: dict(_rules(s))["vocab"], ("tensor",)),
    ("rules.seq.residual", "none", lambda s: dict(_rules(s))["seq.residual"], ()),
    ("rules.new", "data,fsdp", lambda s: _rules(s)[0], ("new", ("data", "fsdp"))),
    ("specs.up", "none,tensor", lambda s: s.specs["up"], ("", "tensor")),
    ("specs.up", "data+fsdp,none", lambda s: s.specs["up"], (("data", "fsdp"), "")),
]


def _rules(strategy):
    return [(rule.logical, rule.axes) for rule in strategy.rules]


@pytest.mark.parametrize(("key", "value", "read", "expected"), FORMS)
def test_every_form_of_a_key(key, value, read, expected):
    changed = with_pins(AUTO, {key: value})
    assert read(changed) == expected
    place = key.removeprefix("mesh.").removeprefix("schedule.")
    assert changed.where(place) == " (set by hand)"
    untouched = "fsdp" if place != "fsdp" else "data"
    assert re.fullmatch(r" \(auto\.toml:\d+\)", changed.where(untouched))


WRONG = [
    ("tensors", 2, Unknown, r"tensors = 2 .*data, fsdp.*microbatches.*'tensor'\?"),
    ("storage.moments", "data", Unknown, r"storage\.moments.*storage\.optimizer"),
    ("storage", "data", Unknown, r"storage = 'data'.*storage\.params"),
    ("rules.", "data", Unknown, r"rules\. = .*rules\.LOGICAL"),
    ("", "1", Unknown, r"no field"),
    ("tensor", "two", InputError, r"tensor = 'two'.*whole number or 'auto'"),
    ("tensor", 0, InputError, r"tensor = 0.*greater than or equal to 1"),
    ("tensor", -2, InputError, r"tensor = -2.*greater than or equal to 1"),
    ("tensor", None, InputError, r"tensor = None.*whole number or 'auto'"),
    ("tensor", 2.5, InputError, r"tensor = 2\.5.*whole number or 'auto'"),
    ("microbatches", "0", InputError, r"microbatches = '0'.*greater than or equal"),
    ("remat", "half", InputError, r"remat = 'half'.*'none'.*'full'"),
    ("pipeline", "1f2b", InputError, r"pipeline = '1f2b'.*'none'.*'1f1b'"),
    ("blocks", "4,x", InputError, r"blocks = '4,x'.*whole number"),
    ("storage.params", "tensr", InputError, r"storage\.params = 'tensr'.*tensor"),
    ("storage.params", "data+data", InputError, r"names an axis twice"),
    ("rules.mlp", 3, InputError, r"rules\.mlp = 3 "),
    ("storage.params", None, InputError, r"storage\.params = None "),
    ("specs.up", 7, InputError, r"specs\.up = 7 "),
]


@pytest.mark.parametrize(("key", "value", "error", "said"), WRONG)
def test_wrong_keys_and_values_say_what_was_passed_and_what_is_allowed(
    key, value, error, said
):
    with pytest.raises(error, match=rf"(?s){said}"):
        with_pins(AUTO, {key: value})


def test_a_rule_over_an_axis_that_the_mesh_lacks_is_refused():
    with pytest.raises(InputError, match=r"\[rules\] mlp.*\[mesh\] does not name"):
        with_pins(load_strategy("dp"), {"rules.mlp": "expert"})


@pytest.mark.parametrize("text", ["tensor", "=2", "tensor=", " = ", ""])
def test_texts_that_are_no_pins(text):
    with pytest.raises(InputError, match="KEY=VALUE"):
        parse_pins([text])


def test_a_pin_given_twice():
    with pytest.raises(InputError, match="tensor is given twice"):
        parse_pins(["tensor=2", " tensor =4"])
    assert parse_pins([" specs.a=b = x"]) == {"specs.a": "b = x"}


@pytest.mark.parametrize("name", ["dp", "fsdp", "megatron-sp", "zero2", "auto"])
def test_fixed_fields_round_trip(name):
    strategy = load_strategy(name)
    fixed = fixed_fields(strategy)
    assert with_pins(strategy, fixed) == strategy
    holes = opened(strategy, fixed)
    assert fixed_fields(holes) == {}
    assert with_pins(holes, fixed) == strategy


def test_where_a_field_was_fixed_is_no_part_of_a_strategy():
    dp, chips = load_strategy("dp"), cluster("cpu:2")
    assert dp == dp.placed({"data": "elsewhere"})
    assert dp != with_pins(dp, {"data": 2})
    [plan] = search_plans(mlp_step(layers=1), (floats(8, 32),), chips, dp)
    assert plan_from_json(plan_to_json(plan)) == plan


@pytest.mark.parametrize(
    "pins",
    [
        {"tensor": 2},
        {"fsdp": 4, "remat": "full"},
        {"microbatches": 2, "data": 2},
        {"storage.params": ("fsdp",), "fsdp": 2},
        {"rules.mlp": ()},
    ],
)
def test_what_is_found_obeys_the_pins(pins):
    small = of_mesh(
        "data", "fsdp", "tensor",
        rules={"batch": "auto", "mlp": "auto"},
        storage={"params": "auto", "gradients": "auto", "optimizer": "auto"},
        microbatches="auto", remat="auto",
    )  # fmt: skip
    step, batch = mlp_step(layers=2), floats(8, 32)
    [plan] = search_plans(step, (batch,), cluster("cpu:4"), with_pins(small, pins))
    found = {
        **plan.sizes,
        **dict(plan.strategy.schedule),
        "storage.params": plan.strategy.storage.params,
        "rules.mlp": dict(_rules(plan.strategy))["mlp"],
    }
    assert {key: found[key] for key in pins} == pins


@pytest.mark.parametrize(
    ("chips", "pins", "error", "said"),
    [
        ("cpu:4", {"data": 3}, InfeasibleError, r"data = 3.*cannot be completed.*4"),
        ("cpu:4", {"data": 8}, InfeasibleError, r"data = 8.*cannot be completed.*4"),
        ("cpu:4", {"data": 2, "fsdp": 4}, InfeasibleError, r"cannot be completed"),
        ("cpu:7", {"data": 2}, InfeasibleError, r"cannot be completed to the 7 chips"),
        ("cpu:7", {"data": 7}, InfeasibleError, r"batch of 8 is not divisible by 7"),
        ("cpu:4", {"microbatches": 3}, InputError, r"batch of 8.*into 3 microbatches"),
        ("cpu:4", {"microbatches": 16}, InputError, r"batch of 8.*into 16"),
        ("cpu:4", {"data": 4, "microbatches": 4}, InfeasibleError, r"devices: 16"),
        ("cpu:1", {"tensor": 2}, InfeasibleError, r"completed to the 1 chips"),
    ],
)
def test_contradictory_pins_are_an_error_that_names_them(chips, pins, error, said):
    small = of_mesh("data", "fsdp", "tensor", rules={"batch": "auto", "mlp": "auto"})
    small = with_pins(small, {"microbatches": "auto"})
    step, batch = mlp_step(layers=1), (floats(8, 32),)
    with pytest.raises(error, match=rf"(?s){said}"):
        search_plans(step, batch, cluster(chips), with_pins(small, pins))


def test_an_unknown_field_is_one_of_our_errors():
    with pytest.raises(AutoshardError):
        with_pins(AUTO, {"cluster": "h100:8"})


@pytest.mark.parametrize(
    "pins",
    [{"virtual": 2}, {"pipeline": "interleaved"}, {"pipeline": "zb-h1", "virtual": 4}],
)
def test_parts_of_a_stage_must_suit_the_schedule(pins):
    fixed = with_pins(load_strategy("fsdp"), {"stage": 2})
    with pytest.raises(InputError, match="'interleaved' has two parts a stage or more"):
        with_pins(fixed, pins)
