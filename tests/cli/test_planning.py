"""Planning from the command line, against the same questions asked one by one."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from helpers.spaces import small_memory
from helpers.tiny_lm import HIDDEN, LAYERS, MODEL, VOCAB, WIDTH
from typer.testing import CliRunner

import autoshard as ash
from autoshard import api
from autoshard.cli.app import app
from autoshard.cost import Pricer
from autoshard.cost.price import MEMORY_HEADROOM
from autoshard.ir.errors import InfeasibleError
from autoshard.search.pinning import fixed_fields

BATCH, SEQ = 16, 128
SIZES = ("--batch", BATCH, "--seq", SEQ)
SEARCH = ("search", MODEL, "--cluster", "cpu:8", *SIZES)
SIZE = ("size", MODEL, "--cluster", "cpu", *SIZES, "--strategy", "fsdp")
GIB = 2**30


def cli(*args):
    return CliRunner().invoke(app, [str(a) for a in args], prog_name="autoshard")


def done(*args):
    result = cli(*args)
    assert result.exit_code == 0, result.output
    return result


def fails(exit_code, *args):
    """What is said by a command that must fail, with nothing on stdout."""
    result = cli(*args)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if exit_code == 2:  # framed
        return result.stderr
    *_, last = result.stderr.splitlines()
    assert last.startswith("error: ")
    return last


def resolved(seq=SEQ):
    ref = ash.ModelRef(
        model=MODEL,
        batch=BATCH,
        seq=seq,
        optimizer="adamw",
        learning_rate=3e-4,
        dtype="bf16",
    )
    return api.resolve(ref)


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """The best plan on 8 devices, in a file."""
    path = tmp_path_factory.mktemp("plans") / "best.json"
    done(*SEARCH, "-o", path)
    return path


# -- size ----------------------------------------------------------------------------

COUNTS = [n for n in range(1, 17) if math.log2(n / (3 if n % 3 == 0 else 1)) % 1 == 0]


def on(chips, budget_bytes=None, seq=SEQ):
    """The best plan of `fsdp` on so many devices, of so much memory; None if none."""
    there = ash.cluster(f"cpu:{chips}")
    if budget_bytes is not None:
        there = small_memory(there, math.ceil(budget_bytes / MEMORY_HEADROOM))
    given = resolved(seq)
    try:
        return ash.search(given.step, given.batch, cluster=there, strategy="fsdp")
    except InfeasibleError:
        return None


def sized(*args):
    """The plan and the numbers of chips that were tried."""
    found = json.loads(done(*SIZE, *args, "--json").stdout)
    *before, last = found["tried"]
    assert last["reason"] == ""
    assert all(tried["reason"] for tried in before)
    return found["plan"], [tried["num_chips"] for tried in found["tried"]]


def test_size_for_a_speed_is_the_first_count_that_is_fast_enough(tmp_path):
    plans = {n: on(n) for n in COUNTS}
    speeds = {n: p.predicted.tokens_per_s for n, p in plans.items() if p is not None}
    # A speed that takes more than one device and fewer than all.
    target = sorted(speeds.values())[len(speeds) // 2]
    expected = next(n for n in COUNTS if speeds.get(n, 0) >= target)
    assert expected > 1
    path = tmp_path / "plan.json"
    plan, tried = sized("--target-tokens-per-s", target, "-o", path)
    assert plan["cluster"]["num_chips"] == expected
    assert tried == [n for n in COUNTS if n <= expected]
    assert plan["predicted"]["step_s"] == plans[expected].predicted.step_s
    assert json.loads(path.read_text()) == plan


def test_size_obeys_what_is_set():
    free, _ = sized("--target-tokens-per-s", 1)
    fixed, _ = sized("--target-tokens-per-s", 1, "--set", "remat=full")
    assert free["strategy"]["schedule"]["remat"] != "full"
    assert fixed["strategy"]["schedule"]["remat"] == "full"
    message = fails(3, *SIZE, "--target-tokens-per-s", 1, "--set", "tensr=2")
    assert "tensor" in message


def test_size_for_a_budget_is_the_first_count_on_which_something_fits():
    # One device cannot hold the parameters and their two moments, in float32.
    budget = 0.9 * 3 * 4 * (VOCAB * WIDTH + LAYERS * 2 * WIDTH * HIDDEN)
    fits = {n: on(n, budget, seq=8) for n in COUNTS}
    expected = next(n for n in COUNTS if fits[n] is not None)
    assert expected > 1
    plan, tried = sized("--seq", 8, "--budget-gib", budget / GIB)
    assert plan["cluster"]["num_chips"] == expected
    assert tried == [n for n in COUNTS if n <= expected]
    assert plan["predicted"]["memory"]["total"] <= budget
    # Within the budget it is the fastest, as is said of chips of just this memory.
    assert plan["predicted"]["step_s"] == fits[expected].predicted.step_s


def test_size_by_both_is_the_first_count_that_does_both():
    fast = {n: p for n in COUNTS if (p := on(n)) is not None}
    target = fast[4].predicted.tokens_per_s
    budget = 1.01 * on(8).predicted.memory.total
    fits = {n: on(n, budget) for n in COUNTS}
    expected = next(
        n for n, p in fits.items() if p and p.predicted.tokens_per_s >= target
    )
    plan, _ = sized("--target-tokens-per-s", target, "--budget-gib", budget / GIB)
    assert plan["cluster"]["num_chips"] == expected
    assert plan["predicted"]["memory"]["total"] <= budget


# -- why-not -------------------------------------------------------------------------


def test_why_not_is_the_difference_of_two_searches(best, tmp_path):
    other = tmp_path / "other.json"
    found = json.loads(
        done("why-not", best, "--set", "tensor=8", "--json", "-o", other).stdout
    )
    given, plan = resolved(), api.load_plan(best)
    wanted = {"a": fixed_fields(plan.strategy), "b": {"tensor": 8}}
    priced = {
        side: ash.search(
            given.step, given.batch, cluster="cpu:8", pins=pins, model_ref=given.ref
        )
        for side, pins in wanted.items()
    }
    assert api.load_plan(other) == priced["b"]
    *parts, step = found["time"]
    assert step["part"] == "step"
    for side, searched in priced.items():
        assert step[side] == searched.predicted.step_s
        assert sum(row[side] for row in parts) == pytest.approx(step[side], rel=1e-9)
    difference = sum(row["difference"] for row in parts)
    assert difference == pytest.approx(step["b"] - step["a"], rel=1e-9)
    assert difference > 0
    *held, total = found["memory"]
    assert total["part"] == "peak"
    for side, searched in priced.items():
        assert total[side] == searched.predicted.memory.total
        assert sum(row[side] for row in held) == total[side]


def test_why_not_what_the_plan_does_is_no_change(best):
    mesh = api.load_plan(best).sizes
    pins = [word for a, n in mesh.items() for word in ("--set", f"{a}={n}")]
    found = json.loads(done("why-not", best, *pins, "--json").stdout)
    assert found["time"][-1]["difference"] == 0
    assert not found["tensors"]


@pytest.mark.parametrize(
    ("pins", "exit_code", "said"),
    [
        (("tensr=8",), 3, ("tensr = '8'", "'tensor'")),
        (("tensor=x",), 3, ("tensor = 'x'", "whole number")),
        (("tensor",), 3, ("--set 'tensor'", "KEY=VALUE")),
        (("tensor=8", "tensor=4"), 3, ("tensor is given twice", "keep one")),
        (("tensor=8", "data=8"), 4, ("data = 8, tensor = 8", "8 chips", "'auto'")),
        (("tensor=3",), 4, ("tensor = 3", "8 chips of cpu:8", "choose")),
        (("microbatches=5",), 3, ("batch of 16", "5 microbatches", "divisible by 5")),
    ],
)
def test_why_not_refuses(best, tmp_path, pins, exit_code, said):
    output = tmp_path / "other.json"
    words = [word for pin in pins for word in ("--set", pin)]
    message = fails(exit_code, "why-not", best, *words, "-o", output)
    assert all(words in message for words in said), message
    assert list(tmp_path.iterdir()) == []


def test_why_not_needs_a_plan_that_is_there_and_a_change(best, tmp_path):
    missing = tmp_path / "no.json"
    assert str(missing) in fails(3, "why-not", missing, "--set", "tensor=8")
    assert "--set" in cli("why-not", best).stderr
    assert cli("why-not", best).exit_code == 2


# -- search --------------------------------------------------------------------------

OBEYED = [
    ("tensor=4", lambda p: p.sizes["tensor"], 4),
    ("data=8", lambda p: p.sizes["data"], 8),
    ("microbatches=2", lambda p: p.microbatches, 2),
    ("remat=full", lambda p: p.remat, "full"),
    ("storage.optimizer=fsdp", lambda p: p.strategy.storage.optimizer, ("fsdp",)),
    ("rules.mlp=none", lambda p: _rule(p, "mlp"), ()),
    ("specs.embed=none,none", lambda p: _computed(p, "params/embed"), ((), ())),
]


def _rule(plan, logical):
    [axes] = [r.axes for r in plan.strategy.rules if r.logical == logical]
    return axes


def _computed(plan, path):
    [spec] = [t.compute for t in plan.tensors if t.path == path]
    return spec.dims


@pytest.mark.parametrize(("pin", "read", "value"), OBEYED)
def test_search_obeys_what_is_set(tmp_path, pin, read, value):
    path = tmp_path / "plan.json"
    done(*SEARCH, "--set", pin, "-o", path)
    assert read(api.load_plan(path)) == value


def test_no_time_leaves_structures_and_says_how_good_the_plan_is(best, tmp_path):
    path = tmp_path / "plan.json"
    done(*SEARCH, "--time-limit-s", 0, "-o", path)
    plan, optimum = api.load_plan(path), api.load_plan(best)
    certificate = plan.certificate
    assert certificate.left > 0
    assert not certificate.complete
    # The optimum of an unlimited search is within the gap that is claimed.
    least = plan.predicted.step_s / (1 + certificate.gap)
    assert least <= optimum.predicted.step_s <= plan.predicted.step_s
    assert optimum.certificate.complete


def interrupting(monkeypatch, nth):
    """Ctrl-C comes while the nth structure is priced."""
    price, calls = Pricer.price_all, itertools.count(1)

    def interrupted(self, *args, **options):
        if next(calls) == nth:
            raise KeyboardInterrupt
        return price(self, *args, **options)

    monkeypatch.setattr(Pricer, "price_all", interrupted)


def test_ctrl_c_writes_the_best_so_far(monkeypatch, tmp_path):
    path = tmp_path / "plan.json"
    interrupting(monkeypatch, 3)
    result = done(*SEARCH, "-o", path)
    assert "structures left (interrupted)" in result.stderr
    certificate = api.load_plan(path).certificate
    assert certificate.left > 0
    assert certificate.gap > 0


def test_ctrl_c_before_anything_was_found_writes_nothing(monkeypatch, tmp_path):
    interrupting(monkeypatch, 1)
    result = cli(*SEARCH, "-o", tmp_path / "plan.json")
    assert result.exit_code == 130
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_front_has_no_plan_that_another_beats(best, tmp_path):
    path = tmp_path / "plan.json"
    result = done(*SEARCH, "--pareto", "time,memory", "--json", "-o", path)
    plans = [ash.Plan.model_validate(p) for p in json.loads(result.stdout)]
    points = [(p.predicted.step_s, p.predicted.memory.total) for p in plans]
    assert len(points) > 2
    for one, other in itertools.permutations(points, 2):
        assert one[0] < other[0] or one[1] < other[1]
    # Its fast end is the best plan, which is the one that is written.
    assert points[0][0] == api.load_plan(best).predicted.step_s == min(points)[0]
    assert api.load_plan(path) == plans[0]
    # Its small end is the smallest there is: nothing fits chips of any less.
    given, least = resolved(), min(bytes_ for _, bytes_ in points)
    less = small_memory(ash.cluster("cpu:8"), (least - 1) / MEMORY_HEADROOM)
    with pytest.raises(InfeasibleError):
        ash.solver(given.step, given.batch, cluster=less).plans()


@pytest.mark.parametrize(
    ("args", "exit_code", "said"),
    [
        (("--set", "tensr=8"), 3, ("tensr = '8'", "'tensor'")),
        (("--set", "tensor=x"), 3, ("tensor = 'x'", "whole number")),
        (("--set", "remat=half"), 3, ("remat = 'half'", "'none'", "'full'")),
        (("--set", "rules.nme=tensor+x"), 3, ("rules.nme = 'tensor+x'",)),
        (("--set", "=8"), 3, ("--set '=8'", "KEY=VALUE")),
        (("--set", "data=2", "--set", "data=4"), 3, ("data is given twice",)),
        (("--set", "tensor=8", "--set", "data=2"), 4, ("data = 2", "8 chips")),
        (("--pareto", "time"), 3, ("--pareto 'time'", "time,memory")),
        (("--pareto", "time,memory", "--top", 2), 3, ("drop --top",)),
        (("--time-limit-s", -1), 2, ("--time-limit-s", "greater than or equal to")),
        (("--cluster", "no.toml:8"), 3, ("no.toml",)),
        (("--strategy", "no.toml"), 3, ("no.toml",)),
    ],
)
def test_search_refuses(tmp_path, args, exit_code, said):
    output = tmp_path / "plan.json"
    message = fails(exit_code, *SEARCH, *args, "-o", output)
    assert all(words in message for words in said), message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "exit_code", "said"),
    [
        ((), 3, ("target_tokens_per_s", "budget_gib")),
        (("--target-tokens-per-s", 0), 3, ("target_tokens_per_s = 0", "positive")),
        (("--budget-gib", -1), 3, ("budget_gib = -1", "positive")),
        (("--target-tokens-per-s", 1e18), 4, ("up to 131072", "larger batch")),
        (("--budget-gib", 1e-9), 4, ("up to 131072", "Ask for less")),
        (("--budget-gib", 1, "--cluster", "cpu:8"), 3, ("'cpu'", "'cpu:8'")),
        (("--budget-gib", 1, "--cluster", "h1000"), 3, ("h1000",)),
        (("--budget-gib", "x"), 2, ("--budget-gib", "valid number")),
    ],
)
def test_size_refuses(tmp_path, args, exit_code, said):
    output = tmp_path / "plan.json"
    message = fails(exit_code, *SIZE, *args, "-o", output)
    assert all(words in message for words in said), message
    assert list(tmp_path.iterdir()) == []
