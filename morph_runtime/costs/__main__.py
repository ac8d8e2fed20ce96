"""`python -m morph_runtime.costs` measures an engine and writes its profile; for `morph costs`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from morph_runtime.command import run_command
from morph_runtime.config import EngineConfig, resolve_model_folder
from morph_runtime.costs.engine_profile import profile_document
from morph_runtime.costs.held_out import check_held_out
from morph_runtime.costs.measure import measure
from morph_runtime.engine.build import build_parts
from morph_runtime.engine.core import Engine
from morph_runtime.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status. What a user can mend is one sentence on standard error."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    folder = resolve_model_folder(options.model)
    # The settings of serving: the environment's, as `morph serve` has them, and what the command line says.
    given = EngineConfig().with_environment({**os.environ, "MORPH_MODEL": options.model, **_environment(options)})
    config = EngineConfig.from_mapping(_with_budget(json.loads(given.to_json()), options.seconds))
    parts, plan = build_parts(config)
    engine = Engine(parts)
    try:
        measured = measure(parts, plan, options.seconds)
        held_out = check_held_out(parts, plan, measured.costs, options.held_out_seconds)
        engine.check_integrity()
        document = profile_document(parts, plan, measured, held_out, folder)
    finally:
        engine.close()
    try:
        Path(options.out).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {options.out} cannot be written: {error.strerror or error}.") from None


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """The options as environment variables, which name them in errors."""
    names = {
        "MORPH_AWQ": options.awq, "MORPH_LADDER": options.ladder, "MORPH_DTYPE": options.dtype,
        "MORPH_DEVICE": options.device, "MORPH_THREADS": options.threads, "MORPH_KV_TOKENS": options.kv_tokens,
        "MORPH_MEMORY_BUDGET_GIB": options.budget_gib, "MORPH_MAX_NUM_SEQS": options.max_num_seqs,
        "MORPH_MAX_NUM_BATCHED_TOKENS": options.max_num_batched_tokens,
    }  # fmt: skip
    return {name: value for name, value in names.items() if value is not None}


def _with_budget(values: dict[str, dict[str, object]], seconds: float) -> dict[str, dict[str, object]]:
    return {**values, "morph": {**values["morph"], "cost_budget_s": seconds}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="morph", description="Measure what steps and shifts cost on this device.")
    parser.add_argument("model", help="folder of a checkpoint or a pack")
    parser.add_argument("--out", required=True, help="the JSON file to write")
    parser.add_argument("--seconds", type=float, default=20.0, help="for measuring")
    parser.add_argument("--held-out-seconds", type=float, default=20.0, help="for the steps of the check")
    parser.add_argument("--awq", help="AWQ checkpoint of the model, which W4 comes from")
    for name in ("ladder", "dtype", "device", "threads", "kv-tokens", "budget-gib", "max-num-seqs"):
        parser.add_argument(f"--{name}", help="as the setting of that name")
    parser.add_argument("--max-num-batched-tokens", help="as the setting of that name")
    return parser


if __name__ == "__main__":
    sys.exit(main())
