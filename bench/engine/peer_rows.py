"""What vLLM measured, from the last line `RESULT {...}` of its log or from a JSON file, in one form."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RUNGS = {"bf16": "full", "fp8": "w8", "awq": "w4"}
GIB = 2**30


class Peer:
    """vLLM's rows by rung; what was not measured is None."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Read all files; several of one precision add up.

        Raises:
            ValueError: a file without a result.
        """
        self.decode: dict[tuple[str, int, int], float] = {}
        """ITL p50 ms by rung, sequences and prompt tokens."""
        self.prefill: dict[tuple[str, int], float] = {}
        """TTFT ms by rung and prompt tokens."""
        self.mixed: dict[str, float] = {}
        """Milliseconds of a step."""
        self.kv_tokens: dict[str, int] = {}
        self.used_bytes: dict[str, float] = {}
        """Of the GPU, at the end."""
        for file in files:
            self._add(_result(file))

    def _add(self, found: dict[str, Any]) -> None:
        rung = RUNGS[found["mode"]]
        self.kv_tokens[rung] = found["kv_tokens"]
        facts = {**found.get("info", {}), **found.get("info_end", {})}
        if {"mem_total_gib", "mem_free_gib"} <= facts.keys():
            self.used_bytes[rung] = (float(facts["mem_total_gib"]) - float(facts["mem_free_gib"])) * GIB
        for row in [*found.get("static", []), *found.get("rows", [])]:
            self.decode[rung, row["B"], row.get("prompt", 128)] = row["itl_p50_ms"]
        prefill = found.get("prefill", [])
        for row in [prefill] if isinstance(prefill, dict) else prefill:
            self.prefill[rung, row["prompt"]] = row["ttft_p50_ms"]
        if "mixed" in found:
            self.mixed[rung] = found["mixed"]["step_p50_ms"]

    def itl(self, rung: str, batch: int, prompt: int) -> float | None:
        """Of the same batch with prompts that differ by 3 % at most."""
        near = [key for key in self.decode if key[:2] == (rung, batch) and abs(key[2] - prompt) <= 0.03 * prompt]
        return self.decode[min(near, key=lambda key: abs(key[2] - prompt))] if near else None


def _result(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8")
    lines = [line.removeprefix("RESULT ") for line in text.splitlines() if line.startswith("RESULT ")]
    try:
        found = json.loads(lines[-1] if lines else text)
    except json.JSONDecodeError:
        raise ValueError(f"{file} has no line RESULT and is no JSON") from None
    if not isinstance(found, dict) or found.get("mode") not in RUNGS:
        raise ValueError(f"{file} is no result of vLLM: it has no mode of {', '.join(RUNGS)}")
    return found
