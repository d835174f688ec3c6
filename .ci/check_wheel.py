"""Check that a wheel carries every data file and puts one name on the import path.

python .ci/check_wheel.py build/dist/autoshard-0.1.0-py3-none-any.whl
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Where data lies in the repository -> where it must lie in the wheel.
DATA = {
    "strategies/*.toml": "autoshard/strategies",
    "autoshard/plan/catalogue/*.toml": "autoshard/plan/catalogue",
    "autoshard/py.typed": "autoshard",
}


def problems(wheel: Path) -> list[str]:
    """Say what is wrong with `wheel`, one sentence each."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    found = []
    for pattern, folder in DATA.items():
        sources = sorted(ROOT.glob(pattern))
        if not sources:
            found.append(f"the repository has no {pattern}")
        missing = [s.name for s in sources if f"{folder}/{s.name}" not in names]
        if missing:
            found.append(f"{folder} in the wheel lacks {', '.join(missing)}")
    tops = {name.split("/")[0] for name in names}
    extra = {top for top in tops if not top.endswith(".dist-info")} - {"autoshard"}
    if extra:
        found.append(f"the wheel installs other top-level names: {sorted(extra)}")
    return found


def main() -> int:
    """Check the wheels named on the command line."""
    wheels = [Path(argument) for argument in sys.argv[1:]]
    if not wheels:
        print("usage: check_wheel.py WHEEL...")
        return 2
    found = [f"{wheel.name}: {text}" for wheel in wheels for text in problems(wheel)]
    print("\n".join(found) or f"{', '.join(w.name for w in wheels)}: complete")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
