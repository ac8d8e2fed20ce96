"""`python -m morph_runtime.pack`: make a pack of a model, or verify one. `morph pack` runs this."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from morph_runtime.command import run_command
from morph_runtime.config import RUNGS, EngineConfig
from morph_runtime.errors import ConfigError
from morph_runtime.pack.make import make_pack
from morph_runtime.pack.manifest import is_pack
from morph_runtime.pack.reader import PackReader


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status. What a user can mend is one sentence on standard error."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(max(1, os.cpu_count() or 1))
    return run_command(lambda: (_verify if options.verify else _make)(options))


def _make(options: argparse.Namespace) -> None:
    if not options.out:
        raise ConfigError("--out is missing: name the pack's folder, or give --verify to check a pack.")
    if options.source:
        raise ConfigError("--source goes with --verify: it names the checkpoint that a pack was made from.")
    config = EngineConfig.from_mapping(
        {
            "model": {"path": options.model, "awq_path": options.awq, "dtype": options.dtype},
            "morph": {"ladder": options.ladder.split(","), "order": options.order},
            "kernels": _kernels(options.kernel),
        }
    )
    _model_folder(options.model)
    out, began = Path(options.out), time.monotonic()
    manifest = make_pack(config, out, lambda words: print(words, file=sys.stderr))
    size = sum(entry.nbytes for entry in manifest.files.values())
    print(
        f"{out}: {manifest.layers} layers at full, {', '.join(manifest.ladder)}; {size / 2**20:.1f} MiB in "
        f"{time.monotonic() - began:.1f} s. Serve it with MORPH_MODEL={out}"
    )


def _verify(options: argparse.Namespace) -> None:
    given = [f"--{name}" for name in ("out", "kernel") if getattr(options, name)]
    if given:
        raise ConfigError(f"{given[0]} does not go with --verify, which writes nothing.")
    folder = _model_folder(options.model)
    if not is_pack(folder):
        raise ConfigError(f"'{folder}' is not a pack: it has no pack.json.")
    pack = PackReader(folder)
    try:
        pack.verify()
        if options.source:
            pack.check_source(_model_folder(options.source))
        if options.awq:
            pack.check_source(_model_folder(options.awq), awq=True)
    finally:
        pack.close()
    print(f"{folder}: {len(pack.manifest.files)} files are as they were packed.")


def _model_folder(path: str) -> Path:
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"'{path}' is not a model folder: it has no config.json.")
    return Path(path)


def _kernels(given: Sequence[str]) -> dict[str, str]:
    kernels = {}
    for text in given:
        rung, equals, name = text.partition("=")
        if not equals or not name or rung not in ("full", *RUNGS):
            raise ConfigError(f"--kernel must be full=NAME, w8=NAME or w4=NAME, but is '{text}'.")
        kernels[rung] = name
    return kernels


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="morph pack", description="Prepare a model once, so that servers start fast.")
    parser.add_argument("model", help="folder of the unquantized checkpoint; with --verify, of the pack")
    parser.add_argument("--out", default="", help="folder of the pack; must not exist or be empty")
    parser.add_argument("--awq", default="", help="folder of an AWQ checkpoint of the model, which W4 comes from")
    parser.add_argument(
        "--dtype", default="auto", help="bfloat16, float32 or auto: type of activations and full precision"
    )
    parser.add_argument("--ladder", default=",".join(RUNGS), help="rungs below full precision: w8,w4 (default) or one")
    parser.add_argument("--order", default="auto", help="layer order that servers take with morph.order auto")
    parser.add_argument("--kernel", default=[], action="append", help="RUNG=NAME: a kernel instead of the best here")
    parser.add_argument("--verify", action="store_true", help="read a whole pack and compare its checksums")
    parser.add_argument("--source", default="", help="with --verify: the checkpoint it was made from, also compared")
    return parser


if __name__ == "__main__":
    sys.exit(main())
