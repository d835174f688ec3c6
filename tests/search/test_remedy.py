"""What is in conflict when nothing fits, against all sets of fixed fields."""

from __future__ import annotations

import itertools

import pytest
from helpers.spaces import floats, mlp_step, of_mesh, small_memory

from autoshard.cost.price import MEMORY_HEADROOM
from autoshard.ir.errors import InfeasibleError
from autoshard.plan.cluster import cluster
from autoshard.plan.files import load_strategy
from autoshard.search.pinning import fixed_fields
from autoshard.search.remedy import conflicts
from autoshard.search.solver import Solver

STEP, BATCH = mlp_step(layers=2), floats(8, 32)
SLOW = pytest.mark.slow
HELD = of_mesh(
    "data", "fsdp",
    sizes={"data": 4, "fsdp": 1},
    storage={"params": (), "gradients": (), "optimizer": ()},
    microbatches=1,
)  # fmt: skip


def fastest_s(solver, keys):
    """Of what fits with fields made holes, None if nothing does."""
    try:
        ranked = solver.pinned(dict.fromkeys(keys, "auto")).explored().ranked
    except InfeasibleError:
        return None
    return ranked[0][0] if ranked else None


# In this program, heads find nothing to shard. To shard the MLP is enough, and is no
# reason to speak of the heads.
ONE_SIDED = of_mesh(
    "tensor",
    sizes={"tensor": 4},
    rules={"heads": (), "mlp": ()},
    storage={"params": (), "gradients": (), "optimizer": ()},
    microbatches=1,
)  # fmt: skip
# The batch is spread over `data` alone, and parameters over an axis that then has more
# than one device: activations do not fit, whatever the sizes.
SPREAD = of_mesh(
    "data", "fsdp",
    rules={"batch": ("data",)},
    storage={"params": ("fsdp",), "gradients": ("fsdp",), "optimizer": ("fsdp",)},
    microbatches=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("held", "limit"),
    [
        (HELD, 90_000),
        *(pytest.param(HELD, limit, marks=SLOW) for limit in (120_000, 70_000)),
        (ONE_SIDED, 120_000),
        (SPREAD, 440_000),
        *(pytest.param(SPREAD, limit, marks=SLOW) for limit in (600_000, 250_000)),
    ],
)
def test_the_smallest_set_in_conflict_and_the_nearest_changes(held, limit):
    chips = small_memory(cluster("cpu:4"), limit)
    fixed = fixed_fields(held)
    batch = floats(1024, 32) if held is SPREAD else BATCH
    solver = Solver(STEP, (batch,), chips, held)
    opening = {
        keys: fastest_s(solver, keys)
        for size in range(len(fixed) + 1)
        for keys in itertools.combinations(fixed, size)
    }
    assert opening[()] is None
    texts, changes = conflicts(solver.space, chips, held)
    named = [text.split(" = ")[0] for text in texts]
    # In conflict: to open all the other fields does not help, and no smaller set does
    # that.
    others = tuple(key for key in fixed if key not in named)
    fits = opening[tuple(fixed)] is not None
    assert bool(named) == fits
    if fits:
        assert opening[others] is None
        for keys in itertools.combinations(fixed, len(named) - 1):
            rest = tuple(key for key in fixed if key not in keys)
            assert opening[rest] is not None, keys
    # Changes: the fewest fields, each with the time that it leads to.
    least = min((len(k) for k, s in opening.items() if s is not None), default=0)
    assert bool(changes) == fits
    for text, step_s in changes:
        keys = tuple(part.split(" = ")[0] for part in text.split(" and "))
        assert len(keys) == least
        ordered = tuple(key for key in fixed if key in keys)
        assert opening[ordered] == pytest.approx(step_s, rel=1e-9)


def test_the_line_of_a_file_is_said(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'name = "mine"\nabout = "x"\n[mesh]\ndata = "auto"\nfsdp = "auto"\n'
        '[rules]\nbatch = ["data", "fsdp"]\n[storage]\nparams = "auto"\n'
        'gradients = "auto"\noptimizer = []\n[schedule]\nmicrobatches = "auto"\n'
    )
    strategy = load_strategy(str(file))
    chips = small_memory(cluster("cpu:4"), 120_000)
    with pytest.raises(InfeasibleError) as caught:
        Solver(STEP, (BATCH,), chips, strategy).plans()
    assert "In conflict: storage.optimizer = [] (mine.toml:11)." in str(caught.value)


def test_what_fits_only_until_its_microbatches_are_traced_is_said_to_be_missing():
    cut = HELD.model_copy(
        update={"schedule": HELD.schedule.model_copy(update={"microbatches": 2})}
    )
    ample = Solver(STEP, (floats(16, 32),), cluster("cpu:4"), cut)
    [(_, priced, _, _)] = ample.explored().ranked
    traced = ample.plans()[0].predicted.memory.total
    assert priced < traced
    capacity = (priced + traced) / 2
    chips = small_memory(cluster("cpu:4"), capacity / MEMORY_HEADROOM)
    solver = Solver(STEP, (floats(16, 32),), chips, cut)
    assert len(solver.explored().ranked) == 1
    with pytest.raises(InfeasibleError) as caught:
        solver.plans()
    text = str(caught.value)
    needs = f"needs {traced / 1024:.1f} KiB a chip"
    assert f"(data=4, 2 microbatches, remat none) {needs}" in text
    assert "What would fit: " in text
