"""`python -m tests.chaos.fuzz --seed N --requests M`: hostile requests on the wire, against a real server.

Every one must get an answer or one sentence that it is the client's fault; the engine must not end.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "triton")]

from tests.chaos import check, storm  # noqa: E402 - the test helpers must be found first
from tests.chaos.slopes import sample  # noqa: E402
from triton_server import TritonServer  # noqa: E402
from wire_client import generate  # noqa: E402

CLIENTS = 4
PARTS = 10
"""After each of which memory is looked at."""
PATIENCE_S = 600.0
"""For one answer: some requests ask for all the tokens that there is room for, and the machine may be busy."""
JSON_READER = re.compile(b"[Uu]nable to parse|[Ff]ailed to parse")
"""Words of Triton's HTTP frontend, which answers 500 when JSON is not what the model's inputs need; we never see it."""
TEXTS = (
    "", "a", "\x00", "\ud800", "\u202e", "🙂" * 40, "ﷺ", "\x1b[2J", "<|end|>", "z" * 3000, "q" * 40_000, "nan", "-0",
    "1e999", "true", "../../etc/passwd", "{{7*7}}", "%s%n",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 5, 0.0, 1e-9, 0.5, 1.5, 1e308, -1e308, 2**31, 2**63, 2**64, -(2**63), 10**30)
KEYS = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids",
    "logit_bias", "bad_words", "logprobs", "prompt_logprobs", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "n", "ignore_eos", "include_stop_str_in_output", "structured_outputs",
    "skip_special_tokens", "best_of",
)  # fmt: skip
GRAMMARS: tuple[Any, ...] = (
    {"choice": ["a", "b"]}, {"choice": []}, {"regex": "(" * 500}, {"regex": "(a|aa)*b{1000}"}, {"json": {"$ref": "#"}},
    {"json": '{"type": "object"'}, {"grammar": "root ::= root"}, {"json": {"type": "string", "pattern": "(?=x)"}}, [],
)  # fmt: skip
BOMBS = ("[" * 50_000, '{"a":' * 20_000, '{"text_input": ' * 5_000, "{" + '"a":1,' * 20_000 + '"b":2}', "\xff\xfe", "")


class Dice:
    """Hostile values, by seed."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def value(self, depth: int = 0) -> Any:
        """Anything that JSON can say, and some that it cannot."""
        pick, choice = self._random.random(), self._random.choice
        if pick < 0.4 or depth > 2:
            return choice(
                (choice(TEXTS), choice(NUMBERS), choice(NUMBERS), None, True, False, float("nan"), float("inf"))
            )
        if pick < 0.7:
            return [self.value(depth + 1) for _ in range(self._random.randrange(4))]
        return {choice(TEXTS)[:20]: self.value(depth + 1) for _ in range(self._random.randrange(4))}

    def sampling(self) -> dict[str, Any]:
        """Parameters of which some are near the truth."""
        chosen: dict[str, Any] = {"max_tokens": self._random.randrange(1, 6)}
        for _ in range(self._random.randrange(5)):
            key = self._random.choice(KEYS)
            chosen[key] = self._random.choice(GRAMMARS) if key == "structured_outputs" else self.value()
        return chosen

    def body(self) -> bytes:
        """The body of one generate request."""
        pick = self._random.random()
        if pick < 0.04:
            return self._random.choice(BOMBS).encode("utf-8", "surrogatepass")
        body: dict[str, Any] = {"text_input": self.value() if pick > 0.97 else self._random.choice(TEXTS)}
        sampling = self.sampling()
        if pick < 0.5:
            body["sampling_parameters"] = json.dumps(sampling)
        elif pick < 0.75:
            body |= sampling
        elif pick < 0.8:
            body["sampling_parameters"] = self.value()
        elif pick < 0.9:
            body["sampling_parameters"] = json.dumps(self.value())
        for flag in ("stream", "exclude_input_in_output", "return_logprobs", "stop", "image", "slo_class", "priority"):
            if self._random.random() < 0.02:
                body[flag] = self.value()
        return json.dumps(body).encode()


def fuzz(server: TritonServer, seed: int, requests: int, outcomes: Counter[str], wrong: list[str]) -> None:
    """Send them from a few clients at a time."""

    def client(number: int) -> None:
        dice = Dice(f"{seed}/{number}")
        connection = http.client.HTTPConnection("127.0.0.1", server.http, timeout=PATIENCE_S)
        for _ in range(max(1, requests // CLIENTS)):
            body = dice.body()
            try:
                connection.request("POST", "/v2/models/morph/generate", body)
                answer = connection.getresponse()
                status, text = answer.status, answer.read()
            except (OSError, http.client.HTTPException) as error:
                wrong.append(f"{type(error).__name__}: {error}: {body[:300]!r}")
                connection.close()
                continue
            kind = "Triton's JSON reader" if status == 500 and JSON_READER.search(text) else str(status)
            outcomes[kind] += 1
            if kind not in ("200", "400", "Triton's JSON reader"):
                wrong.append(f"{status} {text[:200]!r}: {body[:300]!r}")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run(folder: Path, seed: int, requests: int) -> tuple[Counter[str], list[str], dict[str, Any]]:
    """A server of its own; what was answered, what was wrong, and figures."""
    server = TritonServer(folder, {"MORPH_MAX_NUM_SEQS": "16"})
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    try:
        server.wait_ready(120).wait_metrics()
        before = generate(server, "Once upon a time", max_tokens=12, temperature=0)["text_output"]
        fuzz(server, seed, min(200, requests), Counter(), wrong)  # what is made at first use
        check.wait_idle(server)
        first, began = check.footprint(server), time.monotonic()
        memory: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for part in range(1, PARTS + 1):
            fuzz(server, seed + part, requests // PARTS, outcomes, wrong)
            check.wait_idle(server)
            for name, pid in check.processes(server).items():
                taken = sample(pid, 0.0)
                memory[name].append((round(taken.resident, 1), round(taken.anonymous, 1)))
        took_s = time.monotonic() - began
        if server.metric("morph_engine_restarts_total"):
            wrong.append(f"the engine has ended: {server.output()[-2000:]}")
        if server.metric("morph_backend_errors_total"):
            wrong.append(f"defects in the serving process: {server.output()[-2000:]}")
        if generate(server, "Once upon a time", max_tokens=12, temperature=0)["text_output"] != before:
            wrong.append("the model says something else than before")
        footprints = {"before": str(first), "after": str(check.footprint(server))}
        figures = {"seconds": round(took_s, 1), **footprints, "resident_and_anonymous_mb_by_part": dict(memory)}
        if server.stop() != 0:
            wrong.append(f"exit status {server.process.returncode}")
    finally:
        server.stop()
    return outcomes, wrong, figures


def main() -> int:
    """Run once; exit status 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="tests.chaos.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()
    seed = storm.any_seed() if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        outcomes, wrong, figures = run(Path(folder), seed, given.requests)
    print(dict(outcomes), figures)
    print(*wrong[:20], sep="\n")
    if given.json is not None:
        answer = {"seed": seed, "requests": given.requests, "statuses": dict(outcomes), "wrong": len(wrong), **figures}
        given.json.write_text(json.dumps(answer, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
