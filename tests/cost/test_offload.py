"""What offloading moves and what of it shows, against simulation and by hand."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.spaces import OneByOne, floats, of_mesh
from helpers.staged import scanned_mlp

from autoshard.cost.collectives import Meshes
from autoshard.cost.offload import Held, Phases, shown_s, transfers_s
from autoshard.cost.pipeline import Pipeline
from autoshard.ir.mesh import AXES
from autoshard.ir.train_step import train_step
from autoshard.plan.cluster import cluster
from autoshard.plan.strategy import OFFLOADABLE

H100 = cluster("h100:4")
LINK = 0.869 * 64e9  # bytes/s: PCIe Gen5 and the share of it that copies reach
HBM = 3.35e12


def simulated(compute_s, in_s, out_s, pieces):
    """Seconds of a phase, piece by piece: each of link in, chip and link out is busy
    with one piece at a time, and takes the next when it is there."""
    came = computed = went = 0.0
    for _ in range(pieces):
        came += in_s / pieces
        computed = max(computed, came) + compute_s / pieces
        went = max(went, computed) + out_s / pieces
    return went


@pytest.mark.parametrize(
    ("compute_s", "in_s", "out_s"),
    [(1.0, 0.3, 0.0), (1.0, 0.0, 2.5), (1.0, 3.0, 0.5), (0.2, 1.0, 1.0), (2.0, 1, 1.5)],
)
@pytest.mark.parametrize("pieces", [1, 2, 7, 32])
def test_what_shows_is_what_a_simulation_takes_longer(compute_s, in_s, out_s, pieces):
    vectors = [np.array([v]) for v in (compute_s, in_s, out_s, 1 / pieces)]
    expected = simulated(compute_s, in_s, out_s, pieces) - compute_s
    assert shown_s(*vectors)[0] == pytest.approx(expected)


def places(bytes_):
    """All of it in the blocks."""
    return np.array([[bytes_], [0.0], [0.0], [0.0], [0.0]])


def held(bytes_, pieces, forward=0.0, backward=0.0):
    of_block, none = np.array([bytes_ / pieces]), np.zeros((5, 1))
    return Held(places(bytes_), places(forward), places(backward), of_block, none)


def test_phases_by_hand():
    one = np.ones(1)
    phases = Phases(2 * one, 4 * one, 0.1 * one)
    size = 10 * LINK  # takes ten seconds one way
    moved_s = size / HBM  # and this in the chip's own memory
    found = {
        "optimizer": held(size, 5),
        "params": held(size, 10, forward=size, backward=size),
        "activations": held(size, 4),
    }

    def shown(*kinds, cuts=1.0):
        own = {kind: found[kind] for kind in kinds}
        parts = transfers_s(own, phases, H100, cuts * one, one)
        return [float(table.sum()) for table in parts]

    # Ten seconds in and ten out beside a tenth; of five pieces the first comes in, and
    # the others' compute and way out show once: 10 + (c + 10) / 5 - 0.1.
    update = 10 + (0.1 + 2 * moved_s + 10) / 5 - 0.1
    assert shown("optimizer") == pytest.approx([update, update])
    # Out beside two seconds of forward passes, in beside four of backward passes.
    forward = 10 + (2 + moved_s) / 4 - 2
    backward = 10 + (4 + moved_s) / 4 - 4
    assert shown("activations") == pytest.approx([forward + backward, 0.0])
    # In for each pass of each of three microbatches; in and out for the update.
    forward = 30 + (2 + 3 * moved_s) / 10 - 2
    backward = 30 + (4 + 3 * moved_s) / 10 - 4
    update = 10 + (0.1 + 2 * moved_s + 10) / 10 - 0.1
    both = pytest.approx([forward + backward + update, update])
    assert shown("params", cuts=3.0) == both


def pricer_of(step, batch, remat="none"):
    strategy = of_mesh("data", "fsdp", storage={"params": ("fsdp",)}, remat=remat)
    return OneByOne(step, batch, strategy).pricer(
        strategy.model_copy(
            update={
                "mesh": {"data": 2, "fsdp": 2},
                "rules": (strategy.rules[0].model_copy(update={"axes": ("data",)}),),
            }
        )
    )


ROW = np.array([[{"data": 2, "fsdp": 2}.get(axis, 1) for axis in AXES]])
MESHES = Meshes(H100, ROW)
BLOCKS, WIDTH, HIDDEN, VOCAB, BATCH = 6, 16, 32, 256, 8
STEP = scanned_mlp(BLOCKS, WIDTH, HIDDEN, VOCAB)
WEIGHTS = 2 * WIDTH * HIDDEN * 4  # bytes of one block, float32


def test_pieces_are_blocks_or_the_largest_parameter_by_hand():
    pricer = pricer_of(STEP, floats(BATCH, WIDTH))
    one = np.ones(1)
    params = pricer.liveness.held("params", MESHES, one)
    # Every parameter is cut in two by fsdp: blocks, the first table, the last one.
    first, last = WIDTH * WIDTH * 4, WIDTH * VOCAB * 4
    assert params.bytes_.sum() == (BLOCKS * WEIGHTS + first + last) / 2
    assert params.of_block[0] == WEIGHTS / 2
    assert params.piece()[0] == last / 2
    # The gradient of the first table needs its operand and not the table itself: its
    # input is data. All others are read in both passes.
    assert params.forward.sum() == params.bytes_.sum()
    assert params.backward.sum() == params.bytes_.sum() - first / 2
    # Two moments of each; those of one parameter come together.
    moments = pricer.liveness.held("optimizer", MESHES, one)
    assert moments.of_block[0] == 2 * WEIGHTS
    assert moments.largest.max() == 2 * last


@pytest.mark.parametrize(
    ("remat", "block"),
    [
        # A block's input; what tanh made, for the product after it; and, of JAX's rule
        # for tanh, one minus that.
        ("none", WIDTH + 2 * HIDDEN),
        ("dots", WIDTH + HIDDEN),  # its input, and the result of the first product
        ("full", WIDTH),
    ],
)
def test_activations_are_those_that_remat_keeps_by_hand(remat, block):
    pricer = pricer_of(STEP, floats(BATCH, WIDTH), remat)
    found = pricer.liveness.held("activations", MESHES, 2 * np.ones(1))
    rows = BATCH / 2 / 2  # over data, in two microbatches
    assert found.of_block[0] == pytest.approx(rows * block * 4)
    assert found.bytes_[0, 0] == pytest.approx(BLOCKS * rows * block * 4)


def test_peaks_are_those_of_memory_for_every_set():
    step = scanned_mlp(BLOCKS, WIDTH, HIDDEN, 2048)
    sets = [
        some
        for size in range(len(OFFLOADABLE) + 1)
        for some in itertools.combinations(OFFLOADABLE, size)
    ]
    for remat in ("none", "full"):
        liveness = pricer_of(step, floats(64, WIDTH), remat).liveness
        cuts = np.array([1.0])
        held = {k: liveness.held(k, MESHES, cuts) for k in OFFLOADABLE}
        peaks = liveness.peaks(MESHES, cuts, None, None, held, sets)
        for some, peak in zip(sets, peaks, strict=True):
            own = {kind: held[kind] for kind in some}
            expected, table = liveness.memory(MESHES, cuts, held=own)
            assert peak == pytest.approx(expected)
            assert sum(table.values()) == pytest.approx(expected)


def test_what_is_offloaded_leaves_the_chip_but_for_its_pieces():
    # Of a large optimizer state, at the peak of the backward pass nothing is left.
    def loss(w, x):
        return (jnp.tanh(x @ w) ** 2).mean()

    step = train_step(loss, optax.adam(1e-3), model=lambda key: jnp.ones((64, 64)))
    pricer = pricer_of(step, floats(4096, 64))
    one = np.ones(1)
    plain, before = pricer.liveness.memory(MESHES, one)
    held = {"optimizer": pricer.liveness.held("optimizer", MESHES, one)}
    peak, after = pricer.liveness.memory(MESHES, one, held=held)
    moments = 2 * 64 * 64 * 4 + 4  # and the count of steps
    assert before["optimizer"][0] == moments
    assert after["optimizer"][0] == 0
    assert plain[0] - peak[0] == before["optimizer"][0]
    # With a batch of one row the peak is in the update, with three pieces at once: the
    # moments of the only parameter, which are more than they were.
    small = pricer_of(step, floats(4, 64)).liveness
    held = {"optimizer": small.held("optimizer", MESHES, one)}
    _, after = small.memory(MESHES, one, held=held)
    assert after["optimizer"][0] == 3 * moments


@pytest.mark.parametrize("kind", OFFLOADABLE)
@pytest.mark.parametrize("stages", [1, 2])
def test_offloading_only_adds_time(kind, stages):
    pricer = pricer_of(STEP, floats(BATCH, WIDTH))
    row, cuts = ROW.copy(), np.array([2.0])
    row[0, AXES.index("stage")] = stages
    chips = cluster("h100:8") if stages == 2 else H100

    def step_s(offload):
        if stages == 1:
            return pricer.price(chips, row, cuts, offload=offload).step_s[0]
        how = [Pipeline("1f1b")]
        (found,) = pricer.price_stages(chips, row, cuts, how, offload=offload)
        return found.step_s[0]

    assert step_s((kind,)) > step_s(())
    assert step_s(OFFLOADABLE) > step_s((kind,))
