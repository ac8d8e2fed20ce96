"""Continuous batching: which requests get how many tokens in the next step. Knows block ids, no tensors."""

from morph_runtime.scheduler.plan import ScheduledSlice, ScoredPositions, StepPlan
from morph_runtime.scheduler.prefix import PrefixCache
from morph_runtime.scheduler.request import Request, RequestState
from morph_runtime.scheduler.scheduler import Scheduler

__all__ = ["PrefixCache", "Request", "RequestState", "ScheduledSlice", "Scheduler", "ScoredPositions", "StepPlan"]
