"""What a process has open, by kind: so that a count that has grown says of what."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

GONE = "connection that the other side has reset"
"""A TCP socket that stands in no table any more: all that is left of the connection is this end's descriptor."""
STATES = {"01": "", "08": ", closed by the other side", "0A": " (listening)"}
"""Of TCP sockets in /proc/net/tcp: ESTABLISHED, CLOSE_WAIT, LISTEN; others show as their number."""


def open_descriptors(pid: int, ports: Mapping[int, str]) -> Counter[str]:
    """How many of each kind; `ports` names the ports of this machine that are of interest.

    A connection is called by the port of its own end, or by that of the other end ("to ...").
    """
    found: Counter[str] = Counter()
    targets = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            targets.append(os.readlink(entry.path))
    tables, pairs = _tcp_sockets(pid), _unix_sockets(pid)  # only now: what was open stands in them
    for target in targets:
        if (socket := re.fullmatch(r"socket:\[(\d+)\]", target)) is None:
            found[re.sub(r":\[\d+\]$|\d+$", "", target)] += 1
        elif socket[1] in pairs:
            found["Unix socket"] += 1
        elif socket[1] not in tables:
            found[GONE] += 1
        else:
            own, other, state = tables[socket[1]]
            name = ports.get(own) or (f"to {ports[other]}" if other in ports else "elsewhere")
            found[f"TCP {name}{STATES.get(state, f', state {state}')}"] += 1
    return found


def _tcp_sockets(pid: int) -> dict[str, tuple[int, int, str]]:
    """By inode: own port, other port, state."""
    found = {}
    for table in ("tcp", "tcp6"):
        path = Path(f"/proc/{pid}/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            own, other = (int(end.rpartition(":")[2], 16) for end in fields[1:3])
            found[fields[9]] = (own, other, fields[3])
    return found


def _unix_sockets(pid: int) -> set[str]:
    """Their inodes."""
    return {line.split()[6] for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]}
