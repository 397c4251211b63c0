"""Tensor parallel on gloo with two and four processes; what they check stands in `tests/support/models`."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qops.integrations.tensor_parallel.shards import Share, group_of, inputs_of, outputs_of
from qops.nn import Int8Linear
from qops.testing import assert_bitwise
from tests.support.models import shards, shared_models
from tests.support.models.ranks import TIMEOUT, checks, failures
from tests.support.ops.random_weights import random_int4, random_int8

ROOT = Path(__file__).parents[2]
PAGE = "docs/tensor_parallel.md"
ALONE = '{"rank": 0, "world_size": 1, "store": torch.distributed.HashStore()}'


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("module", [shards, shared_models])
def test_on_ranks(module, size, tmp_path):
    passed, said = failures(module.__name__, size, tmp_path)
    assert not said, said
    assert passed == len(checks(module, size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_shards_are_the_whole(size):
    """Of every class and kind, with three ranks, too."""
    for name, whole in shards.linears(shards.some_bias()).items():
        weight = whole.dense_weight(torch.float32) if name != "dense" else whole.weight
        for rank in range(size):
            if shards.N % (8 * size) == 0:
                part = outputs_of(whole, Share(rank, size))
                found = part.dense_weight(torch.float32) if name != "dense" else part.weight
                assert_bitwise(found, weight.chunk(size)[rank], name)
                assert_bitwise(part.bias, whole.bias.chunk(size)[rank], name)
            if shards.K % (8 * size) == 0:
                part = inputs_of(name, whole, Share(rank, size))
                found = part.dense_weight(torch.float32) if name != "dense" else part.weight
                order = torch.arange(shards.K) if name == "dense" or whole.weight.perm is None else whole.weight.perm
                assert_bitwise(found, weight[:, order.long().chunk(size)[rank]], name)
                assert_bitwise(part.bias, whole.bias, name)


@pytest.mark.parametrize(
    ("k", "g", "size", "cut"),
    [
        (29568, 128, 2, 64),  # the MLP of Qwen2 72B
        (29568, 128, 4, 32),
        (29568, 128, 8, 16),
        (18944, 128, 4, 128),  # of Qwen2 7B
        (18944, 128, 8, 64),
        (512, 512, 4, 128),  # one group per row
        (1024, 256, 2, 256),
        (96, 48, 4, 24),  # half a group, which is then the whole row
        (29568, 128, 16, None),
        (480, 48, 4, None),
        (100 * 8, 16, 3, None),
    ],
)
def test_groups_are_cut_or_refused(k, g, size, cut):
    weight = random_int4(8, k, g, "symmetric")[1]
    if cut is not None:
        assert group_of("w", weight, size) == cut == math.gcd(g, k // size)
        return
    with pytest.raises(ValueError, match=rf"w: K = {k} columns in groups of G = {g} .*tp = {size}"):
        group_of("w", weight, size)


def test_sections_are_split_one_by_one():
    """Of q, k and v in one linear each rank gets a part."""
    whole = Int8Linear(random_int8(64, 64, -1, scale_dtype=torch.float32)[1])
    rows = whole.weight.dequantize()
    part = outputs_of(whole, Share(1, 2), [32, 16, 16])
    assert_bitwise(part.weight.dequantize(), rows[[*range(16, 32), *range(40, 48), *range(56, 64)]])


def test_the_page_runs_under_torchrun(tmp_path):
    text = (ROOT / PAGE).read_text()
    assert ALONE in text
    (tmp_path / "page.txt").write_text(text.replace(ALONE, "{}").replace("```", ""))
    (tmp_path / "run.py").write_text(
        "import doctest, sys, torch\n"
        "found = doctest.testfile(sys.argv[1], module_relative=False)\n"
        "assert found.attempted > 10 and not found.failed\n"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(tmp_path / "page.txt")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
