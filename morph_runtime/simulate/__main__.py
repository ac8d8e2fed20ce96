"""`python -m morph_runtime.simulate` simulates an engine over a trace; for `morph simulate`, which reads the traces."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from morph_runtime import __version__
from morph_runtime.command import run_command
from morph_runtime.config import MODES, EngineConfig, MorphSettings, validate
from morph_runtime.errors import ConfigError
from morph_runtime.simulate.arrivals import read_arrivals
from morph_runtime.simulate.autoscaler import ScalerSettings
from morph_runtime.simulate.engine_profile import read_profile
from morph_runtime.simulate.pilot import SignalPath, quiet_controller
from morph_runtime.simulate.study import AUTO, SWEEPS, Study, run_study

MAX_SERVERS = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status. What a user can mend is one sentence on standard error."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _simulate(options), shows_progress=True)


def _simulate(options: argparse.Namespace) -> None:
    profile = read_profile(Path(options.profile))
    settings = MorphSettings(
        ladder=profile.costs.rungs[1:],
        ttft_slo_s=options.slo,
        tpot_slo_s=options.tpot_slo,
        dwell_s=options.dwell,
        interval_s=options.interval,
    )
    modes = options.mode or ["balanced"]
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"--mode must be one of {', '.join(MODES)}, but is '{mode}'.")
    validate(replace(EngineConfig(), morph=settings))
    statics = options.static or list(profile.costs.rungs)
    for rung in statics:
        profile.level_of(rung)
    quiet_controller()
    study = Study(
        profile=profile,
        arrivals=read_arrivals(Path(options.trace)),
        settings=settings,
        path=SignalPath(delay_s=_not_negative("--signal-delay", options.signal_delay)),
        model_error=_errors(options.model_error, len(profile.costs.rungs)),
        statics=statics,
        modes=modes,
        ablation=options.ablation,
        sweeps=[_sweep(text) for text in options.sweep or ()],
        servers=[_servers(text) for text in options.replicas or ()],
        scaling=ScalerSettings(
            start_s=_not_negative("--replica-start", options.replica_start), max_replicas=options.max_replicas
        ),
    )
    began_s, cpu_s = time.perf_counter(), time.process_time()
    found = run_study(study, _say)
    took = {"wall_s": time.perf_counter() - began_s, "cpu_s": time.process_time() - cpu_s}
    text = json.dumps({"product": __version__, **found, "took": took}) + "\n"
    try:
        Path(options.out).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {options.out} cannot be written: {error.strerror or error}.") from None


def _sweep(text: str) -> tuple[str, list[float]]:
    name, _, listed = text.partition("=")
    try:
        values = [float(part) for part in listed.split(",")]
    except ValueError:
        values = []
    if name not in SWEEPS or not values or not all(map(math.isfinite, values)):
        raise ConfigError(f"--sweep must be NAME=VALUE,VALUE,… with a name of {', '.join(SWEEPS)}, but is '{text}'.")
    return name, values


def _errors(text: str, rungs: int) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, rungs) or not all(-1 < value < math.inf for value in values):
        raise ConfigError(
            f"--model-error must be one number above -1, or {rungs} of them (one per rung), but is '{text}'."
        )
    return values


def _servers(text: str) -> int:
    if text == "auto":
        return AUTO
    if not text.isdecimal() or not 1 <= int(text) <= MAX_SERVERS:
        raise ConfigError(f"--replicas must be auto or a number from 1 to {MAX_SERVERS}, but is '{text}'.")
    return int(text)


def _not_negative(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{name} must be 0 seconds or more, but is {value}.")
    return value


def _say(words: str) -> None:
    """Progress: one line that is written over on a terminal, else a line each."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{words}", end="", file=sys.stderr, flush=True)
    else:
        print(words, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    scaling = ScalerSettings()
    defaults = MorphSettings()
    parser = argparse.ArgumentParser(prog="morph", description="Simulate the engine and its controller over a trace.")
    parser.add_argument("trace", help="JSON: the lists arrival_s, prompt_tokens and output_tokens")
    parser.add_argument("--profile", required=True, help="engine profile (JSON): costs, capacities, limits")
    parser.add_argument("--out", required=True, help="the JSON file to write")
    parser.add_argument("--slo", type=float, default=defaults.ttft_slo_s, help="TTFT target in seconds")
    parser.add_argument("--tpot-slo", type=float, default=0.0, help="TPOT target in seconds; 0: none")
    parser.add_argument("--mode", action="append", help="of the controller; may be repeated; default: balanced")
    parser.add_argument("--static", action="append", help="rung to serve throughout; may be repeated; default: all")
    parser.add_argument("--dwell", type=float, default=defaults.dwell_s, help="the controller's dwell time, seconds")
    parser.add_argument("--interval", type=float, default=defaults.interval_s, help="seconds between decisions")
    parser.add_argument("--signal-delay", type=float, default=0.0, help="age of the queue's signal, seconds")
    parser.add_argument("--model-error", default="0", help="share by which the cost model errs, or one per rung")
    parser.add_argument("--ablation", action="store_true", help="also without KV growth, and without gain in speed")
    parser.add_argument("--sweep", action="append", help="NAME=VALUE,VALUE,…; may be repeated")
    parser.add_argument("--replicas", action="append", help="auto or a number of servers; may be repeated")
    parser.add_argument("--replica-start", type=float, default=scaling.start_s, help="seconds until one is ready")
    parser.add_argument("--max-replicas", type=int, default=scaling.max_replicas, help="the autoscaler's limit")
    return parser


if __name__ == "__main__":
    sys.exit(main())
