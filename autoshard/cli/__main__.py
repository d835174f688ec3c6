"""`python -m autoshard.cli`."""

from autoshard.cli import main

main()
