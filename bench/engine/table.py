"""The tables of README.md out of gpu.py's JSON and vLLM's.

    python bench/engine/table.py RESULT.json [--vllm bf16.log fp8.log awq.log]

Ratios are ours / vLLM's for times, and the other way round for speeds, so that less is better throughout the first and
more in the second. A bar that is missed is bold. A file of vLLM's is a JSON object, or a log whose last line
`RESULT {...}` is one, with `mode` (bf16, fp8, awq), `kv_tokens`, and what there is of: `static` and `rows` (lists of B,
prompt, itl_p50_ms), `prefill` (prompt, ttft_p50_ms; or a list), `mixed` (step_p50_ms), `info_end` (mem_free_gib,
mem_total_gib).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from peer_rows import Peer

NAMES = {"full": "full", "w8": "W8", "w4": "W4"}
ITL_BAR, SPEED_BAR = 1.05, 0.95
Row = dict[str, Any]


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)]) + "\n"


def marked(text: str, met: bool) -> str:
    """Bold if the bar is missed."""
    return text if met else f"**{text}**"


def number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def ratio(ours: float, theirs: float | None, bar: float, lower: bool) -> str:
    """ours / theirs of times if `lower`, their / our time else."""
    if not theirs:
        return "–"
    value = ours / theirs if lower else theirs / ours
    return marked(f"{value:.2f}", value <= bar if lower else value >= bar)


def rungs_of(result: Row, phase: str) -> list[str]:
    """Those at which a phase was measured."""
    return [rung for rung in NAMES if result.get(rung, {}).get(phase)]


def decode(result: Row, peer: Peer) -> str:
    rungs = rungs_of(result, "decode")
    batches = sorted({row["batch"] for rung in rungs for row in result[rung]["decode"]})
    rows = []
    for rung in rungs:
        found = {row["batch"]: row for row in result[rung]["decode"]}

        def cells(title: str, make: Callable[[Row], str], found: dict[int, Row] = found) -> list[str]:
            return [title, *(make(found[batch]) if batch in found else "–" for batch in batches)]

        def theirs(row: Row, rung: str = rung) -> float | None:
            return peer.itl(rung, row["batch"], row.get("prompt", 128))

        name = NAMES[rung]
        rows.append(cells(f"{name}: ours", lambda row: number(row["itl_p50_ms"])))
        rows.append(cells(f"{name}: vLLM", lambda row: number(theirs(row))))
        rows.append(cells("of vLLM", lambda row: ratio(row["itl_p50_ms"], theirs(row), ITL_BAR, True)))
        if all("of_roofline" in row for row in found.values()):
            rows.append(cells("GB/s", lambda row: number(row["gb_s"], ".0f")))
            rows.append(cells("of the roofline", lambda row: number(100 * row["of_roofline"], ".0f") + " %"))
    return table(["ITL p50, ms", *(f"B={batch}" for batch in batches)], rows)


def full(result: Row, peer: Peer) -> str:
    rows = []
    for rung in rungs_of(result, "full"):
        for row in result[rung]["full"]:
            theirs = peer.itl(rung, row["batch"], row["prompt"])
            rows.append([
                NAMES[rung], str(row["batch"]), str(row["prompt"]), f"{100 * row['kv_share']:.0f} %",
                number(row["itl_p50_ms"]), number(theirs), ratio(row["itl_p50_ms"], theirs, ITL_BAR, True),
                f"{row['gb_s']:.0f}", f"{100 * row['of_roofline']:.0f} %",
            ])  # fmt: skip
    return table(
        ["KV cache 90 % full", "B", "context", "KV in use", "ITL p50 ms", "vLLM", "of vLLM", "GB/s", "of the roofline"],
        rows,
    )


def prefill(result: Row, peer: Peer) -> str:
    rows = []
    for rung in rungs_of(result, "prefill"):
        for row in result[rung]["prefill"]:
            theirs = peer.prefill.get((rung, row["tokens"]))
            rows.append([
                NAMES[rung], f"{row['tokens']} tokens", number(row["ms"], ".1f"), number(theirs, ".1f"),
                ratio(row["ms"], theirs, SPEED_BAR, False), f"{row['tok_s']:.0f}", number(row.get("tflop_s"), ".0f"),
                number(100 * row["of_roofline"] if "of_roofline" in row else None, ".0f") + " %",
            ])  # fmt: skip
    for rung in rungs_of(result, "mixed"):
        row = result[rung]["mixed"]
        rows.append([
            NAMES[rung], f"step of {row['prefill']} prefill + {row['decodes']} decode", number(row["ms"], ".1f"),
            number(peer.mixed.get(rung), ".1f"), ratio(row["ms"], peer.mixed.get(rung), SPEED_BAR, False),
            f"{row['tok_s']:.0f}", f"{row['tflop_s']:.0f}", f"{100 * row['of_roofline']:.0f} %",
        ])  # fmt: skip
    head = ["rung", "prefill", "ms", "vLLM ms", "speed, of vLLM's", "tok/s", "TFLOP/s", "of the roofline"]
    return table(head, rows)


def capacity(result: Row, peer: Peer) -> str:
    """Also what the KV cache would hold if this process took as much of the GPU as vLLM's does."""
    memory, rows = result.get("memory", {}), []
    token_bytes = memory.get("kv_token_bytes")
    for rung, tokens in zip(NAMES, result["kv_tokens"].values(), strict=False):
        theirs, used = peer.kv_tokens.get(rung), memory.get("rest_mib", {}).get(rung)
        same = None
        if used and rung in peer.used_bytes:
            same = tokens + (peer.used_bytes[rung] - used * 2**20) / token_bytes
        rows.append([
            NAMES[rung], str(tokens), number(theirs, ".0f"), number(used, ".0f"),
            number(peer.used_bytes[rung] / 2**20 if rung in peer.used_bytes else None, ".0f"),
            number(same, ".0f"), "–" if not same or not theirs else marked(f"{same / theirs:.3f}", same >= theirs),
        ])  # fmt: skip
    head = ["KV tokens", "ours", "vLLM", "our NVML MiB", "vLLM's", "ours in vLLM's", "of vLLM's (bar 1)"]
    text = table(head, rows)
    if memory:
        text += (
            f"\nMost that NVML showed while layers changed: {memory['max_mib']:.0f} MiB of a budget of "
            f"{memory['budget_mib']:.0f}: {marked('within' if memory['within'] else 'OVER', memory['within'])}.\n"
        )
    return text


