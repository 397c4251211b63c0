from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# `--hypothesis-profile=thorough` is what CONTRIBUTING.md asks for; the other is for every day and the same each time.
_NO_CHECKS = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
_NO_CHECKS["phases"] = (Phase.explicit, Phase.generate, Phase.shrink)
settings.register_profile("thorough", max_examples=2000, print_blob=True, **_NO_CHECKS)
settings.register_profile("short", max_examples=30, derandomize=True, **_NO_CHECKS)
settings.load_profile("short")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty() is filled with NaN (or the largest integer), so that an element no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with torch.inference_mode():
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Sets torch's thread count inside a test and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
