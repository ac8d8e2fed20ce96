"""What the levels of a run cost in quality, by a table of ``morph quality``: an expectation, free of chance."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morph_client.errors import BadInput


@dataclass(frozen=True)
class LevelLosses:
    """Measured losses by ladder: (level, change of loss in nats per token), from level 0 on, rising."""

    source: str
    by_ladder: Mapping[str, Sequence[tuple[int, float]]]

    @staticmethod
    def read(path: Path) -> LevelLosses:
        """Reads what ``morph quality --out`` wrote; of several series with one ladder the first counts.

        Raises :class:`BadInput` if it is something else.
        """
        try:
            report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found: dict[str, list[tuple[int, float]]] = {}
            for series in report["series"]:
                points = [(int(row["level"]), float(row["loss_change"])) for row in series["rows"]]
                found.setdefault(",".join(series["ladder"]), [(0, 0.0), *sorted(points)])
        except OSError as error:
            raise BadInput(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{path} is not what 'morph quality --out' writes") from None
        return LevelLosses(path.name, found)

    def change(self, ladder: str, by_level: Mapping[int, int]) -> float | None:
        """Relative change of perplexity of tokens computed at these levels; ``None`` without a series of the ladder.

        Losses of levels between two measured ones lie on a straight line.
        """
        points = self.by_ladder.get(ladder)
        # A static rung's ladder is the beginning of a longer one.
        points = points or next((p for known, p in self.by_ladder.items() if known.startswith(f"{ladder},")), None)
        tokens = sum(by_level.values())
        if points is None or not tokens or max(by_level) > points[-1][0]:
            return None
        mean = sum(count * _between(points, level) for level, count in by_level.items()) / tokens
        return math.expm1(mean)


def _between(points: Sequence[tuple[int, float]], level: int) -> float:
    after = next(i for i, (at, _) in enumerate(points) if at >= level)
    if points[after][0] == level:
        return points[after][1]
    (low, a), (high, b) = points[after - 1], points[after]
    return a + (b - a) * (level - low) / (high - low)
