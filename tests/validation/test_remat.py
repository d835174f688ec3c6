"""What words on recomputation mean, against the documents that define them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from autoshard.cost.run import Recompute
from autoshard.cost.software import SOFTWARE, named
from autoshard.validation.remat import recompute

PUBLISHED = Path(__file__).parents[2] / "benchmarks/published"
XLA, MEGATRON, TITAN = (
    SOFTWARE[name] for name in ("xla", "megatron-core", "torchtitan")
)
PRODUCTS = ("qkv", "out", "up", "down")


@pytest.mark.parametrize("text", ["", "none", "None", "none (CK=False)", "none set"])
@pytest.mark.parametrize("by", [XLA, MEGATRON, TITAN])
def test_nothing(text, by):
    assert recompute(text, by) == Recompute()


@pytest.mark.parametrize("text", ["full", "Full", "full (per layer)"])
def test_everything(text):
    assert recompute(text, MEGATRON) == Recompute(1, 1, 1, 1, 1, 1, 1)
    # XLA drops the last product, whose result no gradient needs.
    assert recompute(text, XLA) == Recompute(1, 1, 1, 0, 1, 1, 1)


def test_eager_layers_are_replayed_whole_also_where_they_are_compiled():
    assert recompute("full", TITAN) == recompute("full", MEGATRON)


@pytest.mark.parametrize(
    ("policy", "kept", "again"),
    [
        # MaxText, configs/base.yml: what each policy saves.
        ("minimal", PRODUCTS, ("attention",)),
        ("remat_policy=minimal_with_context", (*PRODUCTS, "attention"), ()),
        ("save_dot_except_mlp", ("qkv", "out"), ("up", "attention")),
        # PaxML, AutodiffCheckpointType.
        ("SAVE_QKV_OUT_PROJ", ("qkv", "out"), ("up",)),
        ("SAVE_DOT_ONLY", PRODUCTS, ("attention",)),
        ("save_qkv_proj", ("qkv",), ("out", "up", "attention")),
        # What is named after "custom" is kept.
        ("custom: save context, q,k,v", ("qkv", "attention"), ("out", "up")),
        ("custom: out_proj=offload", ("out",), ("qkv", "up", "attention")),
        ("custom: mlpwi", ("up",), ("qkv", "out", "attention")),
        ("custom: decoder_layer_input offload", (), ("qkv", "out", "up", "attention")),
    ],
)
def test_policies_of_jax_trainers(policy, kept, again):
    found = recompute(policy, XLA)
    assert found is not None
    assert [getattr(found, part) for part in kept] == [0] * len(kept)
    assert [getattr(found, part) for part in again] == [1] * len(again)
    assert found.traffic > 0
    assert found.offloaded == ("offload" in policy)


def test_selective_recomputation_is_of_attention():
    """Korthikanti et al. 2022, section 5: scores and what follows from them."""
    found = recompute("selective", MEGATRON)
    assert found is not None
    assert found.attention == 1
    assert [getattr(found, part) for part in PRODUCTS] == [0] * 4


def test_selective_recomputation_of_torchtitan_is_of_every_second_product():
    found = recompute("selective (op)", TITAN)
    assert found is not None
    assert [getattr(found, part) for part in PRODUCTS] == [0.5] * 4
    assert found.attention == 0


@pytest.mark.parametrize("text", ["some", "1", "every second layer", "yes"])
def test_words_that_say_nothing_known(text):
    assert recompute(text, XLA) is None


def test_every_word_of_the_collection_is_known():
    for path in sorted(PUBLISHED.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                by = named(row.get("framework") or "", 2024)
                if by is not None and "recompute" in row:
                    assert recompute(row["recompute"], by) is not None, row["recompute"]


def test_shares_are_shares():
    for text in ("full", "minimal", "selective", "custom: context offload"):
        for by in SOFTWARE.values():
            found = recompute(text, by)
            assert found is not None
            for name in Recompute.__dataclass_fields__:
                assert 0 <= getattr(found, name) <= 1
