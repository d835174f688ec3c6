"""What published rows say of recomputation, as shares of a block's forward pass."""

from __future__ import annotations

import re
from dataclasses import replace

from autoshard.cost.run import Recompute
from autoshard.cost.software import Software

# What each policy's name keeps is documented in MaxText's base.yml and in PaxML's
# AutodiffCheckpointType: the shares follow from it.
_NEEDED = Recompute(traffic=0.7)
_POLICIES: tuple[tuple[str, Recompute], ...] = (
    ("qkv_out_proj", replace(_NEEDED, up=1.0)),
    ("minimal_with_context", Recompute(traffic=0.5)),
    ("minimal", Recompute(attention=1.0, traffic=0.5)),
    ("save_dot_except_mlp", replace(_NEEDED, up=1.0, attention=1.0)),
    ("save_dot_only", replace(_NEEDED, attention=1.0)),
)
_SOME = {
    # Attention alone: Korthikanti et al. 2022, arXiv:2205.05198, section 5.
    "megatron": Recompute(attention=1.0, traffic=0.1),
    # Every second product is kept.
    "torchtitan": Recompute(0.5, 0.5, 0.5, 0.5, 0.0, 1.0, 0.0),
}


def recompute(text: str, software: Software) -> Recompute | None:
    """Reads the `recompute` column.

    Args:
        text: Of the column.
        software: That ran it.

    Returns:
        The shares, or None where the words say nothing that is known.

    >>> from autoshard.cost.software import SOFTWARE
    >>> recompute("full", SOFTWARE["xla"]).down
    0.0
    """
    words = text.lower()
    if not words or words.startswith("none"):
        # Nothing printed: the frameworks' defaults recompute nothing.
        return Recompute()
    for name, shares in _POLICIES:
        if name in words:
            return shares
    replays_all = software.fusion != "compiler" or software.name == "torchtitan"
    whole = Recompute.full(replays_all)
    if "custom" in words or re.search(r"save_qkv|qkv_proj", words):
        return _kept(words, whole)
    if "selective" in words:
        known = software.name if software.name in _SOME else "megatron"
        return _SOME[known]
    if "full" in words:
        return whole
    return None


def _kept(words: str, whole: Recompute) -> Recompute:
    """A list of tensors that are kept, on the device or in the host's memory."""
    return replace(
        whole,
        qkv=0.0 if re.search(r"q,k,v|qkv|query_proj", words) else 1.0,
        out=0.0 if "out_proj" in words else 1.0,
        attention=0.0 if "context" in words else 1.0,
        up=0.0 if "mlpwi" in words else 1.0,
        down=0.0,
        offloaded=float("offload" in words),
    )
