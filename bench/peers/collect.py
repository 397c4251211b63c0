"""Fetches the GPU peers for a machine without a network: ``python -m bench.peers.collect DIR [--peers vllm_gemm ...]``.

For each stage of ``pins.STAGES``, DIR gets ``STAGE.json`` and its archive, ``STAGE.tar.xz`` in numbered parts that are
small enough to be carried one by one. Shared objects are cut out of their wheels, with the metadata that tells their
version; other packages come whole. ``bench.peers.install`` unpacks them.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from bench.peers.libraries import FOLDER
from bench.peers.pins import ABIS, PLATFORMS, PYTHON, STAGES, Pin, Stage

SCHEMA = "qops-peers-1"
PART_MIB = 56


def download(pin: Pin, folder: Path) -> Path:
    """The one file of a distribution for the target machine."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    if pin.source:
        command += ["--no-binary", ":all:"]
    else:
        command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", PYTHON]
        command += [f"--abi={abi}" for abi in ABIS] + [f"--platform={platform}" for platform in PLATFORMS]
    subprocess.run([*command, "--dest", str(folder), f"{pin.name}=={pin.version}"], check=True)
    stem = f"{pin.name.replace('-', '_')}-{pin.version}".lower()
    (found,) = (path for path in folder.iterdir() if path.name.lower().startswith((f"{stem}-", f"{stem}.tar")))
    return found


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Files of a wheel, or of a source distribution without its top folder, as they lie in site-packages."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist() if not name.endswith("/"))
        return
    with tarfile.open(archive) as source:
        for member in source:
            file = source.extractfile(member)
            if file is not None:
                yield str(PurePosixPath(*PurePosixPath(member.name).parts[1:])), file.read()


def selected(pin: Pin, archive: Path) -> Iterator[tuple[str, bytes]]:
    """What the target machine needs of a distribution, by its path there."""
    info = f"{pin.name.replace('-', '_')}-{pin.version}.dist-info/METADATA"
    package, missing = pin.name.replace("-", "_"), set(pin.cut)
    for name, content in members(archive):
        if name == "PKG-INFO" or name.endswith(".dist-info/METADATA"):
            yield info, content
        elif name in pin.cut:
            missing.remove(name)
            yield f"{FOLDER}/{name}", content
        elif not pin.cut and (name.startswith(f"{package}/") or not pin.source):
            yield name, content
    if missing:
        raise FileNotFoundError(f"{archive.name} has no {', '.join(sorted(missing))}")


def pack(files: Iterable[tuple[str, bytes]], links: Iterable[tuple[str, str]]) -> bytes:
    """A compressed archive, the same bytes for the same files."""
    buffer = io.BytesIO()
    with lzma.open(buffer, "wb", preset=6) as compressed, tarfile.open(fileobj=compressed, mode="w") as archive:
        for name, content in sorted(dict(files).items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
        for name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return buffer.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def collect(name: str, stage: Stage, folder: Path, part_bytes: int) -> list[Path]:
    """Writes the parts of one stage, then its manifest."""
    distributions, files = [], {}
    with tempfile.TemporaryDirectory() as downloads:
        for pin in stage.pins:
            archive = download(pin, Path(downloads))
            distributions.append({"name": pin.name, "version": pin.version, "file": archive.name})
            distributions[-1]["sha256"] = sha256(archive.read_bytes())
            files.update(selected(pin, archive))
    packed = pack(files.items(), stage.links)
    parts = []
    for number, start in enumerate(range(0, len(packed), part_bytes)):
        content = packed[start : start + part_bytes]
        path = folder / f"{name}.tar.xz.{number:02}"
        path.write_bytes(content)
        parts.append({"file": path.name, "bytes": len(content), "sha256": sha256(content)})
    manifest = {"schema": SCHEMA, "stage": name, "distributions": distributions, "parts": parts}
    (folder / f"{name}.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return [folder / str(part["file"]) for part in parts]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers.collect", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--peers", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--part-mib", type=int, default=PART_MIB, help="largest part, in MiB (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.peers:
        for path in collect(name, STAGES[name], options.folder, options.part_mib << 20):
            print(f"{path} {path.stat().st_size / (1 << 20):.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
