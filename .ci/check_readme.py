"""Check that the README gives the test command, and only make targets that exist.

python .ci/check_readme.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEST_COMMAND = "make test"


def fenced_lines(markdown: str) -> list[str]:
    """Lines inside code fences, without a leading prompt or a trailing comment."""
    lines = []
    inside = False
    for line in markdown.splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        elif inside:
            lines.append(re.sub(r"\s+#.*", "", line.strip().removeprefix("$ ")).strip())
    return lines


def problems(readme: str, makefile: str) -> list[str]:
    """Say what is wrong with the README, one sentence each."""
    lines = fenced_lines(readme)
    found = []
    if TEST_COMMAND not in lines:
        found.append(f"README.md has no code block with the line `{TEST_COMMAND}`")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    for line in lines:
        match = re.match(r"make ([a-z-]+)", line)
        if match and match[1] not in targets:
            found.append(f"README.md says `{line}`; the Makefile has no such target")
    return found


def main() -> int:
    """Check this repository's README."""
    readme = ROOT / "README.md"
    if not readme.is_file():
        print("README.md is missing")
        return 1
    found = problems(readme.read_text("utf-8"), (ROOT / "Makefile").read_text("utf-8"))
    print("\n".join(found) or f"README.md gives `{TEST_COMMAND}`")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
