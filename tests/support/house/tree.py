"""The files of the tree, what its schemas say, and how violations are shown."""

from __future__ import annotations

from pathlib import Path

from tests.support.house import rules

ROOT = Path(__file__).resolve().parents[3]
FILES = {str(path.relative_to(ROOT)): path.read_text(errors="replace") for path in rules.authored_files(ROOT)}
CPP = {p: text for p, text in FILES.items() if p.startswith("csrc/") and not p.endswith(("CMakeLists.txt", ".cmake"))}
PYTHON = {path: text for path, text in FILES.items() if path.endswith(".py")}
README, CONTRIBUTING = FILES["README.md"], FILES["CONTRIBUTING.md"]
PAGES = ("README.md", "docs/operators.md", "docs/peft.md", "docs/serving.md", "docs/tensor_parallel.md")
BINDING = {path: text for path, text in CPP.items() if path.startswith("csrc/binding/")}
SCHEMAS = rules.schemas(CPP["csrc/binding/schemas.h"])
OPS = sorted({rules.op_name(schema) for schema in SCHEMAS})
PUBLIC_OPS = [op for op in OPS if op not in rules.INTERNAL_OPS]
STEMS = {rules.stem_of(op) for op in OPS}


def assert_none(found: dict[str, list[str]]) -> None:
    lines = [f"{where}:{what}" for where, violations in found.items() for what in violations]
    assert not lines, "\n" + "\n".join(lines)
