"""Whether what the clients saw is right, and whether the server is as it was before."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from morph_runtime.engine.kept import POISON
from tests.chaos.descriptors import open_descriptors
from tests.chaos.plan import PROMPTS, Ask, samplings
from tests.chaos.replay import NEAR_TIE, Replayer
from tests.chaos.streams import Seen
from triton_server import TritonServer
from wire_client import pending, post, until

AT_A_TIME = 4
"""References; few enough that little KV cache, as storms with shifts have, brings none about."""
LAG_S = 5.0
"""By which the harness may notice later than the server that an engine has ended."""


@dataclass
class Reference:
    """The text of an undisturbed run at level 0, token by token, with the gap between the best two of each."""

    text: str
    spelled: list[str]
    gaps: list[float]

    def tie_at(self, place: int) -> bool:
        """Whether the token that holds character number `place`, or the one before it, was a near tie."""
        end = 0
        for at, token in enumerate(self.spelled):
            end += len(token)
            if end > place:
                return min(self.gaps[max(0, at - 1) : at + 2]) < NEAR_TIE
        return False


def references(server: TritonServer, max_tokens: int) -> dict[tuple[int, str], Reference]:
    """Run each kind of request once, some at a time: in float32 at one level nobody's tokens depend on his company."""
    asks = [Ask(prompt, sampling, "", 0) for prompt in range(len(PROMPTS)) for sampling in samplings(max_tokens)]
    with ThreadPoolExecutor(AT_A_TIME) as crowd:
        found = crowd.map(lambda ask: _reference(server, ask), asks)
        return {ask.reference: reference for ask, reference in zip(asks, found, strict=True)}


def _reference(server: TritonServer, ask: Ask) -> Reference:
    body = {
        "text_input": PROMPTS[ask.prompt], "exclude_input_in_output": True, "return_logprobs": True,
        "return_morph_level": True, "sampling_parameters": json.dumps({**ask.sampling, "logprobs": 2}),
    }  # fmt: skip
    status, answer = post(server, body)
    assert status == 200, answer
    assert not np.any(answer["morph_level"]), "a reference with quantized layers"  # one level or a list of them
    scores = [list(at.values()) for at in json.loads(answer["logprobs"])]
    gaps = [abs(at[1]["logprob"] - at[2]["logprob"]) if len(at) > 2 else 0.0 for at in scores]
    return Reference(answer["text_output"], [at[0]["decoded_token"] for at in scores], gaps)


@dataclass
class Verdict:
    """What was found."""

    ended: int = 0
    left: int = 0
    ties: int = 0
    blamed: int = 0  # were alone in two engines in a row when these were struck as if by a defect of their own
    shifted: list[Seen] = field(default_factory=list)
    """Streams with tokens of quantized layers: compared up to the first of them, the rest is for the replay."""
    replayed: int = 0  # tokens of these that a reference has computed again
    wrong: list[str] = field(default_factory=list)

    def judge(self, seen: Seen, reference: Reference, own_faults_s: Sequence[float]) -> None:
        """Check one stream; `own_faults_s` are the times at which an engine was ended as if by its own fault."""
        name = _name(seen)
        if seen.hung:
            self.wrong.append(f"hung: {name}, after {seen.text!r}")
        elif POISON in seen.error and sum(seen.began_s < at_s < seen.ended_s + LAG_S for at_s in own_faults_s) >= 2:
            self.blamed += 1
        elif seen.error:
            self.wrong.append(f"error: {name}: {seen.error}")
        elif not seen.left and seen.ends != 1:
            self.wrong.append(f"{seen.ends} ends: {name}")
        else:
            self.left += seen.left
            self.ended += not seen.left
            self._compare(seen, reference, name)

    def _compare(self, seen: Seen, reference: Reference, name: str) -> None:
        pure, whole = "", not seen.left
        for piece, levels in zip(seen.pieces, seen.levels, strict=True):
            if any(levels):
                self.shifted.append(seen)
                whole = False
                break
            pure += piece
        if not (pure == reference.text if whole else reference.text.startswith(pure)):
            place = next((at for at, (a, b) in enumerate(zip(pure, reference.text, strict=False)) if a != b), len(pure))
            if "seed" not in seen.ask.sampling and reference.tie_at(place):
                self.ties += 1
            else:
                self.wrong.append(f"wrong text: {name}: {pure!r} instead of {reference.text!r}, from {place} on")
        if not seen.left and "stop" not in seen.ask.sampling and seen.tokens != seen.ask.sampling["max_tokens"]:
            self.wrong.append(f"{seen.tokens} tokens: {name}")

    def replay(self, replayer: Replayer) -> None:
        """Compute the streams that saw quantized layers again, token by token."""
        for seen in self.shifted:
            told = replace(seen.told, levels=[level for piece in seen.levels for level in piece])
            result = replayer.check(PROMPTS[seen.ask.prompt], seen.ask.sampling, told)
            self.replayed += result.compared
            self.ties += result.ties
            if result.wrong:
                self.wrong.append(f"{_name(seen)}: {result.wrong}, {seen.told.runs}")


