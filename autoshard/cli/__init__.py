"""The command line: `autoshard search`, `explain`, `compare`, `run` and the lists.

Results go to stdout, progress and errors to stderr. The exit code says which kind of
error it was; see `autoshard.ir.errors`.
"""

from __future__ import annotations


def main() -> None:
    """Runs the command line; the entry point of the `autoshard` script."""
    from autoshard.cli.app import app

    app(prog_name="autoshard")
