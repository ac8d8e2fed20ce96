"""What every test here may rely on, whatever ran before it and however busy the machine is."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from hypothesis import HealthCheck, settings

# The GPU's kernels run on the CPU here: Triton's interpreter must be chosen before any test imports its language.
os.environ["TRITON_INTERPRET"] = "1"

# Several threads for operations of microseconds wait for each other: on two busy cores they take ten times as long as
# one. Set before anything imports torch, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

# What runs in the background of a shell ignores Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# In CI Hypothesis draws the same examples each time (its own profile for CI); how long one takes never counts.
settings.register_profile("house", settings(deadline=None, suppress_health_check=[HealthCheck.too_slow]))
settings.load_profile("house")


@pytest.fixture(autouse=True)
def torch_as_new() -> None:
    """One thread and the same random numbers for each test: an engine in this process leaves others behind."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
