"""The first files of fuzz_gguf.py; CONTRIBUTING.md has the command for many."""

from __future__ import annotations

import random

import gguf
import pytest

from qops.formats.gguf.architectures import ARCHITECTURES
from qops.formats.gguf.blocks import BLOCK_TYPES
from tests.support import fuzz_gguf


@pytest.fixture(scope="module")
def containers(tmp_path_factory):
    return fuzz_gguf.bases(tmp_path_factory.mktemp("bases"))


def test_unchanged_files_load(containers, tmp_path):
    for container in containers:
        (tmp_path / "whole.gguf").write_bytes(container.write())
        assert fuzz_gguf.limited(tmp_path / "whole.gguf") == "model loads, tokenizer loads"


def test_there_is_a_file_of_every_architecture_and_type(containers):
    architectures = {dict(container.keys)[b"general.architecture"].content.decode() for container in containers}
    assert architectures == set(ARCHITECTURES)
    types = {gguf.GGMLQuantizationType(tensor.type).name for container in containers for tensor in container.tensors}
    assert types == {*BLOCK_TYPES, "F32", "F16", "BF16"}


def test_mutated_files_load_or_are_refused_by_name(containers, tmp_path):
    outcomes = set()
    for index in range(200):
        data, done = fuzz_gguf.mutated(containers, 0, index)
        (tmp_path / "mutated.gguf").write_bytes(data)
        try:
            outcomes.add(fuzz_gguf.limited(tmp_path / "mutated.gguf"))
        except (Exception, fuzz_gguf.TooSlow) as error:
            raise AssertionError(f"file {index} ({done}): {error!r}") from error
    assert len(outcomes) == 4, outcomes  # the mutations reach both readers, and leave some files whole


@pytest.mark.parametrize("change", [change for change, _ in fuzz_gguf.FIELDS], ids=lambda change: change.__name__)
def test_every_mutation_changes_files(containers, change):
    whole = containers[0].write()
    changed = set()
    for seed in range(20):
        container = fuzz_gguf.copy_of(containers[0])
        change(random.Random(seed), container)
        changed.add(container.write())
    assert len(changed - {whole}) > 1
