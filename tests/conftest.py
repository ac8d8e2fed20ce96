"""What every test may rely on, whatever ran before it and however busy the machine is."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import HealthCheck, settings

# Several threads for operations of microseconds wait for each other: on two busy cores they take ten times as long as
# one. Set before anything imports torch, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

# In CI Hypothesis draws the same examples each time (its own profile for CI); how long one takes never counts.
settings.register_profile("house", settings(deadline=None, suppress_health_check=[HealthCheck.too_slow]))
settings.load_profile("house")


@pytest.fixture(autouse=True)
def torch_as_new() -> None:
    """One thread and the same random numbers for each test: an engine in this process leaves others behind."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
