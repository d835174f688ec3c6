"""Run every notebook of a folder and write the executed copies to another.

    python .ci/run_notebooks.py notebooks build/notebooks

A notebook is `NAME.py` (Jupytext, percent format) or `NAME.ipynb`. Where both are
kept, their code must be the same, and it runs once. A leading underscore marks a
module that notebooks import.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

CELL_TIMEOUT_S = 600


def code_of(notebook: nbformat.NotebookNode) -> list[str]:
    """The code cells' text."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def execute(path: Path, target: Path) -> str | None:
    """Run one notebook from its own folder; return what went wrong, if anything."""
    notebook = jupytext.read(path)
    twin = path.with_suffix(".ipynb")
    if (
        twin != path
        and twin.exists()
        and code_of(jupytext.read(twin)) != code_of(notebook)
    ):
        return f"{twin.name} and {path.name} differ; run `jupytext --sync {twin.name}`"
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    problem = None
    try:
        client.execute()
    except CellExecutionError as error:
        problem = str(error)
    nbformat.write(notebook, target / f"{path.stem}.ipynb")
    return problem


def main() -> int:
    """Run the notebooks of the folder named first into the folder named second."""
    if len(sys.argv) != 3:
        print("usage: run_notebooks.py SOURCE_FOLDER TARGET_FOLDER")
        return 2
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    paths = [*source.glob("*.py"), *source.glob("*.ipynb")]
    # A .py wins over its .ipynb, since it comes first.
    by_stem: dict[str, Path] = {}
    for path in paths:
        if not path.name.startswith("_"):
            by_stem.setdefault(path.stem, path)
    if not by_stem:
        print(f"{source} holds no notebook (*.py or *.ipynb)")
        return 1
    target.mkdir(parents=True, exist_ok=True)
    failed = 0
    for _, path in sorted(by_stem.items()):
        start_s = time.monotonic()
        problem = execute(path, target)
        elapsed_s = time.monotonic() - start_s
        print(f"{path}: {'FAILED' if problem else 'ok'} in {elapsed_s:.0f} s")
        if problem:
            failed += 1
            print(problem)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
