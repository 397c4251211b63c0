"""Packages that are only read: modules whose functions and classes check how they are called, and do nothing.

``Packages`` is an import hook. What it imports is parsed, not executed, so that neither a GPU nor the package's own
requirements are needed.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import inspect
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

Definition = ast.FunctionDef | ast.ClassDef


class Anything:
    """The result of a call that was right: whatever is done with it goes on."""

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Anything:
        return self

    def __getitem__(self, key: Any) -> Anything:
        return self

    def __iter__(self) -> Iterator[Anything]:
        return iter((self, self, self))


def signature(function: ast.FunctionDef, *, method: bool = False) -> inspect.Signature:
    """With defaults as something that is there; their values do not matter."""
    kinds, given = inspect.Parameter, function.args
    positional = [*((a, kinds.POSITIONAL_ONLY) for a in given.posonlyargs)]
    positional += [(a, kinds.POSITIONAL_OR_KEYWORD) for a in given.args]
    first_default = len(positional) - len(given.defaults)
    parameters = [
        kinds(arg.arg, kind, default=None if i >= first_default else kinds.empty)
        for i, (arg, kind) in enumerate(positional)
    ]
    if given.vararg is not None:
        parameters.append(kinds(given.vararg.arg, kinds.VAR_POSITIONAL))
    for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        parameters.append(kinds(arg.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None))
    if given.kwarg is not None:
        parameters.append(kinds(given.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters[1:] if method else parameters)


def _fields(definition: ast.ClassDef) -> inspect.Signature:
    """Of a dataclass's ``__init__``."""
    kinds = inspect.Parameter
    return inspect.Signature(
        [
            kinds(node.target.id, kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if node.value is None else None)
            for node in definition.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        ]
    )


def _bind(name: str, checked: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        checked.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}{checked}: {error}") from error


class Function:
    def __init__(self, name: str, definition: ast.FunctionDef, *, method: bool = False) -> None:
        self.name, self.signature = name, signature(definition, method=method)

    def __call__(self, *args: Any, **kwargs: Any) -> Anything:
        _bind(self.name, self.signature, args, kwargs)
        return Anything()


class Class:
    def __init__(self, name: str, definition: ast.ClassDef) -> None:
        self.name = name
        self.methods = {node.name: node for node in definition.body if isinstance(node, ast.FunctionDef)}
        assigned = [node for node in definition.body if isinstance(node, ast.Assign)]
        self.constants = {t.id for node in assigned for t in node.targets if isinstance(t, ast.Name)}
        init = self.methods.get("__init__")
        self.signature = _fields(definition) if init is None else signature(init, method=True)

    def __getattr__(self, name: str) -> Anything:
        if name in self.constants:
            return Anything()
        raise AttributeError(f"{self.name} has no {name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Instance:
        _bind(self.name, self.signature, args, kwargs)
        return Instance(self)


class Instance:
    """Methods of the class are checked; those of a module of torch give the instance."""

    def __init__(self, made_by: Class) -> None:
        self._class = made_by

    def __getattr__(self, name: str) -> Any:
        if name in self._class.methods:
            return Function(f"{self._class.name}.{name}", self._class.methods[name], method=True)
        if hasattr(torch.nn.Module, name):
            return lambda *args, **kwargs: self
        raise AttributeError(f"{self._class.name} has no {name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Anything:
        return self.forward(*args, **kwargs) if "forward" in self._class.methods else Anything()


class Packages(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the named packages of a folder without executing them."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, tuple(names)

    def file(self, module: str) -> Path | None:
        path = self.folder.joinpath(*module.split("."))
        return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file()), None)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in self.names or self.file(fullname) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return types.ModuleType(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        def attribute(name: str) -> Function | Class:
            definition = None if name.startswith("__") else self.definition(module.__name__, name)
            if definition is None:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            full_name = f"{module.__name__}.{name}"
            return (
                Class(full_name, definition)
                if isinstance(definition, ast.ClassDef)
                else Function(full_name, definition)
            )

        module.__getattr__ = attribute  # type: ignore[method-assign]

    def definition(self, module: str, name: str) -> Definition | None:
        """Where a name of a module is defined, through its imports and other names."""
        file = self.file(module)
        if file is None:
            return None
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.FunctionDef(name=defined) | ast.ClassDef(name=defined) if defined == name:
                    return node
                case ast.Assign(targets=[ast.Name(id=defined)], value=ast.Name(id=other)) if defined == name != other:
                    return self.definition(module, other)
                case ast.ImportFrom(level=0 | 1, module=source, names=aliases):
                    origin = ".".join(part for part in (package if node.level else "", source) if part)
                    for alias in aliases:
                        if alias.name == "*" or (alias.asname or alias.name) == name:
                            found = self.definition(origin, name if alias.name == "*" else alias.name)
                            if found is not None:
                                return found
        return None
