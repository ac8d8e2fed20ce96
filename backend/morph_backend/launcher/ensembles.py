"""Ensembles with our model as a step: a known danger of Triton 2.51, told before the server starts."""

from __future__ import annotations

import re
from pathlib import Path

MODEL = "morph"


def ensembles_over(repository: Path) -> list[str]:
    """Names of the ensembles in a model repository that have our model as a step."""
    found = []
    for path in sorted(repository.glob("*/config.pbtxt")):
        try:
            text = re.sub(r"#.*", "", path.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue  # Triton says what is wrong with it
        if "ensemble_scheduling" in text and re.search(rf'\bmodel_name\s*:\s*"{MODEL}"', text):
            found.append(path.parent.name)
    return found


def warning(names: list[str]) -> str:
    """One sentence about them; empty if there are none."""
    if not names:
        return ""
    which = f"the ensemble '{names[0]}' has" if len(names) == 1 else f"the ensembles {', '.join(names)} have"
    return (
        f"warning: {which} the model '{MODEL}' as a step, and on Triton 2.51 requests through one have corrupted the "
        f"server's memory: call '{MODEL}' itself (docs/deploy.md)."
    )
