"""Whether the server beside us works: for the health checks of Docker and Kubernetes. Standard library alone.

Triton's own health endpoints stay good when the process that runs the model has died. The engine's heartbeat
does not: it stands still when the engine hangs, when the model's process has died, and when Triton hangs.
"""

from __future__ import annotations

import http.client
import os
import re
import sys
import time
from collections.abc import Mapping

STALE_S = 15.0
"""Age in seconds at which a heartbeat counts as stopped; while all is well it is under one second."""
TIMEOUT_S = 4.0
_HEARTBEAT = re.compile(r"^morph_engine_heartbeat_seconds\{[^}]*\} (\S+)$", re.M)
_UP = re.compile(r"^morph_engine_up\{[^}]*\} (\S+)$", re.M)


def main() -> int:
    """Exit status 0 if the model is loaded and its engine is alive; else 1, and one sentence."""
    complaint = complaint_of(os.environ)
    if complaint:
        print(complaint, file=sys.stderr)
    return 1 if complaint else 0


def complaint_of(env: Mapping[str, str]) -> str:
    """What is wrong, in one sentence; empty if nothing is. The ports come from `MORPH_*`."""
    try:
        status, _ = _get(int(env.get("MORPH_HTTP_PORT") or 8000), "/v2/models/morph/ready")
        if status != 200:
            return f"The model is not ready (status {status})."
        status, page = _get(int(env.get("MORPH_METRICS_PORT") or 8002), "/metrics")
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"Triton does not answer: {error}."
    if status != 200:
        return f"Triton's metrics page answers with status {status}."
    return page_complaint(page, time.time())


def page_complaint(page: str, now: float) -> str:
    """The same for a metrics page read at `now` (Unix seconds)."""
    heartbeat, up = _HEARTBEAT.search(page), _UP.search(page)
    if heartbeat is None or up is None:
        return "The model exports no heartbeat: set REPORT_CUSTOM_METRICS to true in config.pbtxt."
    age = now - float(heartbeat[1])
    if abs(age) <= STALE_S:
        return ""  # also of an engine that is being restarted: to end the server then would end its streams
    if float(up[1]) != 1:
        return "The engine is down."
    if age < 0:  # the clock was set back since, and nothing has come after that
        return f"The engine's last sign of life is {-age:.0f} s ahead of the clock."
    return f"The engine's last sign of life is {age:.0f} s old."


def _get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
