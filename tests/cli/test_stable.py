"""The same input gives the same plan, byte for byte, whatever the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_lm import MODEL

TESTS = Path(__file__).parents[1]


def searched(path, seed, *args):
    """What a process of its own prints, and the file that it writes."""
    words = ["search", MODEL, "--cluster", "cpu:8", "--batch", "16", "--seq", "32"]
    paths = os.pathsep.join([str(TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "autoshard.cli", *words, *args, "-o", str(path)],
        capture_output=True,
        env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout, path.read_bytes()


@pytest.mark.parametrize(
    "args",
    [
        ("--strategy", "fsdp-tp"),
        ("--strategy", "auto", "--top", "3", "--json"),
    ],
    ids=" ".join,
)
def test_processes_agree_to_the_byte(tmp_path, args):
    once = searched(tmp_path / "once.json", "1", *args)
    again = searched(tmp_path / "again.json", "2", *args)
    assert once == again
    assert len(once[1]) > 1000
