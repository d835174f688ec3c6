"""Training a lowered plan: data, checkpoints, and the loop that can be interrupted.

Importing this package does not import Orbax; opening a checkpoint directory does.
"""

from autoshard.train.checkpoint import Checkpoints, Restored
from autoshard.train.checksum import tree_checksums
from autoshard.train.data import ByteCorpus
from autoshard.train.trainer import Trainer, TrainResult

__all__ = [
    "ByteCorpus",
    "Checkpoints",
    "Restored",
    "TrainResult",
    "Trainer",
    "tree_checksums",
]
