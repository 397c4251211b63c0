"""Unpacks what ``bench.peers.collect`` made, offline: ``python -m bench.peers.install DIR --to SITE``.

SITE goes on PYTHONPATH. It gets the packages, and the shared objects in ``SITE/qops_peers``, where the adapters look.
Nothing is written of a stage until each of its parts is there and has the checksum of the manifest.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import io
import json
import lzma
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.peers.collect import SCHEMA
from bench.peers.libraries import FOLDER

# sglang-kernel links libnuma, and calls it for memory across sockets alone. Where a system has none, these say so.
NUMA = "libnuma.so.1"
NUMA_SOURCE = """
int numa_num_configured_nodes(void) { return 1; }
int numa_bind(void *nodes) { return -1; }
void *numa_allocate_nodemask(void) { return 0; }
void *numa_bitmask_clearall(void *mask) { return mask; }
void numa_bitmask_free(void *mask) {}
void copy_nodemask_to_bitmask(void *nodes, void *mask) {}
"""
NUMA_VERSIONS = "libnuma_1.2 { *; };\n"


def read_stage(manifest: Path) -> tuple[dict[str, Any], bytes]:
    """The manifest and the archive of a stage, checked."""
    stage = json.loads(manifest.read_text())
    if stage.get("schema") != SCHEMA:
        raise ValueError(f"{manifest} is not a manifest of bench.peers.collect")
    content = io.BytesIO()
    for part in stage["parts"]:
        path = manifest.parent / part["file"]
        if not path.is_file():
            raise ValueError(f"{manifest.name} needs {part['file']}, which is not in {manifest.parent}")
        read = path.read_bytes()
        if hashlib.sha256(read).hexdigest() != part["sha256"]:
            raise ValueError(f"{path} is damaged: its SHA-256 is not that of {manifest.name}")
        content.write(read)
    return stage, content.getvalue()


def unpack(archive: bytes, site: Path) -> None:
    with lzma.open(io.BytesIO(archive)) as compressed, tarfile.open(fileobj=compressed, mode="r:") as files:
        files.extractall(site, filter="data")


def stand_in_for_numa(folder: Path) -> None:
    """Compiles the functions of libnuma that sglang-kernel names, where the system has no libnuma."""
    try:
        ctypes.CDLL(NUMA)
        return
    except OSError:
        pass
    with tempfile.TemporaryDirectory() as build:
        source, versions = Path(build, "numa.c"), Path(build, "numa.map")
        source.write_text(NUMA_SOURCE)
        versions.write_text(NUMA_VERSIONS)
        linked = ["-shared", "-fPIC", f"-Wl,-soname,{NUMA}", f"-Wl,--version-script={versions}"]
        subprocess.run(["cc", *linked, str(source), "-o", str(folder / NUMA)], check=True)


def install(folder: Path, site: Path, peers: Sequence[str] | None = None) -> list[str]:
    """Unpacks the stages in ``folder``, or those named; returns what was unpacked as ``name==version``."""
    manifests = sorted(folder.glob("*.json")) if peers is None else [folder / f"{name}.json" for name in peers]
    if not manifests:
        raise ValueError(f"no manifest in {folder}")
    stages = [read_stage(manifest) for manifest in manifests]
    site.mkdir(parents=True, exist_ok=True)
    installed = []
    for stage, archive in stages:
        unpack(archive, site)
        installed += [f"{item['name']}=={item['version']}" for item in stage["distributions"]]
    if (site / FOLDER / "sgl_kernel").is_dir():
        stand_in_for_numa(site / FOLDER)
    return sorted(set(installed))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers.install", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--to", type=Path, required=True, metavar="SITE")
    parser.add_argument("--peers", nargs="+", metavar="STAGE", help="default: every stage in DIR")
    options = parser.parse_args(arguments)
    try:
        installed = install(options.folder, options.to, options.peers)
    except ValueError as error:
        sys.exit(f"bench.peers.install: {error}")
    print("\n".join(installed))
    print(f"export PYTHONPATH={options.to.resolve()}:$PYTHONPATH")


if __name__ == "__main__":
    main()
