"""Serving on a GPU: static rungs against morphing under a trace, and the cost of Triton; each job has its own server.

    python bench/serving/gpu.py --trace TRACE.csv --out RESULT.json [--gpus 0,1] [--jobs compute,kv,kv-all,streams]

README.md beside this file says what the jobs are. Jobs are taken in turns by as many workers as there are GPUs; on one
GPU they follow each other, the variants of a repeat in turns. `--device cpu --model tiny` tries everything out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from engine_side import EngineSide
from replays import in_process, read_load, through_triton, warm
from served import VARIANTS, Prompts, Target, write_repository
from streams import Workers, figures, middle, repeats

from morph_backend.launcher.launch_settings import default_instances
from morph_client.server_process import EmbeddedServer, StartFailed

START_S = 240.0
REPLAYS: Mapping[str, Mapping[str, Any]] = {
    "compute": {"shape": "llama-3-8b"},
    "kv": {"shape": "llama-2-7b", "lengths": [512, 256], "keep_every": 2},
    "kv-all": {"shape": "llama-2-7b", "lengths": [512, 256]},
    "steady": {"shape": "llama-2-7b", "lengths": [512, 256]},
}
"""The trace as recorded; lengths that make KV scarce, of every second request and of all; even arrivals (--rate)."""
LENGTHS: Mapping[str, int] = {"llama-3-8b": 8192, "llama-2-7b": 4096, "codellama-34b": 8192, "tiny": 1024}
"""Tokens of the longest request, by shape."""


def make_jobs(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every server to start, in order: repeats outermost, so that what is compared is measured close together."""
    jobs = []
    for repeat in range(given.repeat):
        for kind in given.jobs.split(","):
            load = dict(REPLAYS.get(kind, {"shape": "llama-3-8b"}))
            shape = given.model or load.pop("shape")
            load.pop("shape", None)
            common = {"kind": kind, "repeat": repeat, "target": vars(make_target(given, shape))}
            if kind in REPLAYS:
                load |= {"speed": given.speed, "window_s": given.window}
                if kind == "steady":
                    load["rate"] = given.rate
                if given.thin > 1:
                    load["keep_every"] = load.get("keep_every", 1) * given.thin
                if given.lengths:
                    load["lengths"] = [int(n) for n in given.lengths.split(":")]
                jobs += [
                    {**common, "side": side, "variant": variant, "load": load, "trace": str(given.trace)}
                    for variant in given.variants.split(",")
                    for side in given.sides.split(",")
                ]
            elif kind == "streams":
                batches = [[int(n) for n in one.split(":")] for one in given.batches.split(",")]
                jobs += [
                    {**common, "side": side, "variant": "full", "batches": batches, "clients": given.clients}
                    for side in ("engine", "triton")
                ]
            elif kind == "pairs":
                first = [int(n) for n in given.batches.split(",")[0].split(":")]
                jobs.append(
                    {**common, "side": "engine", "variant": "balanced", "batches": [first], "pairs": given.pairs}
                )
            else:
                raise SystemExit(f"--jobs: {kind} is none of {', '.join([*REPLAYS, 'streams', 'pairs'])}")
    return jobs


def make_target(given: argparse.Namespace, model: str) -> Target:
    """What to serve."""
    return Target(
        given.device, model, given.budget, given.max_model_len or LENGTHS.get(model, 2048), given.max_num_seqs,
        given.max_num_batched_tokens,
    )  # fmt: skip


