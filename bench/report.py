"""Pages, plots and the README's tables from JSON: ``python -m bench.report bench/results/*.json``.

Writes, beside this file, ``RESULTS.md`` (with several machines, an index of ``RESULTS-<machine>.md``) and ``plots/``,
and what stands between the markers of README.md and, where a GPU was measured, of ``TARGETS.md``. With ``--out DIR``
all but README.md go there, and that stays as it is. ``--check`` writes nothing and fails where a file is not what the
JSON gives. Only drawing needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import plots, tables, targets
from bench.figures import Figure, figures_of
from bench.records import SCHEMA, Document, machines, parse

BENCH = Path(__file__).resolve().parent
README = BENCH.parent / "README.md"
TARGETS = "TARGETS.md"
BEGIN = "<!-- bench: begin; python -m bench.report writes what follows -->\n"
END = "<!-- bench: end -->\n"


@dataclass(frozen=True)
class Report:
    """What a set of documents gives: files, by their paths from the folder of the pages, and parts of files."""

    pages: dict[str, str]
    figures: dict[str, Figure]
    readme: str
    targets: str


def report(documents: Iterable[Document]) -> Report:
    found = machines(documents)
    pages: dict[str, str] = {}
    figures: dict[str, Figure] = {}
    names = {f"RESULTS-{m.slug}.md" if len(found) > 1 else "RESULTS.md": m for m in found}
    for name, machine in names.items():
        shown: dict[str, dict[str, str]] = {}
        for op, drawn in figures_of(machine).items():
            for figure in drawn:
                path = f"plots/{machine.slug}-{op}-{figure.name}.svg"
                figures[path] = figure
                shown.setdefault(op, {})[figure.title] = path
        pages[name] = tables.page(machine, shown)
    if len(found) > 1:
        pages["RESULTS.md"] = tables.index({machine.title: name for name, machine in names.items()})
    summary = tables.readme_section({f"bench/{name}": machine for name, machine in names.items()})
    return Report(pages, figures, summary, targets.section(found))


def with_section(readme: str, section: str) -> str:
    """A page with other text between its markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"a page must hold the lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{begin}\n{section}\n{end}{after}"


def _sections(expected: Report, folder: Path, readme: Path | None) -> Iterator[tuple[Path, str]]:
    """Files of which a part is generated, and that part."""
    if readme:
        yield readme, expected.readme
    if expected.targets:
        yield folder / TARGETS, expected.targets


def stale(expected: Report, folder: Path, readme: Path | None) -> list[str]:
    """What is not as the documents give it: other text, a missing file, one that nothing gives any more.

    Of a plot, what it shows is compared, by the hash in its metadata, and not its bytes.
    """
    found = []
    for name, text in expected.pages.items():
        if not (folder / name).exists():
            found.append(f"{name} is missing")
        elif (folder / name).read_text() != text:
            found.append(f"{name} differs")
    for name, figure in expected.figures.items():
        if not (folder / name).exists():
            found.append(f"{name} is missing")
        elif figure.digest not in (folder / name).read_text():
            found.append(f"{name} shows other data")
    present = [path.relative_to(folder).as_posix() for p in ("RESULTS*.md", "plots/*.svg") for path in folder.glob(p)]
    found += [f"{name} has no results" for name in sorted({*present} - {*expected.pages} - {*expected.figures})]
    for path, section in _sections(expected, folder, readme):
        if not path.exists():
            found.append(f"{path.name} is missing")
        elif path.read_text() != with_section(path.read_text(), section):
            found.append(f"{path.name} differs")
    return found


def write(expected: Report, folder: Path, readme: Path | None) -> None:
    """Leaves nothing behind that ``stale`` would find."""
    drawn = {name: plots.draw(figure) for name, figure in expected.figures.items()}
    for old in (*folder.glob("RESULTS*.md"), *folder.glob("plots/*.svg")):
        old.unlink()
    for name, text in {**expected.pages, **drawn}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for path, section in _sections(expected, folder, readme):
        text = path.read_text() if path.exists() else f"# Targets\n\n{BEGIN}{END}"
        path.write_text(with_section(text, section))


def read_all(paths: Iterable[Path]) -> list[Document]:
    """The documents of this schema; others are named and left out."""
    found = []
    for path in paths:
        content = json.loads(path.read_text())
        if content.get("schema") == SCHEMA:
            found.append(parse(path.name, content))
        else:
            sys.stderr.write(f"{path}: schema {content.get('schema')!r}, not {SCHEMA!r}: left out\n")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", type=Path, nargs="*", metavar="JSON", help="default: all of bench/results")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the pages; README.md is left alone")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file differs")
    options = parser.parse_args(arguments)
    paths = options.files or sorted((BENCH / "results").glob("*.json"))
    expected = report(read_all(paths))
    folder, readme = (options.out, None) if options.out else (BENCH, README)
    if options.check:
        found = stale(expected, folder, readme)
        sys.stderr.writelines(f"{line}\n" for line in found)
        return 1 if found else 0
    write(expected, folder, readme)
    sys.stdout.writelines(f"{folder / name}\n" for name in (*expected.pages, *expected.figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
