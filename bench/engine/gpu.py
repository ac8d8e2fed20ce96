"""The engine on a GPU with a real model's shape: every figure of bench/engine/README.md, by phases.

    python bench/engine/gpu.py --shape llama-3-8b --budget 24 --out RESULT.json [--phases decode,prefill,shift]
    python bench/engine/gpu.py --device cpu --shape tiny --out RESULT.json      # tries everything out, without a GPU

In this process, without Triton; random weights; prefix cache off. README.md says what the phases are. Prints a line per
measurement, and writes the JSON after every phase. A phase that fails says why and the others go on; the exit status is
then 1. The phases `plain` and `fp8kv` start an engine with other settings in a process of its own, after the others.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import shifting
import static_batches
import torch
from bench_setup import SMALL, Bench, Scale
from engine_driver import Driver
from kernel_trace import trace
from memory_watch import Memory
from random_model import SHAPES, write_folder
from reference_check import check
from roofline import Peaks, Roofline

from morph_runtime.config import EngineConfig
from morph_runtime.engine.build import build_engine

FIRST: Mapping[str, Callable[[Bench], Any]] = {"layer": shifting.layer, "memory": shifting.memory}
"""Before anything else: the first shift of all, and memory before profiles and references have taken any."""
BY_RUNG: Mapping[str, Callable[[Bench, str], Any]] = {
    "decode": static_batches.decode, "full": static_batches.full, "prefill": static_batches.prefill,
    "mixed": static_batches.mixed,
}  # fmt: skip
LAST: Mapping[str, Callable[[Bench], Any]] = {
    "sampled": static_batches.sampled, "overlap": static_batches.overlap, "shift": shifting.shift,
    "paced": shifting.paced, "upcopy": shifting.upcopy, "check": check, "layer_gpu": shifting.layer_gpu, "trace": trace,
}  # fmt: skip
CHILDREN: Mapping[str, Sequence[str]] = {
    "plain": ("--phases", "overlap", "--set", "kernels.graphs=false", "--ladder", "w8"),
    "fp8kv": ("--phases", "decode,full", "--set", 'memory.kv_dtype="fp8"', "--rungs", "full", "--ladder", "w8"),
}
"""What another process is to measure."""
PHASES = (*FIRST, *BY_RUNG, *LAST, *CHILDREN)


class Notes(logging.Handler):
    """Keeps the engine's log lines for the result."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Report:
    """The result, and the phases that have failed."""

    def __init__(self, out: Path | None) -> None:
        self.result: dict[str, Any] = {"seconds": {}, "failed": {}}
        self._out = out
        self._events: Any = None

    def attempt(self, name: str, work: Callable[[], Any], place: dict[str, Any], key: str) -> bool:
        """Run a phase; what it gives stands at place[key], or its error with the failed ones."""
        began = time.monotonic()
        try:
            found = work()
        except Exception as error:  # noqa: BLE001  whatever it was, the other phases are worth their time
            traceback.print_exc()
            self.result["failed"][name] = f"{type(error).__name__}: {error}"
            print(f"{name}: FAILED, {self.result['failed'][name]}", flush=True)
        else:
            if name == "trace":
                self._events = {way: found.pop(way) for way in ("down", "up")}
                self._events["idle_share"] = found["idle"]["full"]
            place[key] = found
            if key in PHASES and key not in CHILDREN:
                for row in found if isinstance(found, list) else [found]:
                    print(name, json.dumps(row), flush=True)
        self.result["seconds"][name] = round(time.monotonic() - began, 2)
        self.write()
        return name not in self.result["failed"]

    def write(self) -> None:
        """All there is so far."""
        if self._out:
            self._out.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
            if self._events:
                self._out.with_suffix(".trace.json").write_text(json.dumps(self._events), encoding="utf-8")


def numbers(text: str) -> tuple[int, ...]:
    """Of a list with commas."""
    return tuple(int(part) for part in text.split(","))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--budget", type=float, default=24.0, help="GiB")
    parser.add_argument("--max-model-len", type=int, default=0, help="tokens; 0: the model's own, at most 8192")
    parser.add_argument("--ladder", default="w8,w4")
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--batches", type=numbers, help="of the decode phase")
    parser.add_argument("--rungs", default="", help="of the phases that are measured at each; empty: all")
    parser.add_argument("--set", action="append", default=[], help="section.field=value, JSON")
    parser.add_argument("--out", type=Path)
    for name, value in vars(Peaks()).items():
        parser.add_argument(f"--peak-{name.replace('_', '-')}", type=float, default=value, help="of the GPU")
    given = parser.parse_args()
    unknown = [name for name in given.phases.split(",") if name not in PHASES]
    if unknown:
        parser.error(f"no such phase: {', '.join(unknown)}; there are {', '.join(PHASES)}")
    return given


