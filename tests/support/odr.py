"""Looks for inline functions that two ISA levels would share: ``python -m tests.support.odr BUILD_FOLDER...``

Every kernel source is compiled once per level. An inline function or template that is not in its level's namespace gets
the same symbol from each of them, the linker keeps one, and a CPU without AVX-512 may then run AVX-512 instructions
long after the dispatch. Such a symbol is weak (nm: W, V) or unique (u), and its name does not hold the namespace.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# The compiler's own reference to the personality routine: a pointer, the same in every object.
HARMLESS = re.compile(r"DW\.ref\.")


def shared_symbols(nm_output: str, level: str) -> list[str]:
    """The names in ``nm --demangle`` output that are shared between objects and do not hold the level's namespace.

    It may stand anywhere in the name: ``std::sort`` over a type of the level is the level's own, too.
    """
    symbols = [line.split(maxsplit=2) for line in nm_output.splitlines() if line]
    own = f"qops::cpu::{level}::"
    return [name for _, kind, name in symbols if kind in "WVu" and own not in name and not HARMLESS.match(name)]


def check(build: Path) -> list[str]:
    """One line per shared symbol in the level libraries of a CMake build folder."""
    objects = sorted(build.glob("**/qops_cpu_*.dir/**/*.o"))
    if not objects:
        raise FileNotFoundError(f"{build} holds no objects of ISA levels")
    found = []
    for path in objects:
        level = next(p for p in path.parts if p.startswith("qops_cpu_")).removeprefix("qops_cpu_").removesuffix(".dir")
        names = subprocess.check_output(["nm", "--demangle", "--defined-only", str(path)], text=True)
        found += [f"{path.name} ({level}): {symbol}" for symbol in shared_symbols(names, level)]
    return found


def main(folders: Sequence[str]) -> int:
    if not folders:
        print(__doc__)
        return 2
    found = [line for folder in folders for line in check(Path(folder))]
    print("\n".join(found) or f"no shared inline functions in {', '.join(folders)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
