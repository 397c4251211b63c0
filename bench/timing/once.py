"""An operator of ours, verified and then called a few times, for a profiler to look at.

python -m bench.timing.once int4_gemm --rows 64 --device cuda
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from bench import problems
from bench.peers import providers
from bench.problems.shared import devices
from bench.problems.shared.cases import SELECTIONS, Case
from bench.problems.shared.provider import OURS
from bench.timing import emulated, samplers

CALLS = 3


def case_of(op: str, rows: int, device: str) -> Case | None:
    """The first with so many tokens, if there is one."""
    only = frozenset({rows})
    return next(iter(problems.cases(op, replace(SELECTIONS[device, "quick"], rows=only, tokens=only))), None)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.timing.once", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("op", choices=problems.OPS)
    parser.add_argument("--rows", type=int, required=True, metavar="N", help="tokens")
    parser.add_argument("--device", choices=devices.KINDS, default="cpu")
    args = parser.parse_args(argv)
    if args.device == "emulated":
        emulated.install(emulated.build())
    case = case_of(args.op, args.rows, args.device)
    if case is None:
        parser.error(f"no case of {args.op} has {args.rows} rows")
    offered = providers.all(args.op, devices.of_providers(args.device))
    provider = next(p for p in offered if p.name == OURS)
    with torch.inference_mode():
        problem = problems.make(args.op, case.axes, devices.of_tensors(args.device))
        call = provider.build(problem)
        error = samplers.verify(provider, problem, call())
        for _ in range(CALLS):
            call()
        if args.device != "cpu":
            torch.cuda.synchronize()
    print(f"{case}: {CALLS + 1} calls, error {error.relative:.2g} of the largest value")


if __name__ == "__main__":
    main()