def shifts(result: Row) -> str:
    """Layers that change."""
    rows: list[tuple[str, str, str]] = []

    def add(title: str, value: float, bar: float | None, form: str = ".2f", least: bool = False) -> None:
        if bar is None:
            rows.append((title, format(value, form), "–"))
            return
        met = value >= bar if least else value <= bar
        rows.append((title, marked(format(value, form), met), f"{'≥' if least else '≤'} {bar:g}"))

    layer = result.get("layer")
    if layer:
        middle = sorted(layer["down"], key=lambda row: row["host_ms"])[len(layer["down"]) // 2]
        add("one layer down: host ms, median", middle["host_ms"], 0.3)
        if "host_map_ms" in middle:  # older results have no parts
            parts = " / ".join(f"{middle[f'host_{name}_ms']:.2f}" for name in ("map", "unmap", "fill", "rest"))
            moved = f"{middle['mapped_extents']} extents mapped, {middle['unmapped_extents']} unmapped"
            rows.append((f"of these: map / unmap / fill / rest ({moved})", parts, "–"))
        if middle.get("worker_map_ms"):
            beside = f"{middle['worker_map_ms']:.2f} / {middle['worker_unmap_ms']:.2f}"
            rows.append(("beside the steps: map / unmap, ms", beside, "–"))
        add("one layer down: flipped at step boundary, latest", max(r["boundaries"] for r in layer["down"]), 2, ".0f")
        name = f"first down against number {len(layer['down'])}: host"
        add(name + ("" if layer["first_of_all"] else " (NOT the first of all)"), layer["first_to_last_host"], 1.2)
        add("the same, until its pages have moved", layer["first_to_last_settled"], 1.2)
    if "layer_gpu" in result:
        add("one layer down: GPU ms", result["layer_gpu"]["down_gpu_ms"], 0.4)
    walks = result.get("shift", [])
    layers = int(list(result["kv_tokens"])[1])
    down = [walk for walk in walks if (walk["from"], walk["to"]) == (0, layers)]
    for way, walk in enumerate(down, 1):
        add(f"{layers} layers to the first rung, walk {way}: flipped, ms", walk["flipped_ms"], 30, ".0f")
        add(f"{layers} layers to the first rung, walk {way}: all KV published, ms", walk["settled_ms"], 70, ".0f")
    for walk in [walk for walk in walks if (walk["from"], walk["to"]) == (layers, 0)]:
        add(f"{layers} layers up, ms", walk["settled_ms"], 1000, ".0f")
        rows.append(("ITL p50 / max on the way, ms", f"{walk['itl_p50_ms']:.1f} / {walk['itl_max_ms']:.1f}", "–"))
    for row in result.get("paced", []):
        name = f"a layer every 7 steps around level {row.get('around', '?')}, {row['layers_per_s']:.0f} a second: ITL"
        add(f"{name} p50, of that alone", row["p50_ms"] / row["alone_p50_ms"], 1.05)
        add(f"{name} p99, of that alone", row["p99_ms"] / row["alone_p99_ms"], 1.05)
        add(f"{name} maximum, of that alone", row["max_ms"] / row["alone_max_ms"], 1.5)
    if "upcopy" in result:
        copied = result["upcopy"]
        best = max(copied["walk_1_gb_s"], copied["walk_2_gb_s"])
        add(f"idle, up: copied at {best:.1f} GB/s, of pinned H2D's", copied["of_h2d"], 0.95, least=True)
    traced = result.get("trace", {})
    for rung, share in traced.get("between", {}).items():
        add(f"GPU idle between decode steps, {NAMES.get(rung, rung)}: %", 100 * share, 2, ".2f")
    for rung, share in traced.get("idle", {}).items():
        add(f"the same and between kernels within a step, {NAMES.get(rung, rung)}: %", 100 * share, None, ".1f")
    return table(["shifts and idle time", "measured", "bar"], rows)


def plain(result: Row) -> str:
    found = [*result.get("overlap", []), *result.get("plain", {}).get("overlap", [])]
    rows = [
        (f"graphs {'on' if row['graphs'] else 'off'}, overlap {row['overlap']}", str(row["batch"]),
         f"{row['tok_s']:.0f}", number(row["itl_p50_ms"]))
        for row in found
    ]  # fmt: skip
    narrow = result.get("fp8kv", {}).get("full", {})
    rows += [
        (f"KV cache in fp8, prompts of {row['prompt']}", str(row["batch"]), f"{row['tok_s']:.0f}",
         number(row["itl_p50_ms"]))
        for row in [*narrow.get("decode", []), *narrow.get("full", [])]
    ]  # fmt: skip
    return table(["full precision", "B", "tok/s", "ITL p50 ms"], rows)


def errors(result: Row) -> str:
    """The worst linear at each rung and number of rows."""
    found: dict[tuple[str, int, str], list[Row]] = {}
    for row in result.get("check", []):
        found.setdefault((row["rung"], row["rows"], row["kernel"]), []).append(row)
    columns = ("error_kernel", "error_w_fp32_x", "error_full")
    rows = [
        [NAMES[rung], str(count), kernel, *(f"{max(row[column] for row in group):.1e}" for column in columns)]
        for (rung, count, kernel), group in found.items()
    ]
    head = ["linears", "rows", "kernel", "same weights and activations", "float32 activations", "full precision"]
    return table(head, rows)


def main() -> None:
    """Print every table for which there is something."""
    parser = argparse.ArgumentParser()
    parser.add_argument("result", type=Path)
    parser.add_argument("--vllm", type=Path, nargs="*", default=[])
    given = parser.parse_args()
    result, peer = json.loads(given.result.read_text(encoding="utf-8")), Peer(given.vllm)
    print(f"{result['shape']}, {result['gpu']}\n")
    for text in (
        decode(result, peer), full(result, peer), prefill(result, peer), capacity(result, peer), shifts(result),
        plain(result), errors(result),
    ):  # fmt: skip
        if text.count("\n") > 2:
            print(text)
    for name, reason in result.get("failed", {}).items():
        print(f"FAILED: {name}: {reason}")


if __name__ == "__main__":
    main()
