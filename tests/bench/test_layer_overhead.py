"""``bench.layer_overhead``, and that no step of a fused layer costs much more than it did."""

from __future__ import annotations

import pytest
import torch

from bench import layer_overhead
from bench.reporting.stats import median


@pytest.mark.slow
def test_a_layer_costs_a_few_times_what_transformers_does_for_it():
    """2.4 times on a Xeon, where the chain of operators takes 7 times as much."""
    model, threads = layer_overhead.stub(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            found = layer_overhead.measure(model, 3)
            ids = torch.arange(16)[None]
            again = model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    finally:
        torch.set_num_threads(threads)
    assert again.shape == (1, 18) and min(found.nothing) > 0
    # A layer that did not become one that does nothing would show as a difference of about 0.
    assert 0.2 * median(found.nothing) < median(found.ours) < 4.5 * median(found.nothing), found
