"""What the kernel counts as resident stays within the budget at every level, up and down, while requests run."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ALLOCATOR_SLACK_MIB = 4.0
"""The C allocator keeps some freed memory, which is neither arena nor workspace."""


def test_resident_memory_stays_within_the_budget_at_every_level(tmp_path: Path) -> None:
    # A process of its own: its size before the engine must not hold what other tests have left behind.
    out = tmp_path / "levels.json"
    command = [sys.executable, str(ROOT / "bench" / "memory" / "levels.py"), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=250)
    rows = json.loads(out.read_text())
    top = max(row["level"] for row in rows)
    down, up = rows[: top + 1], rows[top:]
    assert [row["level"] for row in rows] == [*range(top + 1), *reversed(range(top))]
    for row in rows:
        assert row["arena_mib"] <= row["arena_limit_mib"]
        assert row["arena_limit_mib"] - row["arena_mib"] < 1.5, "pages lie idle"
        assert row["process_data_mib"] <= row["budget_mib"] + ALLOCATOR_SLACK_MIB
        assert row["live_blocks"] > 0
    for side, direction in ((down, 1), (up, -1)):
        for before, after in itertools.pairwise(side):
            assert (before["weights_mib"] - after["weights_mib"]) * direction > 0
            assert (after["kv_mib"] - before["kv_mib"]) * direction > 0
