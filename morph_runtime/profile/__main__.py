"""`python -m morph_runtime.profile` measures levels or finds a layer order; for `morph quality` and `morph profile`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from morph_runtime import __version__
from morph_runtime.command import run_command
from morph_runtime.errors import ConfigError
from morph_runtime.profile.importance import PAPER_WEIGHTS, find_order
from morph_runtime.profile.levels import Selection, choose, parse_ladder, parse_levels, report
from morph_runtime.profile.order_file import (
    FORMAT,
    OrderFile,
    RungOrder,
    Score,
    TextEntry,
    fingerprint,
    write_order_file,
)
from morph_runtime.profile.session import Session, SessionOptions, open_session
from morph_runtime.profile.weights import Form


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status. What a user can mend is one sentence on standard error."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: (_quality if options.command == "quality" else _profile)(options), shows_progress=True)


def _quality(options: argparse.Namespace) -> None:
    ladders = [parse_ladder(text) for text in options.ladder or ("w8,w4", "w4")]
    selection = Selection(
        ladders=list(dict.fromkeys(ladders)),
        orders=list(dict.fromkeys(options.order or ("auto",))),
        levels=parse_levels(options.levels),
        every=options.every,
    )
    if options.every < 0:
        raise ConfigError(f"--every must be at least 1, but is {options.every}.")
    if options.every and options.levels:
        raise ConfigError("--every and --levels exclude each other: give one of them.")
    session = _open(options, {rung for ladder in ladders for rung in ladder})
    found = report(session, choose(session, selection), _say)
    _write(
        options.out,
        json.dumps(
            {"product": __version__, "awq": Path(options.awq).resolve().name if options.awq else "", **found}, indent=1
        )
        + "\n",
    )


def _profile(options: argparse.Namespace) -> None:
    weights = _weights(options.weights)
    rungs = list(dict.fromkeys(options.rung or ("w8", "w4")))
    session = _open(options, set(rungs))
    orders = {}
    for rung in rungs:
        form: Form = "w8" if rung == "w8" else "awq" if "awq" in session.store.models else "w4"
        scores = find_order(session.forward, session.store, session.windows, form, weights, _say)
        orders[rung] = RungOrder(
            [score.layer for score in scores],
            [Score(score.layer, score.lts, score.lrs, score.mds, score.lis) for score in scores],
        )
    head, windows = session.head(), session.windows
    found = OrderFile(
        format=FORMAT,
        product=__version__,
        torch=str(torch.__version__),
        device=head["device"],
        dtype=head["dtype"],
        model=fingerprint(session.model.host_slots()),
        layers=session.layers,
        awq="awq" in session.store.models or session.model.packed_awq,
        weights=list(weights),
        text=TextEntry(windows.name, windows.sha256, len(windows.tokens), windows.length),
        rungs=orders,
    )
    write_order_file(found, Path(options.out))


def _open(options: argparse.Namespace, rungs: set[str]) -> Session:
    settings = SessionOptions(
        model=options.model,
        awq=options.awq,
        rungs=sorted(rungs),
        text=options.text,
        windows=options.windows,
        window_tokens=options.window_tokens,
        dtype=options.dtype,
        device=options.device,
        threads=options.threads,
    )
    return open_session(settings, _say)


def _weights(text: str) -> tuple[float, float, float]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(math.isfinite(value) and value >= 0 for value in values) or not sum(values):
        raise ConfigError(
            f"--weights must be three numbers from 0, for LTS, LRS and MDS, separated by commas, but is '{text}'."
        )
    return values[0], values[1], values[2]


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error.strerror or error}.") from None


def _say(words: str) -> None:
    """Progress: one line that is written over on a terminal, else a line each."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{words}", end="", file=sys.stderr, flush=True)
    else:
        print(words, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="morph", description="Measure what quantizing layers costs.")
    commands = parser.add_subparsers(dest="command", required=True)
    quality = commands.add_parser("quality", help="perplexity, KL divergence and top-1 agreement by level")
    quality.add_argument("--ladder", action="append", help="w8, w4 or w8,w4; may be repeated")
    quality.add_argument("--order", action="append", help="a layer order, or random:SEED; may be repeated")
    quality.add_argument("--levels", default="", help="which levels; default: about six per rung")
    quality.add_argument("--every", type=int, default=0, help="every n-th level")
    profile = commands.add_parser("profile", help="layer importance and an order of layers")
    profile.add_argument("--rung", action="append", choices=("w8", "w4"), help="may be repeated; default: both")
    profile.add_argument("--weights", default=",".join(map(str, PAPER_WEIGHTS)), help="of LTS, LRS and MDS")
    for command, windows in ((quality, 32), (profile, 8)):
        command.add_argument("model", help="folder of a checkpoint or a pack")
        command.add_argument("--text", required=True, help="a file of UTF-8 text, or that packed as .xz")
        command.add_argument("--out", required=True, help="the JSON file to write")
        command.add_argument("--awq", default="", help="AWQ checkpoint of the model, which W4 comes from")
        command.add_argument("--windows", type=int, default=windows, help="pieces of the text")
        command.add_argument("--window-tokens", type=int, default=512, help="tokens of a piece")
        command.add_argument("--dtype", default="auto", help="bfloat16, float32 or auto")
        command.add_argument("--device", default="cpu", help="cpu or cuda")
        command.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores but one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
