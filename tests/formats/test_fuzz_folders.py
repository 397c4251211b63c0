"""The first folders of fuzz_folders.py; CONTRIBUTING.md has the command for many."""

from __future__ import annotations

import copy
import random

import pytest

from tests.support import fuzz_folders
from tests.support.fuzz_gguf import TooSlow


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fuzz_folders.bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("name", fuzz_folders.BASES)
def test_unchanged_folders_load(whole, tmp_path, name):
    whole[name].write(tmp_path / "whole")
    assert fuzz_folders.limited(tmp_path / "whole") == "weights are read, model loads"


def test_mutated_folders_load_or_are_refused_by_name(whole, tmp_path):
    outcomes = set()
    for index in range(13 * 12):
        files, done = fuzz_folders.mutated(whole, 0, index)
        files.write(tmp_path / "mutated")
        try:
            outcomes.add(fuzz_folders.limited(tmp_path / "mutated"))
        except (Exception, TooSlow) as error:
            raise AssertionError(f"folder {index} ({done}): {error!r}") from error
    assert len(outcomes) == 3, outcomes  # some stay whole, some are refused by their tensors, some by their config


@pytest.mark.parametrize("change", [change for change, _ in fuzz_folders.CHANGES], ids=lambda change: change.__name__)
def test_every_mutation_changes_folders(whole, change):
    changed = 0
    for seed in range(20):
        files = copy.deepcopy(whole["quanto"])
        change(random.Random(seed), files)
        changed += files != whole["quanto"]
    assert changed > 5