def settings_of(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The engine's settings."""
    small = given.device == "cpu"
    longest = given.max_model_len or min(8192, int(str(SHAPES[given.shape]["max_position_embeddings"])))
    settings: dict[str, Any] = {
        "device": given.device, "model": {"path": str(folder), "dtype": "bfloat16", "load_format": "dummy",
                                          "max_model_len": min(longest, 512) if small else longest},
        "memory": {"kv_tokens": 4096} if small else {"budget_gib": given.budget}, "cache": {"prefix": False},
        "scheduler": {"max_num_seqs": 32 if small else 256, "max_num_batched_tokens": 256 if small else 2048},
        "morph": {"mode": "off", "ladder": given.ladder.split(","), "costs": "off"},
        "overlap": "on",
    }  # fmt: skip
    for item in given.set:
        name, value = item.split("=", 1)
        *section, field = name.split(".")
        (settings.setdefault(section[0], {}) if section else settings)[field] = json.loads(value)
    return settings


def start(given: argparse.Namespace, folder: Path, result: dict[str, Any]) -> Bench:
    """Build the engine."""
    settings, scale = settings_of(given, folder), SMALL if given.device == "cpu" else Scale()
    if given.batches:
        scale = replace(scale, batches=given.batches)
    memory = Memory(given.device)
    began = time.monotonic()
    woken = threading.Event()
    engine = build_engine(EngineConfig.from_mapping(settings), woken.set)
    parts, layers = engine.parts, engine.parts.spec.layers
    result["start_s"] = time.monotonic() - began
    result |= {"shape": given.shape, "settings": settings, "torch": torch.__version__}
    result["gpu"] = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    result["ledger"] = parts.ledger.describe()
    blocks = {str(level): parts.capacities[level] for level in range(0, len(parts.capacities), layers)}
    result["kv_tokens"] = {level: count * parts.config.memory.block_tokens for level, count in blocks.items()}
    result["kernels"] = {rung: parts.swapper._slots.kernel_names(rung) for rung in parts.ledger.slot_bytes}
    result["nvml_start_mib"] = memory.used_bytes() / 2**20
    peaks = Peaks(**{name: getattr(given, f"peak_{name}") for name in vars(Peaks())})
    roofline = Roofline(parts, peaks)
    result["peaks"] = vars(peaks)
    levels = {"full": 0, **{rung: layers * (i + 1) for i, rung in enumerate(given.ladder.split(","))}}
    rungs = given.rungs.split(",") if given.rungs else list(levels)
    longest = settings["model"]["max_model_len"]
    print(json.dumps(result), flush=True)
    return Bench(
        engine, woken, Driver(engine), roofline, memory, scale, {rung: levels[rung] for rung in rungs}, longest, result
    )


def recover(bench: Bench) -> None:
    """After a phase that has failed: nobody runs, all layers are at full precision."""
    try:
        bench.driver.clear()
        bench.engine.set_level(0)
    except Exception as error:  # noqa: BLE001  the next phase will say so too
        print(f"the engine could not be put back: {error}", flush=True)


def measure(given: argparse.Namespace, report: Report, phases: set[str]) -> None:
    """All phases of one engine."""
    folder = write_folder(given.shape, Path(tempfile.mkdtemp()))
    bench = start(given, folder, report.result)
    result = report.result

    def one(name: str, work: Callable[[], Any], place: dict[str, Any], key: str) -> None:
        if not report.attempt(name, work, place, key):
            recover(bench)

    # Steps as they will come, before anything is timed.
    static_batches.batch_row(bench.driver, min(8, bench.scale.batch), bench.scale.prompt, 16)
    for name, phase in FIRST.items():
        if name in phases:
            one(name, partial(phase, bench), result, name)
    for rung, level in bench.levels.items():
        place = result.setdefault(rung, {})
        for name, work in BY_RUNG.items():
            if name in phases:
                bench.engine.set_level(level)
                one(f"{rung} {name}", partial(work, bench, rung), place, name)
    for name, phase in LAST.items():
        if name in phases:
            one(name, partial(phase, bench), result, name)
    one("integrity", bench.engine.check_integrity, result, "integrity")
    result["nvml_end_mib"] = bench.memory.used_bytes() / 2**20
    bench.engine.close()


def elsewhere(given: argparse.Namespace, extra: Sequence[str]) -> Any:
    """The result of this program with other settings, in a process of its own.

    Raises:
        RuntimeError: it has failed; its error has been printed.
    """
    out = Path(tempfile.mkdtemp()) / "result.json"
    command = [
        sys.executable, __file__, "--shape", given.shape, "--device", given.device, "--budget", str(given.budget),
        "--max-model-len", str(given.max_model_len), "--out", str(out), *extra,
        *(["--batches", ",".join(map(str, SMALL.batches if given.device == "cpu" else (1, 8, 64, 128)))]),
    ]  # fmt: skip
    for item in given.set:
        command += ["--set", item]
    if subprocess.run(command, check=False).returncode:
        raise RuntimeError(f"{' '.join(extra)}: its error stands above")
    return json.loads(out.read_text(encoding="utf-8"))


def main() -> None:
    """Measure what was asked for."""
    given = arguments()
    phases = set(given.phases.split(","))
    report, notes = Report(given.out), Notes()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[logging.StreamHandler(), notes])
    report.result["notes"] = notes.lines
    if phases - set(CHILDREN):
        report.attempt("engine", partial(measure, given, report, phases), {}, "")
    for name, extra in CHILDREN.items():
        if name in phases:
            report.attempt(name, partial(elsewhere, given, extra), report.result, name)
    failed = report.result["failed"]
    print("seconds", json.dumps(report.result["seconds"]), flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
