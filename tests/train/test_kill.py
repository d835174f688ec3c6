"""A real process, killed by SIGKILL at a random step and resumed."""

import random

import pytest
from helpers import killed


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    asked = random.Random(seed).randint(killed.FIRST_KILL, killed.LAST_KILL)
    print(f"seed {seed}: kill at step {asked}")  # noqa: T201  shown when it fails
    killed.run_to_the_end(tmp_path / "whole")
    found = killed.run_killed(tmp_path / "killed", asked=asked)
    print(f"died after step {found.died_after}, resumed at {found.resumed_at}")  # noqa: T201
    killed.check(found, killed.read_metrics(tmp_path / "whole"))


@pytest.mark.parametrize("spoil", ["missing", "doubled", "different", "from nothing"])
def test_the_check_can_fail(spoil):
    expected = [
        {"step": k, "loss": f"{5 - k / 8}", "grad_norm": f"{1 + k / 8}"}
        for k in range(killed.STEPS)
    ]
    good = killed.Killed(12, 13, 10, expected[:14], list(expected))
    killed.check(good, expected)
    after = list(expected)
    if spoil == "missing":
        del after[11]
    elif spoil == "doubled":
        after.insert(11, after[11])
    elif spoil == "different":
        after[20] = {**after[20], "grad_norm": after[20]["grad_norm"] + "1"}
    bad = good._replace(after=after)
    if spoil == "from nothing":
        bad = good._replace(resumed_at=0)
    with pytest.raises(AssertionError):
        killed.check(bad, expected)
