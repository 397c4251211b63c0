"""Faults that can be planted in a source, one edit each: what tests.support.mutate draws from."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

SWAPS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "/", "/": "*"}
SWAPS |= {"%": "*", "&": "|", "|": "&", "<<": ">>", ">>": "<<"}
SWAPS |= {"+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=", "&=": "|=", "|=": "&="}
PYTHON_SWAPS = SWAPS | {"and": "or", "or": "and", "is": "is not", "is not": "is", "in": "not in", "not in": "in"}
PYTHON_SWAPS |= {"//": "*", "**": "*"}
CPP_SWAPS = SWAPS | {"&&": "||", "||": "&&"}
# Functions that do not care which argument comes first.
SYMMETRIC = frozenset(("equal", "max", "min", "suppress", "swap", "transpose"))


@dataclass(frozen=True)
class Fault:
    """text[start:end] becomes `other`."""

    start: int
    end: int
    other: str

    def planted(self, text: str) -> str:
        return text[: self.start] + self.other + text[self.end :]

    def lines(self, text: str) -> tuple[int, str, str]:
        """Number of the first line, and the lines before and after, their white space collapsed."""
        first = text.rfind("\n", 0, self.start) + 1
        last = (text + "\n").index("\n", self.end)
        before, after = text[first:last], text[first : self.start] + self.other + text[self.end : last]
        return text.count("\n", 0, self.start) + 1, " ".join(before.split()), " ".join(after.split())


def faults(name: str, text: str) -> list[Fault]:
    """All of a file, in its order."""
    found = set(_python(text) if name.endswith(".py") else _cpp(text))
    return sorted((fault for fault in found if fault.planted(text) != text), key=lambda f: (f.start, f.end, f.other))


def _altered(number: str) -> str:
    """Another number of the same type."""
    return f"({number} + 1)" if re.fullmatch(r"\d+[uUlL]*|0[xX][\da-fA-F]+[uUlL]*", number) else f"(2 * {number} + 1)"


# Python --------------------------------------------------------------------------------------------------------------

_DELETED = (ast.Expr, ast.Assign, ast.AugAssign, ast.Raise, ast.Return, ast.Delete, ast.Assert, ast.Break, ast.Continue)


class _Places:
    """Offsets in the text of what ast counts in lines and bytes."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = text.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def _at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def start(self, node: ast.expr | ast.stmt | ast.keyword) -> int:
        return self._at(node.lineno, node.col_offset)

    def end(self, node: ast.expr | ast.stmt | ast.keyword) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self._at(node.end_lineno, node.end_col_offset)

    def source(self, node: ast.expr | ast.keyword) -> str:
        return self.text[self.start(node) : self.end(node)]


