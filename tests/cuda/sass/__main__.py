"""`python -m tests.cuda.sass FILE...`: what the kernels of cubins, objects and libraries cost."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tests.cuda.sass.count import guess, steady
from tests.cuda.sass.disassembly import Kernel, kernels_of
from tests.cuda.sass.flow import Flow
from tests.cuda.sass.kernels import short, works_of
from tests.cuda.sass.report import describe, rows_of, write


def listing(kernel: Kernel) -> str:
    """The machine code of the steady paths, a block after the other."""
    flow, lines = Flow(kernel), []
    works = works_of(kernel.name, kernel.arch)
    for work in [guess(kernel, flow)] if works is None else works:
        for share, goal in work.ways:
            path = steady(flow, goal, work.in_loop)
            lines.append(f"--- {work.label} {share:g} of the units: {path.slots} instructions")
            for number, times in zip(path.blocks, path.times, strict=True):
                lines.append(f"block {number}" + (f", {times} times" if times > 1 else ""))
                for i in flow.blocks[number].code:
                    lines.append(f"  {i.address:05x} {i.control.stall:2} {i.guard:5} {i.opcode} {i.operands}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda.sass", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--arch", action="append", default=[], help="such as 90a; all that the files hold")
    parser.add_argument("--kernel", default="", help="a regular expression, of names such as decode_kernel<bf16, 1")
    parser.add_argument("--path", action="store_true", help="print the machine code of the steady path")
    parser.add_argument("--write", action="store_true", help="the page and the budget, from objects of all kernels")
    arguments = parser.parse_args()
    kernels = [k for k in kernels_of(arguments.files, arguments.arch) if re.search(arguments.kernel, short(k.name))]
    if arguments.write:
        write(rows_of(kernels))
        return
    for row in rows_of(kernels, guesses=True):
        print(describe(row))
    if arguments.path:
        for kernel in kernels:
            print(f"\nsm_{kernel.arch} {short(kernel.name)}\n{listing(kernel)}")


if __name__ == "__main__":
    main()
