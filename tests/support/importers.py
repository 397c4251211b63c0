"""Which test files depend on Transformers, so that they are run with several versions of it.

    python -m tests.support.importers

prints those that import it, or a module of qops that does: at their top or inside functions,
themselves or through other files of tests/.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def imports(text: str) -> set[str]:
    """Dotted names that a file imports anywhere; of ``from a import b`` both a and a.b, as b may be a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def importers(package: str, library: Mapping[str, str], tests: Mapping[str, str]) -> set[str]:
    """The `tests` that depend on it. Both are dotted name -> text.

    From a module of the library nothing is followed further: all hang together through imports inside functions.
    """
    reach = {name: imports(text) for name, text in (*library.items(), *tests.items())}
    found = {name for name, names in reach.items() if package in {each.partition(".")[0] for each in names}}
    while more := {name for name in tests if reach[name] & found} - found:
        found |= more
    return found & set(tests)


def transformers_tests() -> list[str]:
    """Paths of the test files that depend on Transformers."""
    package = ROOT / "python"
    library = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    tests = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "tests").rglob("*.py")}
    texts = ({name: path.read_text() for name, path in paths.items()} for paths in (library, tests))
    found = importers("transformers", *texts)
    return sorted(str(tests[name].relative_to(ROOT)) for name in found if tests[name].name.startswith("test_"))


if __name__ == "__main__":
    sys.stdout.write("".join(f"{path}\n" for path in transformers_tests()))
