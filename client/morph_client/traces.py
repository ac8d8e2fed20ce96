"""Request traces: three CSV formats, told apart by their columns, and the cuts a replay makes."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from morph_client.errors import BadInput


@dataclass(frozen=True)
class TraceRequest:
    """One request: when it arrives, in seconds from the trace's start, and how long it is, in tokens."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    """1 is the highest; 0 leaves the server's default."""
    slo_class: str | None = None


@dataclass(frozen=True)
class Trace:
    """A trace as read, or as cut."""

    source: str
    """The file's name, without its folder."""
    format: str
    """``morph``, ``azure-2023`` or ``burstgpt``."""
    requests: tuple[TraceRequest, ...]


_PRIORITY, _SLO_CLASS = "priority", "slo_class"
"""Columns that a file of any format may have besides."""


@dataclass(frozen=True)
class _Format:
    name: str
    time: str
    prompt: str
    output: str
    seconds: Callable[[str], float]


def _plain_seconds(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _stamp_seconds(text: str) -> float:
    # Azure's stamps have seven digits after the point; Python 3.10 takes three or six.
    whole, _, fraction = text.strip().partition(".")
    if fraction and not fraction.isdigit():
        raise ValueError(text)
    moment = datetime.fromisoformat(whole).replace(tzinfo=timezone.utc)
    return moment.timestamp() + (float(f"0.{fraction}") if fraction else 0.0)


def _formats() -> tuple[_Format, ...]:
    return (
        _Format("morph", "arrival_s", "prompt_tokens", "output_tokens", _plain_seconds),
        _Format("azure-2023", "TIMESTAMP", "ContextTokens", "GeneratedTokens", _stamp_seconds),
        _Format("burstgpt", "Timestamp", "Request tokens", "Response tokens", _plain_seconds),
    )


def read_trace(path: Path, *, skip_zero_tokens: bool = False) -> Trace:
    """Reads a CSV file; times in ``morph`` files stay as they are, others count from the first row.

    ``skip_zero_tokens`` drops rows of 0 tokens (BurstGPT lists failed requests so) instead of refusing them.
    Raises :class:`BadInput` naming the line and the column of whatever cannot be used.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            header = [name.strip() for name in next(rows, [])]
            layout = _detect(header, path)
            read = list(_requests(rows, header, layout, path, skip_zero_tokens))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not a UTF-8 text file") from None
    except csv.Error as error:
        raise BadInput(f"{path} is not a CSV file: {error}") from None
    if not read:
        raise BadInput(f"{path} holds no requests")
    start = 0.0 if layout.name == "morph" else read[0].arrival_s
    return Trace(path.name, layout.name, tuple(replace(r, arrival_s=r.arrival_s - start) for r in read))


def cut_window(trace: Trace, offset_s: float, window_s: float | None) -> Trace:
    """The requests of ``[offset, offset + window)``, their times counted from the offset.

    Raises :class:`BadInput` if none are left or a number is out of range.
    """
    if offset_s < 0 or (window_s is not None and not window_s > 0):
        raise BadInput("the offset must be at least 0 and the window longer than 0 seconds")
    end = math.inf if window_s is None else offset_s + window_s
    kept = [replace(r, arrival_s=r.arrival_s - offset_s) for r in trace.requests if offset_s <= r.arrival_s < end]
    if not kept:
        last = trace.requests[-1].arrival_s
        raise BadInput(f"no request of {trace.source} lies in that window: the trace runs from 0 to {last:.1f} s")
    return replace(trace, requests=tuple(kept))


def keep_every(trace: Trace, n: int) -> Trace:
    """Keeps the first request and every n-th after it. Raises :class:`BadInput` for n below 1."""
    if n < 1:
        raise BadInput(f"'every n-th request' needs an n of at least 1, not {n}")
    return replace(trace, requests=trace.requests[::n])


def thin(trace: Trace, factor: float, seed: int) -> Trace:
    """Keeps one request in ``factor``, drawn at random, so the load falls and its shape stays.

    Raises :class:`BadInput` for a factor below 1.
    """
    if not factor >= 1:
        raise BadInput(f"the thinning factor must be at least 1, not {factor:g}")
    keep = max(1, round(len(trace.requests) / factor))
    chosen = sorted(random.Random(seed).sample(range(len(trace.requests)), keep))
    return replace(trace, requests=tuple(trace.requests[i] for i in chosen))


def speed_up(trace: Trace, factor: float) -> Trace:
    """Divides every arrival time by ``factor``. Raises :class:`BadInput` unless it is positive."""
    if not (math.isfinite(factor) and factor > 0):
        raise BadInput(f"the speed must be positive, not {factor:g}")
    return replace(trace, requests=tuple(replace(r, arrival_s=r.arrival_s / factor) for r in trace.requests))


def clip(trace: Trace, max_prompt_tokens: int | None, max_output_tokens: int | None) -> Trace:
    """Shortens what is longer. Raises :class:`BadInput` for a limit below 1."""
    for limit in (max_prompt_tokens, max_output_tokens):
        if limit is not None and limit < 1:
            raise BadInput(f"a limit of {limit} tokens leaves nothing to send: give at least 1")
    prompt, output = max_prompt_tokens or math.inf, max_output_tokens or math.inf
    shortened = (
        replace(r, prompt_tokens=int(min(r.prompt_tokens, prompt)), output_tokens=int(min(r.output_tokens, output)))
        for r in trace.requests
    )
    return replace(trace, requests=tuple(shortened))


def fix_lengths(trace: Trace, prompt_tokens: int | None, output_tokens: int | None) -> Trace:
    """Gives every request these lengths; ``None`` leaves the trace's. Raises :class:`BadInput` for a length below 1."""
    for length in (prompt_tokens, output_tokens):
        if length is not None and length < 1:
            raise BadInput(f"a fixed length must be at least 1 token, not {length}")
    fixed = (
        replace(r, prompt_tokens=prompt_tokens or r.prompt_tokens, output_tokens=output_tokens or r.output_tokens)
        for r in trace.requests
    )
    return replace(trace, requests=tuple(fixed))


def _shown(text: str) -> str:
    """A cell as part of a sentence: short, on one line."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return f"{text[:60]}…" if len(text) > 60 else text


def _detect(header: list[str], path: Path) -> _Format:
    for layout in _formats():
        if {layout.time, layout.prompt, layout.output} <= set(header):
            return layout
    nearest = max(_formats(), key=lambda f: len({f.time, f.prompt, f.output} & set(header)))
    missing = [name for name in (nearest.time, nearest.prompt, nearest.output) if name not in header]
    known = "; ".join(f"{f.time},{f.prompt},{f.output}" for f in _formats())
    if len(missing) == 3:
        raise BadInput(f"{path}, line 1: these columns are of no trace format known here ({known})")
    raise BadInput(f"{path}, line 1: column '{missing[0]}' is missing (known formats: {known})")


def _requests(
    rows: Iterator[list[str]], header: list[str], layout: _Format, path: Path, skip_zero_tokens: bool
) -> Iterator[TraceRequest]:
    places = [header.index(name) for name in (layout.time, layout.prompt, layout.output)]
    extra = [header.index(name) if name in header else None for name in (_PRIORITY, _SLO_CLASS)]
    earlier = -math.inf
    for line, row in enumerate(rows, 2):
        if not any(cell.strip() for cell in row):
            continue

        def refuse(column: str, why: str, line: int = line) -> BadInput:
            return BadInput(f"{path}, line {line}, column '{_shown(column)}': {why}")

        if len(row) <= max(places):
            raise refuse(header[min(len(row), len(header) - 1)], "the value is missing")
        when, prompt, output = (row[place].strip() for place in places)
        try:
            arrival = layout.seconds(when)
        except ValueError:
            raise refuse(layout.time, f"'{_shown(when)}' is not a time") from None
        if arrival < 0:
            raise refuse(layout.time, f"the time {_shown(when)} is negative")
        if arrival < earlier:
            raise refuse(layout.time, f"the time {_shown(when)} is earlier than the row before: sort the file by time")
        earlier = arrival
        lengths = []
        for column, text in ((layout.prompt, prompt), (layout.output, output)):
            try:
                lengths.append(int(text))
            except ValueError:
                raise refuse(column, f"'{_shown(text)}' is not a whole number of tokens") from None
            if lengths[-1] < 0 or (lengths[-1] == 0 and not skip_zero_tokens):
                raise refuse(column, f"{_shown(text)} tokens cannot be replayed (--skip-empty drops rows of 0 tokens)")
        level, name = (row[place].strip() if place is not None and place < len(row) else "" for place in extra)
        if not (level or "0").isdecimal():
            raise refuse(_PRIORITY, f"'{_shown(level)}' is not a priority: write 1 (the highest) or more, or nothing")
        if all(lengths):
            yield TraceRequest(arrival, lengths[0], lengths[1], int(level or "0"), name or None)
