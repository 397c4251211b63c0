"""Builds the API pages with pdoc and checks them: ``python docs/build.py FOLDER``.

The front page is README.md; the texts beside this file, CHANGELOG.md, CONTRIBUTING.md and two READMEs have pages too.
The other pages are the docstrings of MODULES. A warning, a public name without an anchor, a role that became no link,
or a link to nowhere is an error.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import shutil
import sys
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Constructors of the formats, each with its reader.
_FORMATS = tuple(
    f"qops.formats.{name}"
    for name in (
        "awq",
        "compressed_tensors",
        "gguf",
        "gptq",
        "hqq",
        "int8_rows",
        "modelopt",
        "pytorch",
        "quanto",
        "torchao",
    )
)
MODULES = (
    "qops",
    "qops.nn",
    "qops.models",
    "qops.formats",
    *_FORMATS,
    "qops.integrations.kernels",
    "qops.integrations.peft",
    "qops.integrations.serving",
    "qops.integrations.tensor_parallel",
    "qops.integrations.torchao",
    "qops.integrations.transformers",
    "qops.integrations.triton_model",
    "qops.integrations.vllm",
    "qops.testing",
)
# Title -> where what stands under it is defined; whatever is public, without a list of it.
GROUPS = {
    "Operators": ("qops.ops",),
    "Weights": ("qops.weights",),
    "Models": ("qops.models", "qops.nn", "qops.formats", "qops.integrations"),
    "Package": ("qops",),
}
# Page -> what it shows. Their links to one another become links between pages.
PROSE = {
    "index.html": "README.md",
    **{f"{path.stem}.html": f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")) if path.stem != "README"},
    "changelog.html": "CHANGELOG.md",
    "contributing.html": "CONTRIBUTING.md",
    "emulator.html": "tests/emulator/README.md",
    "peers.html": "bench/peers/README.md",
    "stopwatch.html": "tests/cuda/sass/README.md",
}
# Overrides of nn.Module that users do not call.
_HOOKS = ("extra_repr",)
_ROLES = "mod|func|data|const|class|meth|attr|exc|obj"


# What the pages must hold --------------------------------------------------------------------------------------------


def public_members(name: str, value: object) -> Iterator[tuple[str, object]]:
    """(qualified name, object) of a public name and, of a class, of the public members that qops itself defines."""
    yield name, value
    if not inspect.isclass(value):
        return
    seen: set[str] = set()
    for base in value.__mro__:
        if base.__module__.partition(".")[0] != "qops":
            continue
        for key, member in vars(base).items():
            function = isinstance(member, (property, classmethod, staticmethod)) or inspect.isfunction(member)
            if function and not key.startswith("_") and key not in (*_HOOKS, *seen):
                seen.add(key)
                yield f"{name}.{key}", member


def public_api() -> dict[str, dict[str, object]]:
    """Module -> its public names and their members."""
    found: dict[str, dict[str, object]] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        found[name] = {
            key: value for public in module.__all__ for key, value in public_members(public, getattr(module, public))
        }
    return found


def group_of(module: str) -> str:
    """The title that a module of qops, or what it defines, stands under."""
    return next(t for t, roots in GROUPS.items() if any(f"{module}.".startswith(f"{root}.") for root in roots))


def page_of(module: str) -> str:
    return f"{module.replace('.', '/')}.html"


# Checking pages: text alone, so that the tests need no pdoc ----------------------------------------------------------


class _Page(HTMLParser):
    """Anchors, links and pieces of code of a page; `plain` are the pieces of code that link to nothing."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.plain: list[str] = []
        self.text = ""
        self._code: list[str] | None = None
        self._linked = False
        self._depth = 0
        self._hidden = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.anchors.add(str(values["id"]))
        if tag in ("a", "link") and values.get("href"):
            self.links.append(str(values["href"]))
        if tag in ("img", "script") and values.get("src"):
            self.links.append(str(values["src"]))
        self._depth += tag == "a"
        self._hidden += tag in ("script", "style")
        if tag == "code":
            self._code, self._linked = [], self._depth > 0
        elif tag == "a" and self._code is not None:
            self._linked = True

    def handle_endtag(self, tag: str) -> None:
        self._depth -= tag == "a"
        self._hidden -= tag in ("script", "style")
        if tag == "code" and self._code is not None:
            if not self._linked:
                self.plain.append("".join(self._code))
            self._code = None

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += data
        if self._code is not None:
            self._code.append(data)


def violations(
    pages: Mapping[str, str], anchors: Mapping[str, Iterable[str]], roles: Mapping[str, Iterable[str]]
) -> list[str]:
    """What is wrong with a site.

    Args:
        pages: path -> HTML.
        anchors: path -> anchors that the page must have.
        roles: path -> the pieces of code that stand for the roles of its docstrings, see :func:`roles_in`.
    """
    parsed = {path: _Page(text) for path, text in pages.items()}
    found = []
    for path, wanted in anchors.items():
        have = parsed[path].anchors if path in parsed else set()
        found += [f"{path}: no anchor #{anchor}" for anchor in wanted if anchor not in have]
    for path, page in parsed.items():
        found += [f"{path}: `{name}` links to nothing" for name in sorted({*page.plain} & {*roles.get(path, ())})]
        found += [f"{path}: raw {role}" for role in re.findall(rf":(?:{_ROLES}):[`\w][^`\s]*`?", page.text)]
        for link in page.links:
            if re.match(r"(https?|mailto|data):", link):
                continue
            target, _, anchor = link.partition("#")
            at = _normal(PurePosixPath(path).parent / target) if target else path
            if at not in parsed:
                found.append(f"{path}: broken link {link}")
            elif anchor and anchor not in parsed[at].anchors:
                found.append(f"{path}: broken link {link}: no such anchor")
    return found


