"""Programs that measure their own process: in this one, other tests come and go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def run_alone(program: str) -> Any:
    """What a Python program prints, as JSON; it runs in a process of its own, with `json` imported."""
    command = [sys.executable, "-c", "import json\n" + program]
    done = subprocess.run(
        command, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=200, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
