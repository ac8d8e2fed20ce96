"""Kubernetes' horizontal autoscaler on Triton's queue metrics, as deploy/kubernetes/overlays/autoscaled-hpa sets it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class ScalerSettings:
    """The settings of the overlay, and what it leaves to the cluster.

    Attributes:
        min_replicas, max_replicas: limits.
        target_pending: requests in Triton's queue per server, mean of the last `window_s`.
        target_queue_s: seconds in Triton's queue per request, mean of the last `window_s` and of the servers.
        interval_s: between looks.
        window_s: of both means.
        up_stabilization_s: the least wish of so long counts before servers are added.
        down_stabilization_s: the greatest wish of so long counts before servers are taken away.
        up_percent, up_period_s: servers may grow by so much in each period.
        down_pods, down_period_s: and shrink by so many.
        tolerance: a metric so near its target changes nothing.
        start_s: from the wish to a server that is ready: machine, image, loading the model.
    """

    min_replicas: int = 1
    max_replicas: int = 8
    target_pending: float = 8.0
    target_queue_s: float = 0.5
    interval_s: float = 15.0
    window_s: float = 60.0
    up_stabilization_s: float = 60.0
    down_stabilization_s: float = 600.0
    up_percent: float = 100.0
    up_period_s: float = 120.0
    down_pods: int = 1
    down_period_s: float = 300.0
    tolerance: float = 0.1
    start_s: float = 120.0


class Autoscaler:
    """Pure but for its memory."""

    def __init__(self, settings: ScalerSettings) -> None:
        self._settings = settings
        self._wishes: deque[tuple[float, int]] = deque()
        self._sizes: deque[tuple[float, int]] = deque()

    def desired(self, now_s: float, replicas: int, pending: float, queue_s: float) -> int:
        """How many servers there should be now.

        Args:
            now_s: rises from call to call.
            replicas: servers that there are, those that are starting among them.
            pending: requests in the queue, mean of the servers that are ready.
            queue_s: seconds in the queue, likewise.
        """
        s = self._settings
        ratio = max(pending / s.target_pending, queue_s / s.target_queue_s)
        wish = replicas if abs(ratio - 1) <= s.tolerance else math.ceil(replicas * ratio)
        wish = min(max(wish, s.min_replicas), s.max_replicas)
        if not self._wishes:  # as Kubernetes does: what there is counts as the first wish
            self._wishes.append((now_s, replicas))
        self._wishes.append((now_s, wish))
        while self._wishes[0][0] < now_s - s.down_stabilization_s:
            self._wishes.popleft()
        least = min(w for at, w in self._wishes if at >= now_s - s.up_stabilization_s)
        most = max(w for _, w in self._wishes)
        self._sizes.append((now_s, replicas))
        while self._sizes[0][0] < now_s - max(s.up_period_s, s.down_period_s):
            self._sizes.popleft()
        if least > replicas:
            before = min(n for at, n in self._sizes if at >= now_s - s.up_period_s)
            return max(replicas, min(least, math.ceil(before * (1 + s.up_percent / 100))))
        if most < replicas:
            before = max(n for at, n in self._sizes if at >= now_s - s.down_period_s)
            return min(replicas, max(most, before - s.down_pods))
        return replicas