def _name(seen: Seen) -> str:
    return f"{seen.ask.way}, {PROMPTS[seen.ask.prompt]!r}, {seen.ask.sampling}"


@dataclass(frozen=True)
class Footprint:
    """What the server holds of the machine: by process threads, descriptors and resident MiB; and shared memory.

    `open_kinds` says what the descriptors are, `thread_names` what the threads are called.
    """

    threads: dict[str, int]
    descriptors: dict[str, int]
    resident_mib: dict[str, int]
    shared: int
    open_kinds: dict[str, Counter[str]] = field(repr=False)
    thread_names: dict[str, Counter[str]] = field(repr=False)

    def more(self, what: str, before: Footprint, name: str) -> dict[str, int]:
        """Which `threads` or `descriptors` of a process there are more of than before."""
        now, then = ((at.open_kinds if what == "descriptors" else at.thread_names)[name] for at in (self, before))
        return dict(now - then)


def processes(server: TritonServer) -> dict[str, int]:
    """The ids of `server`, `stub` and `engine`, as far as they live; those of further stubs are `stub 2` and so on."""
    found: dict[str, int] = {}
    for pid in sorted(server.family()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        for name, mark in {"engine": b"engine.process", "stub": b"backend_stub", "server": b"/tritonserver"}.items():
            if mark in command.split(b"\0--")[0] or (name == "engine" and mark in command):
                alike = sum(known.split()[0] == name for known in found)
                found[f"{name} {alike + 1}" if alike else name] = pid
                break
    return found


def footprint(server: TritonServer) -> Footprint:
    """The present one."""
    pids = processes(server)
    names = {name: _thread_names(pid) for name, pid in pids.items()}
    threads = {name: called.total() for name, called in names.items()}
    ports = {server.http: "HTTP", server.grpc: "gRPC", server.metrics: "metrics"}
    kinds = {name: open_descriptors(pid, ports) for name, pid in pids.items()}
    page_mib = os.sysconf("SC_PAGE_SIZE") / 2**20
    resident = {
        name: round(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page_mib) for name, pid in pids.items()
    }
    descriptors = {name: kinds[name].total() for name in pids}
    return Footprint(threads, descriptors, resident, len(server.shared_memory()), kinds, names)


def _thread_names(pid: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for entry in os.scandir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError):  # ended meanwhile
            found[Path(entry.path, "comm").read_text().strip()] += 1
    return found


def wait_idle(server: TritonServer) -> None:
    """Everything is given back: no request anywhere, no block in use, level 0."""
    until(lambda: server.metric("morph_engine_up") == 1, 60.0, "the engine")
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "morph_kv_blocks_used", "morph_level"):
        until(lambda name=name: server.metric(name) == 0, 30.0, f"{name} 0")
    until(lambda: pending(server) == 0, 10.0, "an empty queue")