def run_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Start the job's server, measure, end it."""
    target = Target(**job["target"])
    morph = job.get("morph") or VARIANTS[job["variant"]]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        folder = target.folder(room)
        settings, prompts = target.settings(folder, morph), Prompts(target, folder, seed=0)
        if job["side"] == "engine":
            engine = EngineSide(settings)
            info = engine.start(START_S)
            try:
                warm(target, prompts, engine)
                found = _engine_job(job, target, prompts, engine)
            finally:
                engine.close()
            found["start_s"], found["base_blocks"] = info.start_s, info.base_blocks
        else:
            repository = write_repository(room, settings)
            instances = os.environ.get("MORPH_INSTANCES") or str(default_instances())
            environment = {**os.environ, "MORPH_MODEL_REPOSITORY": str(repository), "MORPH_INSTANCES": instances}
            log = room / "server.log"
            server = EmbeddedServer(settings["morph"].get("mode", "balanced"), log, environment=environment)
            with server:
                try:
                    start_s = server.wait_ready(START_S)
                    found = _triton_job(job, target, prompts, server, folder)
                    found["instances"] = int(instances)
                except StartFailed as error:
                    raise SystemExit(f"{error}\n{error.log_tail}") from None
                found["start_s"] = start_s
    found["job_s"] = time.monotonic() - began
    return found


def _engine_job(job: Mapping[str, Any], target: Target, prompts: Prompts, engine: EngineSide) -> dict[str, Any]:
    if job["kind"] in REPLAYS:
        trace = read_load(Path(job["trace"]), job["load"], target.max_model_len)
        return in_process(engine, trace, prompts, 600.0, "pin" not in VARIANTS[job["variant"]])
    rows = []
    for size, prompt, output in job["batches"]:
        engine.batch(prompts, size, prompt, 8, 300.0)
        for turn in range(job.get("pairs", 0) * 2 or 1):
            mode = "off" if turn % 2 == 0 else "balanced"
            if job["kind"] == "pairs":
                engine.set_mode(mode)
            found = []
            for _ in range(repeats(size)):
                heard = engine.batch(prompts, size, prompt, output, 300.0)
                found.append(figures([one.sent_s for one in heard], [one.arrivals for one in heard]))
            rows.append({**middle(found), "mode": mode, "max_level": max(one.max_level for one in heard)})
    return {"batches": rows}


def _triton_job(
    job: Mapping[str, Any], target: Target, prompts: Prompts, server: EmbeddedServer, folder: Path
) -> dict[str, Any]:
    if job["kind"] in REPLAYS:
        trace = read_load(Path(job["trace"]), job["load"], target.max_model_len)
        return through_triton(server, trace, prompts, 600.0, "pin" not in VARIANTS[job["variant"]])
    workers = Workers(job["clients"], server.grpc_url, target, folder)
    try:
        rows = []
        for size, prompt, output in job["batches"]:
            workers.batch(size, prompt, 8)
            rows.append(middle([figures(*workers.batch(size, prompt, output)) for _ in range(repeats(size))]))
        return {"batches": rows}
    finally:
        workers.close()


