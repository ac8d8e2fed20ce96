"""The tests that CI cannot run are listed, and none is forgotten."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "gpu"


def test_every_file_of_gpu_tests_stands_in_the_manifest_and_the_reverse() -> None:
    listed = re.findall(r"^\| `(test_\w+\.py)` \|", (FOLDER / "MANIFEST.md").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(listed) == sorted(path.name for path in FOLDER.glob("test_*.py"))