def _python(text: str) -> Iterator[Fault]:
    places = _Places(text)
    tree = ast.parse(text)
    skipped = _without_effect(tree)

    def visit(node: ast.AST, function: int | None) -> Iterator[Fault]:
        """function: where the one around it begins."""
        if node in skipped:
            return
        is_deleted = function is not None and isinstance(node, _DELETED)
        if is_deleted and not _names_first(node, text[function : places.start(node)]):
            yield Fault(places.start(node), places.end(node), "pass")
        if isinstance(node, ast.AugAssign):
            yield from _swapped(places, node.target, node.value)
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield Fault(places.start(node.test), places.end(node.test), f"not ({places.source(node.test)})")
        if isinstance(node, ast.expr):
            yield from _of_expression(places, node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = places.start(node)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(tree, None)


def _names_first(node: ast.stmt, before: str) -> bool:
    """Whether the rest of a function needs an assignment, so that any test sees that it is gone."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    return any(re.search(rf"\b{name}\b", before) is None for name in names)


def _without_effect(tree: ast.Module) -> set[ast.AST]:
    """Annotations, docstrings and what f-strings are made of, which before Python 3.12 has no places of its own."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            skipped.add(node)
        for field in ("annotation", "returns"):
            if (annotation := getattr(node, field, None)) is not None:
                skipped.add(annotation)
    return skipped


def _of_expression(places: _Places, node: ast.expr) -> Iterator[Fault]:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield Fault(places.start(node), places.end(node), str(not node.value))
        elif isinstance(node.value, int | float):
            yield Fault(places.start(node), places.end(node), _altered(places.source(node)))
        elif isinstance(node.value, str) and node.value and "\n" not in places.source(node):
            yield Fault(places.start(node), places.end(node), repr(node.value + "_"))
    elif isinstance(node, ast.Compare):
        for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
            yield from _swapped(places, left, right)
    elif isinstance(node, ast.BoolOp):
        for left, right in zip(node.values, node.values[1:], strict=False):
            yield from _swapped(places, left, right)
    elif isinstance(node, ast.BinOp):
        yield from _swapped(places, node.left, node.right)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield Fault(places.start(node), places.start(node.operand), "")
    elif isinstance(node, ast.Call):
        yield from _of_arguments(places, node)


def _swapped(places: _Places, left: ast.expr, right: ast.expr) -> Iterator[Fault]:
    start, between = places.end(left), places.text[places.end(left) : places.start(right)]
    operator = re.search(r"\b(?:is not|not in|is|in|and|or)\b|<<|>>|//|\*\*|[-+*/&|<>=!]=|[-+*/%<>&|]", between)
    if operator is not None and operator[0] in PYTHON_SWAPS:
        yield Fault(start + operator.start(), start + operator.end(), PYTHON_SWAPS[operator[0]])


def _of_arguments(places: _Places, call: ast.Call) -> Iterator[Fault]:
    function = places.text[places.start(call) : places.end(call.func)].rpartition(".")[2]
    pairs = () if function in SYMMETRIC else zip(call.args, call.args[1:], strict=False)
    for a, b in pairs:
        if not isinstance(a, ast.Starred) and not isinstance(b, ast.Starred):
            middle = places.text[places.end(a) : places.start(b)]
            yield Fault(places.start(a), places.end(b), places.source(b) + middle + places.source(a))
    for keyword in call.keywords:
        if keyword.arg is not None:
            comma = re.match(r"\s*,", places.text[places.end(keyword) :])
            yield Fault(places.start(keyword), places.end(keyword) + (comma.end() if comma else 0), "")


# C++ and CUDA --------------------------------------------------------------------------------------------------------

_NUMBER = r"(?<![\w.])(?:0[xX][\da-fA-F]+|\d+\.\d*(?:[eE][-+]?\d+)?|\d+)[uUlLfF]*(?![\w.])"
_OPERATOR = r"(?<= )(?:<<|>>|&&|\|\||[-+*/&|<>=!]=|[-+*/%<>&|])(?= )"
_ARGUMENTS = r"(\w*)\(([^(),;{}]+), ([^(),;{}]+)(?=[,)])"
# A call or an assignment; what begins with a type and a name declares something that the rest needs.
_PLACE = r"(?:::)?[\w.:\[\]*>()&-]+(?:<[\w:, ]*>)?"
_STATEMENT = rf"\s*(?:(?:else )?if \(.*\) )?(?:return\b.*|{_PLACE}(?:\(.*\)| [-+*/|&^%<>]*= .*|\+\+|--))"


def _cpp(text: str) -> Iterator[Fault]:
    code = _masked(text)
    for found in re.finditer(_NUMBER, code):
        yield Fault(*found.span(), _altered(found[0]))
    for found in re.finditer(r"\btrue\b|\bfalse\b", code):
        yield Fault(*found.span(), "false" if found[0] == "true" else "true")
    for found in re.finditer(_OPERATOR, code):
        yield Fault(*found.span(), CPP_SWAPS[found[0]])
    for found in re.finditer(_ARGUMENTS, code):
        (a, b), (c, d) = found.span(2), found.span(3)
        if found[1] not in SYMMETRIC:
            yield Fault(a, d, text[c:d] + ", " + text[a:b])
    for start, end in _statements(code):
        if re.fullmatch(_STATEMENT, code[start:end].rstrip(";"), flags=re.DOTALL):
            first = start + len(code[start:end]) - len(code[start:end].lstrip())
            yield Fault(first, end, ";")


def _masked(text: str) -> str:
    """Blanks in the place of comments, strings, characters and lines of the preprocessor."""
    noise = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?<!\w)\'(?:\\.|[^\'\\\n])+\'|^[ \t]*#(?:\\\n|[^\n])*'
    return re.sub(noise, lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.DOTALL | re.MULTILINE)


def _statements(code: str) -> Iterator[tuple[int, int]]:
    """What ends with a semicolon, but in the head of a for."""
    start = depth = 0
    for at, character in enumerate(code):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0 and character in ";{}":
            if character == ";":
                yield start, at + 1
            start = at + 1
