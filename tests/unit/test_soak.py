"""The soak's judgement: what grows is named, what only wavers is not."""

from __future__ import annotations

import os
import random
import shutil
import socket
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos.check import Footprint
from tests.chaos.descriptors import GONE, open_descriptors
from tests.chaos.heap import COMPILER, HeapProbe
from tests.chaos.plan import Ask, samplings
from tests.chaos.slopes import Sample, sample, slope_per_hour
from tests.chaos.soak import Course, Findings, fault_of
from tests.chaos.storm import compare
from tests.chaos.streams import Seen

NAMES = ("stub", "engine", "server", "echo server", "echo stub")


def findings(**grows: float) -> Findings:
    """An hour in which processes grow by so many MB, while all waver by half a MB."""
    found, dice = Findings(Course(1, 60, 10, 0.7, 150)), random.Random(4)
    for at_s in range(0, 3600, 160):
        warm = 20.0 * min(1.0, at_s / 600)
        for name in NAMES:
            grown = grows.get(name.replace(" ", "_"), 0.0) * at_s / 3600
            found.samples[name].append(Sample(at_s, 300 + warm + grown + dice.uniform(-0.5, 0.5), 100, 5, 7))
    found.judge()
    return found


def test_a_steady_server_is_good_whatever_it_took_at_first() -> None:
    assert findings().complaints == []


@pytest.mark.parametrize("name", ["stub", "engine", "server"])
def test_a_process_that_grows_is_named(name: str) -> None:
    (complaint,) = findings(**{name: 6.0}).complaints
    assert complaint.startswith(name) and "MB/h" in complaint


def test_what_triton_itself_grows_is_not_held_against_us() -> None:
    assert findings(server=6.0, echo_server=6.0).complaints == []


def test_descriptors_that_pile_up_are_named() -> None:
    found = findings()
    found.samples["server"][-1] = Sample(3600, 320, 100, 5, 12)
    found.judge()
    assert found.complaints[0].startswith("descriptors of server")


def test_one_wild_sample_does_not_make_a_slope() -> None:
    times = [float(at) for at in range(10)]
    assert slope_per_hour(times, [*(2.0 * at for at in times[:-1]), 1e6]) == pytest.approx(7200.0)


def test_a_sample_is_of_the_process_that_was_meant() -> None:
    taken = sample(int(Path("/proc/self").resolve().name), 3.0)
    assert taken.at_s == 3.0 and taken.resident >= taken.anonymous > 1 and taken.threads >= 1 and taken.descriptors >= 3


def test_a_stream_without_its_end_or_its_tokens_is_a_fault() -> None:
    ask = Ask(0, samplings(30)[0], "grpc", 3)
    good, short, doubled, gone = Seen(ask), Seen(ask), Seen(ask), Seen(ask, left=True)
    for seen, tokens, ends in ((good, 30, 1), (short, 29, 1), (doubled, 30, 2)):
        seen.tokens, seen.ends = tokens, ends
    assert fault_of(good) == fault_of(gone) == ""
    assert "29 tokens" in fault_of(short) and "2 ends" in fault_of(doubled)
    assert "hung" in fault_of(Seen(ask, hung=True)) and "error" in fault_of(Seen(ask, error="x"))


def test_what_the_heap_has_in_use_is_what_grows_when_only_that_is_judged() -> None:
    found = Findings(Course(1, 25, 5, 0.7, 90, heap=True, alone=True))
    for at_s in range(0, 1500, 100):
        for name in ("stub", "engine", "server"):  # the allocator has not reached its plateau, yet nothing leaks
            used = 40.0 + (at_s / 1000 if name == "stub" else 0.0)
            found.samples[name].append(Sample(at_s, 300 + at_s / 100, 100, 5, 7, used))
    found.judge()
    assert found.complaints == ["stub grows by 3.60 MB/h"]


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C compiler")
def test_a_heap_shrinks_by_what_is_given_back_although_the_process_keeps_it(tmp_path: Path) -> None:
    probe = HeapProbe(tmp_path)
    # Every hundredth is kept, so the pages stay with the process.
    code = """
import sys
sys.stdin.readline()
many = [bytes(10_000) for _ in range(5_000)]
print(flush=True)
sys.stdin.readline()
many = many[::100]
print(flush=True)
sys.stdin.readline()
"""
    command = [sys.executable, "-S", "-c", code]
    environment = {**os.environ, **probe.environment}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None and process.stdout is not None

        def after_a_word() -> tuple[float, float]:
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
            return probe.in_use_mb(process.pid), sample(process.pid, 0.0).resident

        full, resident = after_a_word()
        thinned, still_resident = after_a_word()
        process.stdin.close()
    assert 45 < full - thinned < 55
    assert resident - still_resident < 10


def test_descriptors_are_told_apart_by_what_they_are_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ports = {server.getsockname()[1]: "ours"}
        before = open_descriptors(os.getpid(), ports)
        with socket.create_connection(server.getsockname()) as client, server.accept()[0]:
            more = open_descriptors(os.getpid(), ports) - before
            assert more == {"TCP ours": 1, "TCP to ours": 1}
            client.close()
            left = open_descriptors(os.getpid(), ports) - before
            assert left == {"TCP ours, closed by the other side": 1}
        assert not open_descriptors(os.getpid(), ports) - before


def test_a_connection_that_its_client_has_reset_is_told_from_one_that_it_has_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ports = {server.getsockname()[1]: "ours"}
        client = socket.create_connection(server.getsockname())
        with server.accept()[0] as ours:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            before = open_descriptors(os.getpid(), ports)
            client.close()
            with pytest.raises(ConnectionResetError):
                ours.recv(1)
            assert open_descriptors(os.getpid(), ports) - before == {GONE: 1}


def footprint(**more: int) -> Footprint:
    kinds = Counter(pipe=24)
    kinds.update(more)
    names = Counter(grpc=64)
    return Footprint({"server": 64}, {"server": kinds.total()}, {"server": 40}, 1, {"server": kinds}, {"server": names})


def test_descriptors_that_have_grown_are_named_by_what_they_are() -> None:
    after = footprint(**{"TCP gRPC": 5})
    for clock in (False, True):
        assert compare(footprint(), after, clock) == ["descriptors of server: 29, before 24; more of: {'TCP gRPC': 5}"]
    assert compare(after, after, clock=False) == []


def test_only_under_a_false_clock_may_reset_connections_stay() -> None:
    after = footprint(**{GONE: 22})
    assert compare(footprint(), after, clock=True) == []
    assert "descriptors of server: 46, before 24" in compare(footprint(), after, clock=False)[0]