def roles_in(docstring: str) -> set[str]:
    """What pdoc makes of its roles: ``f()`` of :func:`f`, ``C`` of :class:`C`."""
    return {
        f"{name}()" if kind in ("func", "meth") else name
        for kind, name in re.findall(rf":({_ROLES}):`([^`]+)`", docstring)
    }


def _normal(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


# Rendering -----------------------------------------------------------------------------------------------------------


def render(folder: Path) -> tuple[dict[str, str], dict[str, set[str]]]:
    """Writes the pages; returns them by path, and what their roles name."""
    import pdoc.doc
    import pdoc.render

    pdoc.render.configure(
        docformat="google",
        include_undocumented=False,
        show_source=False,
        template_directory=ROOT / "docs" / "templates",
    )
    environment = pdoc.render.env
    titles = {page: (ROOT / source).read_text().partition("\n")[0].lstrip("# ") for page, source in PROSE.items()}
    titles["index.html"] = "Overview"
    environment.globals |= {"prose": titles, "groups": GROUPS, "group_of": group_of, "grouped": _grouped}
    members = [value for found in public_api().values() for value in found.values() if inspect.isclass(value)]
    shown = {f"{cls.__module__}.{cls.__qualname__}" for cls in members}
    environment.tests["without_page"] = lambda name: name.startswith("qops.") and name not in shown
    modules = {name: pdoc.doc.Module.from_name(name) for name in MODULES}
    roles: dict[str, set[str]] = {}
    for name, module in modules.items():
        roles[page_of(name)] = {role for doc in _documented(module) for role in roles_in(doc.docstring)}
        for cls in module.classes:
            _adopt(cls, modules)

    pages = {page_of(name): _shorten(pdoc.render.html_module(module, modules)) for name, module in modules.items()}
    for page, source in PROSE.items():
        text, images = linked(source, (ROOT / source).read_text())
        for image in images:
            (folder / image).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / image, folder / image)
        pages |= dict.fromkeys(images, "")
        # A module at the top: links from the page are relative to it.
        context: Any = pdoc.doc.Module(types.ModuleType("index"))
        pages[page] = environment.get_template("prose.html.jinja2").render(
            module=context, all_modules=modules, text=_link_operators(text), page=page, root_module_name="qops"
        )
    for path, text in pages.items():
        if path.endswith(".html"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
    (folder / "search.js").write_text(pdoc.render.search_index(modules))
    return {**pages, "search.js": ""}, roles


def linked(source: str, markdown: str) -> tuple[str, list[str]]:
    """A text with links between pages where it has links between their sources; and the images that it shows."""
    images: list[str] = []
    pages = {name: page for page, name in PROSE.items()}

    def link(match: re.Match[str]) -> str:
        target = _normal(PurePosixPath(source).parent / match[3])
        if match[1] and (ROOT / target).is_file():
            images.append(target)
        return f"{match[1]}[{match[2]}]({pages.get(target, target if match[1] else match[3])}"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)#\s:]+)", link, markdown), images


def _documented(module: Any) -> Iterator[Any]:
    """pdoc's objects of a module, without what classes inherit from torch."""
    yield module
    for member in module.members.values():
        yield member
        inner = member.members.values() if member.kind == "class" else ()
        yield from (each for each in inner if each.taken_from[0].partition(".")[0] == "qops")


def _grouped(module: Any) -> list[tuple[str, list[Any]]]:
    """Title -> members of the page of qops; other pages are of one group, without a title."""
    if module.modulename != "qops":
        return [("", module.own_members)]
    return [
        (title, [member for member in module.own_members if group_of(member.taken_from[0]) == title])
        for title in GROUPS
    ]


def _adopt(cls: Any, modules: Mapping[str, Any]) -> None:
    """Makes what a class inherits from a base of qops without a page of its own a member like the others."""
    for (module, base), members in cls.inherited_members.items():
        public = module in modules and modules[module].get(base) is not None
        if module.partition(".")[0] == "qops" and not public:
            cls.own_members.extend(member for member in members if member not in cls.own_members)
    cls.own_members.sort(key=lambda member: member.name != "__init__")
    init = cls.members.get("__init__")
    if init is not None and not cls.obj.__init__.__doc__:
        init.docstring = ""  # else nn.Module's


def _shorten(html: str) -> str:
    """torch.nn.Module, whose __module__ is torch.nn.modules.module."""
    dot = r'(?:\.|</span><span class="o">\.</span><span class="n">)'
    return re.sub(rf"(torch{dot}nn{dot})modules{dot}\w+{dot}", r"\1", html)


def _link_operators(markdown: str) -> str:
    """`rms_norm` names qops.rms_norm; in fenced blocks nothing changes."""
    names = "|".join(importlib.import_module("qops").__all__)
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = [re.sub(rf"(?<!`)`({names})`(?!`)", r"[`\1`](qops.html#\1)", part) for part in parts[::2]]
    return "".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the API pages.")
    parser.add_argument("folder", type=Path, help="where to; replaced if it holds an older build")
    folder: Path = parser.parse_args(argv).folder
    if (folder / "qops.html").is_file():
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty and holds no build of these pages")
    api = public_api()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pages, roles = render(folder)
    found = violations(pages, {page_of(name): members for name, members in api.items()}, roles)
    for line in found:
        print(line, file=sys.stderr)
    count = sum(path.endswith(".html") for path in pages)
    print(f"{count} pages in {folder}, {sum(map(len, api.values()))} public names, {len(found)} errors")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
