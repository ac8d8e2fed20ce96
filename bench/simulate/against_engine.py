"""The simulator against the real engine on this CPU: the same short burst through both.

    morph costs models/morph-demo --ladder w8,w4 --out PROFILE.json
    python bench/simulate/against_engine.py --profile PROFILE.json [--out RESULT.json]

The engine runs in this process with a stand-in for Triton's queue, which lets requests in by the rule of
`morph_runtime.credits`. Levels are fixed. The clock is the CPU time of this process, so other work on the machine does
not count; where the engine would wait for a request, the clock is put forward. Each burst is simulated twice: with the
profile as it is, and with all step times multiplied by one factor, the real steps' time over what the profile says of
them.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from morph_runtime.config import EngineConfig
from morph_runtime.costs.correction import StepCorrection
from morph_runtime.credits import CreditLimits, EngineNews, may_enter
from morph_runtime.engine.build import build_engine
from morph_runtime.engine.core import Engine
from morph_runtime.engine.messages import SamplingParams, Submit
from morph_runtime.models.batch import HostBatch
from morph_runtime.simulate.arrivals import Arrivals
from morph_runtime.simulate.engine_profile import EngineProfile, read_profile
from morph_runtime.simulate.result import Result
from morph_runtime.simulate.scenario import Policy, simulate


def main() -> None:
    """Run both, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/morph-demo")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    profile = replace(read_profile(options.profile), handoff_s=0.0)
    arrivals = burst(options.requests, options.seed)
    engine = build_engine(settings(options.model, profile))
    rows = []
    for rung in profile.costs.rungs:
        level = profile.level_of(rung)
        engine.set_level(level)
        real, factor = replay(engine, arrivals, profile)
        plain = simulate(profile, arrivals, Policy(rung, level))
        scaled = simulate(replace(profile, costs=profile.mistaken((factor - 1,))), arrivals, Policy(rung, level))
        rows.append({
            "rung": rung, "factor": factor, "real": real, "simulated": figures(plain), "scaled": figures(scaled),
        })  # fmt: skip
        print(f"{rung}: real steps took {factor:.2f} times the profile's")
        for name in real:
            a, b, c = real[name], rows[-1]["simulated"][name], rows[-1]["scaled"][name]
            print(f"  {name:9} real {a:8.4f}  simulated {b:8.4f} {b / a - 1:+6.1%}  scaled {c:8.4f} {c / a - 1:+6.1%}")
    engine.close()
    if options.out:
        head = {"profile": profile.name, "requests": len(arrivals), "seed": options.seed, "rows": rows}
        options.out.write_text(json.dumps(head, indent=1) + "\n")


def burst(count: int, seed: int) -> Arrivals:
    """A quiet start, then three quarters of the requests within three seconds."""
    rng = np.random.default_rng(seed)
    quiet = count // 4
    times = np.sort(np.concatenate([rng.uniform(0, 6, quiet), rng.uniform(6, 9, count - quiet)]))
    return Arrivals(times, rng.integers(48, 320, count), rng.integers(8, 48, count), "burst")


def settings(model: str, profile: EngineProfile) -> EngineConfig:
    """The engine of the profile, without what the simulator does not model."""
    return EngineConfig.from_mapping(
        {
            "model": {"path": model},
            "cache": {"prefix": False},
            "kernels": {"threads": 1},
            "morph": {"mode": "off", "ladder": list(profile.costs.rungs[1:])},
            "scheduler": {
                "max_num_seqs": profile.max_num_seqs,
                "max_num_batched_tokens": profile.max_num_batched_tokens,
                "line": profile.line,
            },
        }
    )


def replay(engine: Engine, arrivals: Arrivals, profile: EngineProfile) -> tuple[dict[str, float], float]:
    """Send every request when it is due; TTFT and TPOT percentiles, and how much longer steps took than predicted."""
    predicted: list[float] = []
    correction, launch = StepCorrection(profile.costs), engine.parts.runner.launch

    def watched(batch: HostBatch, *rest: Any) -> Any:
        predicted.append(correction.predict(engine.level, batch))
        return launch(batch, *rest)

    engine.parts.runner.launch = watched  # type: ignore[method-assign]
    try:
        limits = CreditLimits(profile.line, profile.max_num_batched_tokens, profile.max_num_seqs)
        found, busy_s = serve(engine, arrivals, limits)
    finally:
        engine.parts.runner.launch = launch  # type: ignore[method-assign]
    return found, busy_s / sum(predicted)


def serve(engine: Engine, arrivals: Arrivals, limits: CreditLimits) -> tuple[dict[str, float], float]:
    """The same, with the seconds in which steps ran."""
    rng = random.Random(1)
    vocab = engine.parts.spec.vocab
    outside = deque(range(len(arrivals)))
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    offset = rng.getrandbits(50)
    held: dict[int, int] = {}  # prompt tokens of those who hold a credit
    news = EngineNews()
    busy_s, forward = 0.0, 0.0
    began = time.process_time()
    while len(last) < len(arrivals):
        now = time.process_time() - began + forward
        while outside and arrivals.arrival_s[outside[0]] <= now:
            key, tokens = outside[0], int(arrivals.prompt_tokens[outside[0]])
            if not may_enter(limits, news, len(held), sum(held.values()), 1, tokens):
                break
            held[offset + outside.popleft()] = tokens
            prompt = [rng.randrange(5, vocab) for _ in range(tokens)]
            sampling = SamplingParams(max_tokens=int(arrivals.output_tokens[key]), ignore_eos=True, temperature=0.0)
            engine.submit(Submit(key=offset + key, prompt=prompt, sampling=sampling, arrival_s=float(key)))
        if not engine.has_requests:
            forward += max(0.0, float(arrivals.arrival_s[outside[0]]) - now)
            continue
        step_began = time.process_time()
        output = engine.step(decide=False)
        busy_s += time.process_time() - step_began
        ended = time.process_time() - began + forward
        if output is None:
            continue
        for started in output.started:
            del held[started]
        news = EngineNews(output.running, output.short_of_blocks)
        for delta in output.tokens:
            first.setdefault(delta.key - offset, ended)
        for done in output.finished:
            last[done.key - offset] = ended
    ttft = np.array([first[k] for k in range(len(arrivals))]) - arrivals.arrival_s
    tpot = [(last[k] - first[k]) / (arrivals.output_tokens[k] - 1) for k in range(len(arrivals))]
    return percentiles(ttft, np.array(tpot)), busy_s


def figures(result: Result) -> dict[str, float]:
    """The same of a simulation."""
    return percentiles(result.ttft_s, result.tpot_s)


def percentiles(ttft: Any, tpot: Any) -> dict[str, float]:
    """p50 and p95 of both."""
    return {
        f"{name} p{q}": float(np.percentile(values, q))
        for name, values in (("TTFT", ttft), ("TPOT", tpot))
        for q in (50, 95)
    }


if __name__ == "__main__":
    main()
