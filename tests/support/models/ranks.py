"""Checks on several processes, which talk by gloo; each runs the checks of a module, one after the other.

    python -m tests.support.models.ranks MODULE FOLDER RANK SIZE

is one of them. One start of all of them takes as long as twenty checks, so a test runs many.
"""

from __future__ import annotations

import datetime
import importlib
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 400
Check = Callable[[Any, Path], None]
"""Takes the mesh, and a folder that all processes see."""


def checks(module: Any, size: int) -> tuple[Check, ...]:
    """All on two processes, and on more those that may differ there."""
    return module.CHECKS if size == 2 else module.ON_FOUR


def failures(module: str, size: int, folder: Path) -> tuple[int, str]:
    """Runs the checks of a module on `size` processes.

    Returns:
        (how many checks every process has passed, what went wrong in any of them)
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
    command = [sys.executable, "-m", "tests.support.models.ranks", module, str(folder)]
    logs = [folder / f"{rank}.log" for rank in range(size)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            mine = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            full = [*command, str(rank), str(size)]
            processes.append(subprocess.Popen(full, env=mine, stdout=file, stderr=subprocess.STDOUT))
    try:
        for process in processes:
            process.wait(TIMEOUT)
    finally:
        for process in processes:
            process.kill()
    passed = min(len((folder / f"{rank}.passed").read_text().split()) for rank in range(size))
    # One that fails takes the others with it, which then miss it.
    said = [f"rank {rank}:\n{log.read_text()}" for rank, log in enumerate(logs) if processes[rank].returncode]
    return passed, "\n".join(said)


def main(module: str, folder: str, rank: str, size: str) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    passed = (Path(folder) / f"{rank}.passed").open("w")
    dist.init_process_group(
        "gloo",
        rank=int(rank),
        world_size=int(size),
        init_method=f"file://{folder}/rendezvous",
        timeout=datetime.timedelta(seconds=120),
    )
    mesh = dist.init_device_mesh("cpu", (int(size),))
    for check in checks(importlib.import_module(module), int(size)):
        try:
            check(mesh, Path(folder))
        except BaseException:
            sys.stdout.write(f"{check.__name__}\n{traceback.format_exc()}")
            sys.stdout.flush()
            os._exit(1)  # others may wait for this one
        passed.write(f"{check.__name__}\n")
    passed.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
