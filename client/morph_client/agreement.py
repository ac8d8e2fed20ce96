"""How far outputs agree with those of a reference run of the same requests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morph_client.errors import BadInput
from morph_client.loadgen import Planned
from morph_client.stats import RequestRecord


@dataclass(frozen=True)
class Agreement:
    """Means over the requests that are complete in both runs. Texts are compared, for tokens are not on the wire."""

    requests: int
    equal: float
    """Share of outputs that are the same to the last character."""
    common_prefix: float
    """Share of an output's characters before the first that differs."""
    same_words: float
    """Share of an output's words that stand at the same place in the reference."""


def fingerprint(plan: Sequence[Planned], temperature: float, seed: int) -> str:
    """Tells runs of the same requests: prompts, output lengths and draws. When they were due does not matter."""
    facts = [temperature, seed, *([p.prompt, p.output_tokens] for p in plan)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass(frozen=True)
class Reference:
    """The outputs of an earlier run."""

    source: Path
    requests: str
    """Its :func:`fingerprint`."""
    texts: Mapping[int, str]
    """Complete outputs by the place of the request in the plan."""

    @staticmethod
    def read(path: Path) -> Reference:
        """Reads what ``morph replay --save-outputs --out`` wrote. Raises :class:`BadInput`."""
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            records = value["run"]["requests"]
            texts = {r["index"]: r["text"] for r in records if r["error"] is None and "text" in r}
            requests = str(value["fingerprint"])
        except OSError as error:
            raise BadInput(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{path} is not what 'morph replay --out' writes, so it cannot be a reference") from None
        if not texts:
            raise BadInput(f"{path} holds no outputs: make the reference with --save-outputs")
        return Reference(path, requests, texts)

    def check(self, requests: str) -> None:
        """Raises :class:`BadInput` if the reference is of other requests."""
        if requests != self.requests:
            raise BadInput(
                f"{self.source} is a run of other requests: a reference needs the same trace, cuts, prompt text, seed "
                "and temperature"
            )

    def agreement(self, records: Sequence[RequestRecord]) -> Agreement | None:
        """Compares; ``None`` if no request is complete in both."""
        pairs = [
            (r.text, self.texts[r.index])
            for r in records
            if r.error is None and r.text is not None and r.index in self.texts
        ]
        return agreement(pairs)


def agreement(pairs: Sequence[tuple[str, str]]) -> Agreement | None:
    """Of outputs, each with its reference; ``None`` for none."""
    if not pairs:
        return None
    count = len(pairs)
    return Agreement(
        requests=count,
        equal=sum(a == b for a, b in pairs) / count,
        common_prefix=sum(_common(a, b) / max(len(a), len(b), 1) if a != b else 1.0 for a, b in pairs) / count,
        same_words=sum(_same_words(a.split(), b.split()) for a, b in pairs) / count,
    )


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _same_words(a: Sequence[str], b: Sequence[str]) -> float:
    longest = max(len(a), len(b))
    return sum(x == y for x, y in zip(a, b, strict=False)) / longest if longest else 1.0
