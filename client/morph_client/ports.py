"""TCP ports for servers that are started a moment later."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

_LOWEST = 10_000
_HIGHEST = 65_535
_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> list[int]:
    """Different ports that are free now.

    They lie outside the range from which the system takes ports for outgoing connections, if that leaves any: no
    connection can then take one before its server listens there, nor can who polls for the server connect to itself.
    """
    pick = random.SystemRandom()  # whoever seeds the common generator gets other ports all the same
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        for port in pick.sample(candidates := _candidates(), len(candidates)):
            if len(found) == count:
                break
            one = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("", port))
                found.append(port)
        return found


def _candidates() -> list[int]:
    """Ports a user may listen on, without those of outgoing connections unless nearly all are."""
    everything = range(_LOWEST, _HIGHEST + 1)
    try:
        first, last = (int(number) for number in _OUTGOING.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return list(everything)
    others = [port for port in everything if not first <= port <= last]
    return others if len(others) >= 1000 else list(everything)