def run_all(jobs: Sequence[dict[str, Any]], gpus: Sequence[str], limit_s: float, say: Any) -> list[dict[str, Any]]:
    """Each job in a process of its own, one at a time per GPU; jobs that would begin after `limit_s` are left out."""
    waiting: SimpleQueue[dict[str, Any]] = SimpleQueue()
    for job in jobs:
        waiting.put(job)
    done, began, lock = [], time.monotonic(), threading.Lock()

    def work(gpu: str) -> None:
        while time.monotonic() - began < limit_s:
            try:
                job = waiting.get_nowait()
            except Empty:
                return
            environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
            ran = subprocess.run(
                [sys.executable, __file__, "--one"], input=json.dumps(job), text=True, capture_output=True,
                env=environment, check=False,
            )  # fmt: skip
            lines = ran.stdout.strip().splitlines()
            result = json.loads(lines[-1]) if ran.returncode == 0 and lines else {"failed": ran.stderr[-4000:]}
            with lock:
                done.append({**job, "gpu": gpu, "result": result})
                say(done)

    threads = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def row(job: Mapping[str, Any]) -> str:
    """One line of the table."""
    name = f"{job['kind']:8} {job['side']:7} {job['variant']:11} {job['repeat']}"
    found = job["result"]
    if "failed" in found:
        return f"{name}  FAILED: {found['failed'].strip().splitlines()[-1:] or ['no word']}"
    if "batches" in found:
        return "\n".join(
            f"{name}  B={int(one['streams']):3} {one['tok_s']:9.1f} tok/s  ITL ms mean {one['itl_mean_ms']:.2f} p50 "
            f"{one['itl_p50_ms']:.2f} p99 {one['itl_p99_ms']:.2f} max {one['itl_max_ms']:.1f}  TTFT ms p50 "
            f"{one['ttft_p50_ms']:.1f} p99 {one['ttft_p99_ms']:.1f}  {one['tokens_per_chunk']:.2f} tokens a chunk "
            f"{one.get('mode', '')}{'' if one.get('together', 1) else ' (the streams never decoded all together)'}"
            for one in found["batches"]
        )
    ttft, tpot, share = found["ttft_s"], found["tpot_s"], found["level0_tokens"]
    return (
        f"{name}  n {found['requests']} errors {found['errors']}  TTFT s mean {_number(ttft['mean'])} p50 "
        f"{_number(ttft['p50'])} p95 {_number(ttft['p95'])} p99 {_number(ttft['p99'])}  > 2 s {found['over_slo']:.1%}  "
        f"TPOT ms p95 {_number(tpot['p95'], 1e3)}  full {'–' if share is None else f'{share:.0%}'}  KV peak "
        f"{_number(found.get('peak_kv_of_base'))}  preempted {found.get('preemptions')}  level "
        f"{found.get('level_peak')} back {_number(found.get('back_to_level_0_s'))} s  "
        f"{found['output_tokens_per_s']:.0f} tok/s"
    )


def _number(value: float | None, times: float = 1.0) -> str:
    return "–" if value is None else f"{value * times:.3g}"


def main() -> None:
    """Run the jobs; print a line for each, write all of it as JSON after each."""
    if sys.argv[1:] == ["--one"]:
        print(json.dumps(run_job(json.loads(sys.stdin.read()))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="CSV of arrivals and lengths (for all jobs but streams and pairs)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", default="compute,kv")
    parser.add_argument("--variants", default="full,w8,w4,balanced", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--sides", default="triton", help="triton, engine, or both: where traces are replayed")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--gpus", default="", help="CUDA_VISIBLE_DEVICES of each worker; default: one, as it is")
    parser.add_argument("--limit", type=float, default=1e9, help="begin no job after so many seconds")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="", help="a shape or a folder, in place of the jobs' own shapes")
    parser.add_argument("--budget", type=float, default=24.0, help="GiB")
    parser.add_argument("--max-model-len", type=int, default=0)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--batches", default="64:128:512,256:32:160,1:128:128", help="streams:prompt:output tokens")
    parser.add_argument("--clients", type=int, default=8, help="client processes for streams through Triton")
    parser.add_argument("--pairs", type=int, default=5, help="turns of mode off and balanced in the job pairs")
    parser.add_argument("--window", type=float, help="seconds of the trace, from its first request")
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--thin", type=int, default=1, help="keep every n-th request")
    parser.add_argument(
        "--lengths", default="", help="prompt:output tokens of every request, in place of the jobs' own"
    )
    parser.add_argument("--rate", type=float, default=0.0, help="requests per second of the job steady")
    given = parser.parse_args()
    jobs = make_jobs(given)
    if any(job["kind"] in REPLAYS for job in jobs) and given.trace is None:
        parser.error("--trace is needed to replay one")
    if "steady" in given.jobs and not (given.rate and given.window):
        parser.error("the job steady needs --rate and --window")

    def say(done: list[dict[str, Any]]) -> None:
        print(row(done[-1]), flush=True)
        given.out.write_text(json.dumps({"settings": {k: str(v) for k, v in vars(given).items()}, "jobs": done}) + "\n")

    run_all(jobs, given.gpus.split(","), given.limit, say)


if __name__ == "__main__":
    main()
