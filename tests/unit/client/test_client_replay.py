"""``morph replay``: lengths, prefixes, classes, agreement with a reference, precision over time, and its page."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client_fakes import FakeTriton
from hypothesis import given, settings
from hypothesis import strategies as st

from morph_client.agreement import Agreement, agreement, fingerprint
from morph_client.decision_log import from_samples, lines, read_log
from morph_client.errors import BadInput
from morph_client.loadgen import Planned
from morph_client.precision import PrecisionClock
from morph_client.prompts import PromptMaker
from morph_client.replay_plan import Cuts
from morph_client.report import replay_page
from morph_client.stats import Targets
from morph_client.texts import read_words
from morph_client.traces import Trace, TraceRequest, read_trace
from morph_client.types import Chunk, RungShare

Morph = Callable[..., Any]
HEAD = "arrival_s,prompt_tokens,output_tokens"


def trace(tmp_path: Path, rows: str = "0,20,3\n0.05,30,4\n0.1,10,2\n", head: str = HEAD) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(f"{head}\n{rows}")
    return path


def sentence(result: Any) -> str:
    lines = result.stderr.strip().splitlines()
    assert result.exit_code != 0 and len(lines) == 1 and lines[0].startswith("morph: "), result.stderr
    return str(lines[0])


def ten() -> Trace:
    return Trace("t.csv", "morph", tuple(TraceRequest(float(i), 10 + i, 20 + i) for i in range(10)))


def test_every_nth_request_is_kept_from_the_first_on() -> None:
    assert [r.arrival_s for r in Cuts(keep_every=4).apply(ten()).requests] == [0, 4, 8]
    with pytest.raises(BadInput, match="at least 1, not 0"):
        Cuts(keep_every=0).apply(ten())


def test_fixed_lengths_replace_those_of_the_trace() -> None:
    cut = Cuts(fixed_prompt=512, fixed_output=256, max_prompt_tokens=5).apply(ten())
    assert {(r.prompt_tokens, r.output_tokens) for r in cut.requests} == {(512, 256)}
    assert {r.output_tokens for r in Cuts(fixed_prompt=7).apply(ten()).requests} == set(range(20, 30))
    with pytest.raises(BadInput, match="at least 1 token, not 0"):
        Cuts(fixed_output=0).apply(ten())


def test_priorities_and_classes_are_columns_that_a_trace_may_have(tmp_path: Path) -> None:
    rows = "0,1,1,2,gold\n1,1,1,,\n2,1,1\n"
    read = read_trace(trace(tmp_path, rows, HEAD + ",priority,slo_class"))
    assert [(r.priority, r.slo_class) for r in read.requests] == [(2, "gold"), (0, None), (0, None)]
    with pytest.raises(BadInput, match=r"line 2, column 'priority': '-1' is not a priority"):
        read_trace(trace(tmp_path, "0,1,1,-1\n", HEAD + ",priority"))


@settings(deadline=None, max_examples=60)  # a busy machine is no failure
@given(st.integers(1, 400), st.integers(0, 300), st.integers(1, 5))
def test_a_prompt_has_its_length_and_one_of_the_shared_beginnings(tokens: int, shared: int, prefixes: int) -> None:
    maker = PromptMaker([f"w{i}" for i in range(97)], 1.0, 3, shared, prefixes)
    prompts = [maker.make(tokens, i).split() for i in range(12)]
    assert {len(p) for p in prompts} == {tokens}
    assert len({tuple(p) for p in prompts}) == 12, "no two prompts are the same"
    common = min(shared, tokens - 1)
    assert len({tuple(p[:common]) for p in prompts}) <= (prefixes if common else 1)


def test_a_shared_prefix_that_cannot_be_is_refused() -> None:
    for shared, prefixes in ((-1, 1), (5, 0)):
        with pytest.raises(BadInput, match="at least"):
            PromptMaker(["a"], 1.0, 0, shared, prefixes)


def test_texts_may_be_compressed_and_transcripts(tmp_path: Path) -> None:
    meeting = {
        "meeting_transcripts": [{"speaker": "Ada", "content": "good morning"}, {"speaker": "B", "content": "hi"}]
    }
    plain, packed, squeezed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.xz", tmp_path / "a.txt.gz"
    plain.write_text(json.dumps(meeting) + "\n\n")
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    squeezed.write_bytes(gzip.compress(b"one two"))
    assert read_words(plain) == read_words(packed) == ["Ada:", "good", "morning", "B:", "hi"]
    assert read_words(squeezed) == ["one", "two"]
    for name, content, says in (
        ("b.jsonl", b'{"x": 1}\n', "line 1: this is not a meeting"),
        ("c.txt.xz", b"no archive", "not a whole .xz file"),
        ("d.txt.gz", gzip.compress(b"cut short")[:-4], "not a whole .gz file"),
        ("e.txt", b"  ", "holds no words"),
        ("f.txt", b"\xff\xfe", "not a UTF-8 text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=says):
            read_words(tmp_path / name)


def chunk(tokens: int, levels: tuple[int, ...], share: RungShare | None) -> Chunk:
    return Chunk(
        text="x", tokens=tokens, levels=levels, rung_share=share, finish_reason=None, num_input_tokens=1, arrival_s=0.0
    )


def test_tokens_are_booked_in_the_second_and_at_the_rung_in_which_they_came() -> None:
    clock = PrecisionClock()
    half = RungShare(0.5, 0.0, 0.5)
    clock.add(0.9, chunk(2, (0, 0), RungShare(1, 0, 0)), None, 0)
    clock.add(1.1, chunk(2, (6, 6), half), RungShare(1, 0, 0), 2)
    clock.add(1.2, chunk(1, (0,), None), half, 4)  # a server that tells no shares: not booked
    first, second = clock.bins()
    assert (first.at_s, first.tokens, first.level0, first.rungs) == (0, 2, 2, RungShare(2, 0, 0))
    assert (second.at_s, second.tokens, second.level0, second.rungs) == (1, 2, 0, RungShare(0, 0, 2))


def test_agreement_is_measured_against_the_text_of_the_reference() -> None:
    assert agreement([]) is None
    assert agreement([("a b", "a b"), ("a b c d", "a b x d")]) == Agreement(2, 0.5, (1 + 4 / 7) / 2, (1 + 3 / 4) / 2)


def test_a_fingerprint_tells_requests_and_not_times() -> None:
    one, later = [Planned(0, "a", 1, 2)], [Planned(9, "a", 1, 2)]
    assert fingerprint(one, 0.0, 0) == fingerprint(later, 0.0, 0)
    others = [fingerprint([Planned(0, "b", 1, 2)], 0.0, 0), fingerprint([Planned(0, "a", 1, 3)], 0.0, 0)]
    others += [fingerprint(one, 0.7, 0), fingerprint(one, 0.0, 1)]
    assert fingerprint(one, 0.0, 0) not in others


def test_a_run_is_compared_with_a_reference_of_the_same_requests_only(
    morph: Morph, triton: FakeTriton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_page, "write", lambda *_: [])  # drawing takes seconds
    first, bare = tmp_path / "first.json", tmp_path / "bare.json"
    args = ("--url", triton.url, "--metrics-url", triton.metrics_url, "--tokens-per-word", 1)
    path = trace(tmp_path)
    assert morph("replay", path, *args, "--save-outputs", "--out", first).exit_code == 0
    saved = json.loads(first.read_text())["run"]["requests"]
    assert saved[0]["text"] == "w0 w1 w2 " and saved[0]["prompt"].startswith("Page 1.")
    result = morph("replay", path, *args, "--reference", first, "--speed", 2, "--out", bare)
    assert result.exit_code == 0, result.stderr
    assert "outputs equal to the reference 100 %" in " ".join(result.stdout.split())
    figures = json.loads(bare.read_text())
    assert figures["agreement"]["equal"] == 1 and "text" not in figures["run"]["requests"][0]
    assert "a run of other requests" in sentence(morph("replay", path, *args, "--reference", first, "--seed", 1))
    assert "--save-outputs" in sentence(morph("replay", path, *args, "--reference", bare))
    assert "cannot be a reference" in sentence(morph("replay", path, *args, "--reference", path))
    assert "cannot read" in sentence(morph("replay", path, *args, "--reference", tmp_path / "absent.json"))


def test_the_page_of_a_replay_says_what_was_done(
    morph: Morph, triton: FakeTriton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MORPH_ADMIN_KEY", "a-secret-of-mine")
    monkeypatch.setenv("MORPH_LADDER", "w8,w4")
    triton.service.level = 2
    out = tmp_path / "x.json"
    path = trace(tmp_path, "0,9,2,1,gold\n0.1,9,2,2,iron\n", HEAD + ",priority,slo_class")
    result = morph("replay", path, "--url", triton.url, "--metrics-url", triton.metrics_url, "--out", out,
                   "--ttft-slo", 9, "--tpot-slo", 9, "--shared-prefix", 4, "--prefixes", 2)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    for part in ("TTFT p95, class gold", "goodput", "ITL p99", "preemptions"):
        assert part in result.stdout
    sent = [(m.parameters["priority"].uint64_param, m.parameters["slo_class"].string_param)
            for m in triton.service.requests[-2:]]  # fmt: skip
    assert sent == [(1, "gold"), (2, "iron")]
    page = (tmp_path / "x.html").read_text()
    assert "MORPH_LADDER=w8,w4 morph replay" in page and "a-secret-of-mine" not in page
    assert "0 of 2 requests missed the target of 9 s" in page and "2 prefixes of 4 tokens" in page
    assert 'class="narrow"' in page and "What the controller did" in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ttft-slo", "0"], "TTFT target must be a positive number of seconds, not 0"),
        (["--tpot-slo", "-1"], "TPOT target must be a positive"),
        (["--keep-every", "0"], "at least 1, not 0"),
        (["--fixed-prompt", "0"], "at least 1 token, not 0"),
        (["--shared-prefix", "-4"], "at least 0 tokens, not -4"),
        (["--prefixes", "0"], "at least 1 shared prefix"),
        (["--temperature", "-1"], "temperature must be 0"),
        (["--seed", "-1"], "seed must be 0 or more"),
        (["--save-outputs"], "give --out too"),
    ],
)
def test_a_bad_option_is_one_sentence(morph: Morph, tmp_path: Path, arguments: list[str], says: str) -> None:
    assert says in sentence(morph("replay", trace(tmp_path), "--url", "localhost:9", *arguments))


def test_a_target_must_be_a_positive_number() -> None:
    with pytest.raises(BadInput, match="positive number of seconds, not nan"):
        Targets(ttft_s=float("nan"))


def test_the_servers_log_is_read_with_fields_that_are_not_known_yet(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text(
        "morph: level 0 -> 1 down (kv_wait) demand=9 at=1970-01-01T00:01:39.000+00:00\n"
        "noise\n"
        "I1121 morph: level 1 -> 4 down (ttft) demand=9 predicted_s=1.5 at=1970-01-01T00:01:42.500+00:00\n"
        "morph: level 4 -> 0 up (pressure_gone) at=yesterday\n"
    )
    changes = read_log(log, 100.0)
    assert [(c.at_s, c.level_from, c.level_to, c.reason) for c in changes] == [
        (2.5, 1, 4, "ttft"),
        (None, 4, 0, "pressure_gone"),
    ], "what was before the run is left out"
    assert changes[0].inputs == {"demand": "9", "predicted_s": "1.5"}
    told = lines(changes)
    assert "2.50 s  ▼ level  1 → 4" in told[0] and "predicted_s 1.5" in told[0] and told[1].startswith("▲ level  4 → 0")


def test_without_the_log_changes_are_read_off_the_metrics() -> None:
    from test_client_report import run

    quiet, pressed = run("balanced", 1).states, run("balanced", 1, 5).states
    (change,) = from_samples([quiet[0], quiet[1], pressed[2], pressed[3]])
    assert (change.at_s, change.level_from, change.level_to) == (1.0, 0, 5)
    assert change.inputs["kv"] == "30/55"
