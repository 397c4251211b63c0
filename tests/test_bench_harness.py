"""The parts of the benchmark harness that decide what is reported."""

from __future__ import annotations

import json

import pytest
import torch
from bench import harness
from bench.harness import Provider, Result, Sampler


def result(provider: str, *samples: float, rows: int = 1) -> Result:
    return Result("op", provider, {"M": rows}, 10, 20, 0.5, 1, 1, list(samples))


def test_rotation_passes_the_cache_or_the_cap():
    assert harness.rotation(1 << 20, 8 << 20) == 24
    assert harness.rotation(1 << 20, 480 << 20) == 1024  # the cap of 1 GiB
    assert harness.rotation(5 << 30, 8 << 20) == 1
    assert harness.rotation(0, 8 << 20) > 0
    assert harness.last_level_cache_bytes() >= 1 << 16


def test_quantile():
    assert [harness.quantile([3, 1, 2], q) for q in (0, 0.25, 0.5, 1)] == [1, 1.5, 2, 3]
    assert harness.quantile([7], 0.8) == 7


def test_ratios_are_taken_round_by_round():
    # The machine is ten times slower in the second round: times vary, their ratio does not.
    text = harness.table([result("qops", 1, 10, 1), result("peer", 3, 30, 3)])
    assert text.splitlines()[2].split() == ["peer", "3", "3", "-", "19.2", "3.00", "3.00", "-", "3.00"]


def test_a_peer_of_another_case_is_refused():
    with pytest.raises(AssertionError):
        harness.table([result("qops", 1), result("peer", 1, rows=2)])


def test_calls_rotate_through_the_inputs():
    seen = []
    sampler = Sampler(Provider("a", seen.append, [(0,), (1,), (2,)]))
    sampler.calls = 2
    for _ in range(3):
        assert sampler.seconds() > 0
    assert seen == [0, 1, 2, 0, 1, 2]


def test_verification_refuses_wrong_results():
    x = torch.tensor([1.0, 2.0])
    exact = x.double()

    def offering(*values: torch.Tensor) -> list[Provider]:
        return [Provider(name, lambda v=v: v, [()]) for name, v in zip(("qops", "peer"), values, strict=True)]

    assert harness.verify(offering(x, x), exact) == [0.0, 0.0]
    with pytest.raises(AssertionError, match="peer: error 5"):
        harness.verify(offering(x, x + 5), exact)
    with pytest.raises(AssertionError, match=r"qops: error 1\.000e-02 >"):
        harness.verify(offering(x + 0.01, x + 0.001), exact)
    with pytest.raises(AssertionError, match="peer: error"):
        harness.verify([Provider(n, lambda y=y: (x, y), [()]) for n, y in (("qops", x), ("peer", -x))], (exact, exact))


def test_document(tmp_path):
    harness.write(tmp_path / "results" / "a.json", [result("qops", 1.23456789)])
    document = json.loads((tmp_path / "results" / "a.json").read_text())
    assert set(document) == {"schema", "meta", "device", "protocol", "results"}
    assert {"git_sha", "dirty", "argv", "utc", "versions"} <= set(document["meta"])
    assert document["device"]["name"] and document["device"]["threads"] == torch.get_num_threads()
    row = document["results"][0]
    assert row["samples_us"] == [1.2346] and row["axes"] == {"M": 1}
    assert {"op", "provider", "axes", "samples_us", "bytes", "flops", "max_err"} <= set(row)
