"""Iteration-level scheduling (Orca, OSDI 2022) with chunked prefill (Sarathi-Serve, OSDI 2024) and
preemption by recomputation, over a block pool whose capacity may change between steps.

A step serves every decode first, then prefills that have begun, then admits from the waiting line
in order of (priority, arrival). A request is admitted only when blocks for all its known tokens
are free beyond the watermark, so a prefill that has begun never waits for blocks. What the prefix
cache holds of a request is decided with its admission: live blocks that it shares need no room.

A step goes through three calls: `schedule` chooses it, `advance` moves the requests on once it is
launched, `resolve` books what it sampled. The next step may be scheduled and launched before the one in
flight is resolved. What makes that right: tokens that are not known yet hold their places; a block stays with
its request until every step in flight that works on it is over; nobody is preempted and no block moves
while a step is in flight; and blocks are offered to the prefix cache only when they are resolved.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from morph_runtime.config import SchedulerSettings
from morph_runtime.errors import IntegrityError
from morph_runtime.kv import BlockPool
from morph_runtime.scheduler.line import Line
from morph_runtime.scheduler.plan import ScheduledSlice, ScoredPositions, StepPlan
from morph_runtime.scheduler.prefix import Hit, PrefixCache
from morph_runtime.scheduler.request import Request, RequestState


class Scheduler:
    """Owns the requests and their blocks. Not thread-safe: the step loop alone calls it."""

    def __init__(
        self,
        settings: SchedulerSettings,
        pool: BlockPool,
        prefix: PrefixCache,
        block_tokens: int,
        max_model_len: int,
        eos: Iterable[int],
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._prefix = prefix
        self._block_tokens = block_tokens
        self._max_model_len = max_model_len
        self._eos = frozenset(eos)
        self._requests: dict[int, Request] = {}
        self._running = Line()
        self._waiting = Line()
        self._in_flight = 0
        self._leaving: set[Request] = set()
        """Finished requests whose blocks a step in flight still uses."""
        self.preemptions = 0
        self.prefix_queries = 0
        """Tokens of all requests that were scheduled for the first time."""
        self.prefix_hits = 0
        """Those among them that the prefix cache held."""
        self.computed_tokens = 0
        """Tokens of requests that have given up their blocks, whose keys and values they had computed."""
        self.clean_tokens = 0
        """Those among them that nothing below full precision went into, be it the layers or the KV they attended to."""

    # -- requests come and go ------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Put a new request into the waiting line. Its key must be new; prompt + max_tokens must fit the model."""
        if request.key in self._requests:
            raise IntegrityError(f"Request key {request.key} is already in use.")
        self._requests[request.key] = request
        end = min(request.prompt_len + request.sampling.max_tokens, self._max_model_len)
        request.limit = max(end, request.prompt_len + 1)
        self._waiting.add(request)

    def cancel(self, key: int) -> Request | None:
        """End a request at once; None if it is unknown (already finished).

        Its blocks are free, or will be when the steps in flight that use them are resolved.
        """
        request = self._requests.get(key)
        if request is not None:
            self._finish(request)
        return request

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests in the line: new and preempted ones."""
        return len(self._waiting)

    @property
    def running(self) -> tuple[Request, ...]:
        """The running requests, most urgent first."""
        return tuple(self._running)

    def waiting(self) -> list[Request]:
        """The waiting requests, most urgent first."""
        return list(self._waiting)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens need."""
        return -(-num_tokens // self._block_tokens)

    def fits(self, request: Request, level: int) -> bool:
        """Whether a waiting request could be admitted at `level` now: its blocks and the watermark are free."""
        return self._room(request, level) is not None

    def reusable(self, request: Request, level: int) -> tuple[int, int]:
        """What a waiting request would find if it were admitted at `level` now: tokens it need not compute, and live
        blocks that it would share."""
        hit = self._find(request, level)
        return len(hit.blocks) * self._block_tokens, self._live(hit)

    # -- one step ------------------------------------------------------------------------------------------------

    @property
    def must_preempt(self) -> bool:
        """Whether the decodes that run need more blocks than there are. The step in flight is resolved first then."""
        if self._pool.num_free >= len(self._running):
            return False
        size = self._block_tokens
        return self._pool.num_free < sum(r.is_decoding and r.computed == len(r.blocks) * size for r in self._running)

    def schedule(self, level: int) -> StepPlan:
        """Choose the tokens of the next step, which runs at `level`, and take the blocks they need.

        Raises:
            IntegrityError: a step is in flight though `must_preempt`.
        """
        plan = StepPlan()
        budget = self._settings.max_num_batched_tokens
        size = self._block_tokens
        decoding: list[Request] = []
        prefilling: list[Request] = []
        for request in self._running:
            known = len(request.tokens)
            if request.computed == known - 1 and known > request.prompt_len:
                if known < request.limit:  # else its last token is being sampled
                    decoding.append(request)
            else:
                prefilling.append(request)
        running, slices = RequestState.RUNNING, plan.slices
        for request in decoding:
            if budget == 0:
                break
            if request.state is not running:
                continue
            if request.computed < len(request.blocks) * size or self._extend(request, plan):
                slices.append(ScheduledSlice(request, request.computed, 1, True))
                plan.rows += 1
                budget -= 1
        for request in prefilling:
            budget -= self._prefill(request, budget, plan)
        if plan.preempted:
            plan.short_of_blocks = True
        else:
            self._admit(budget, level, plan)
        return plan

    def advance(self, plan: StepPlan) -> None:
        """Move the requests of a step on that has been launched: what it samples stands in their tokens as unknown."""
        self._in_flight += 1
        for part, first, count in plan.scored:
            plan.slices[part].request.scored = first + count
        row = -1
        for request, start, length, samples in plan.slices:
            request.computed = start + length
            request.flights += 1
            if samples:
                request.tokens.append(row)
                row -= 1

    def resolve(self, plan: StepPlan, sampled: Sequence[int], level: int) -> list[tuple[Request, str]]:
        """Book a step that has run; steps are resolved in the order in which they were advanced.

        What it sampled for requests that have finished meanwhile is dropped.

        Args:
            plan: as `schedule` returned it.
            sampled: a token for each slice that samples, in their order.
            level: the level at which the step ran.

        Returns:
            the requests that have ended, each with `stop` or `length`.
        """
        self._in_flight -= 1
        finished: list[tuple[Request, str]] = []
        size, eos, gone = self._block_tokens, self._eos, RequestState.FINISHED
        tokens = iter(sampled)
        for request, start, length, samples in plan.slices:
            request.flights -= 1
            token = next(tokens) if samples else 0
            if request.state is gone:
                if not request.flights:
                    self._leaving.remove(request)
                    self._release(request)
                continue
            cursor, stop = request.cursor, start + length
            assert cursor is not None
            if length > 1 or stop % size == 0 or cursor.level != level:  # else there is nothing to note
                self._prefix.record(cursor, request.tokens, request.blocks, stop, level, length)
            if not samples:
                continue
            request.tokens[stop] = token
            request.levels.append(level)
            sampling = request.sampling
            reason = ""
            if token in eos and sampling.structured_outputs is not None:
                reason = "stop"  # allowed only where the grammar is complete, and nothing can follow
            elif (token in eos and not sampling.ignore_eos) or token in sampling.stop_token_ids:
                reason = "stop" if stop + 1 - request.prompt_len >= sampling.min_tokens else ""
            if not reason and stop + 1 >= request.limit:
                reason = "length"
            if reason:
                self._finish(request)
                finished.append((request, reason))
        return finished

    def remap_blocks(self, mapping: Mapping[int, int]) -> None:
        """Patch every block table, and the prefix cache, after blocks have moved (old id -> new id).

        Raises:
            IntegrityError: a step is in flight, which knows the old ids.
        """
        if self._in_flight:
            raise IntegrityError("KV blocks are moved while a step is in flight.")
        for request in self._running:
            request.blocks = array("i", [mapping.get(b, b) for b in request.blocks])
        self._prefix.remap(mapping)

    def check_integrity(self) -> None:
        """Block tables, pool and prefix cache agree, and no block that will be written has another holder.

        Raises:
            IntegrityError: the books do not agree.
        """
        held = Counter(b for r in (*self._running, *self._leaving) for b in r.blocks)
        if len(held) != self._pool.num_used or any(self._pool.holders(b) != n for b, n in held.items()):
            raise IntegrityError(f"The block tables and the {self._pool.num_used} live blocks of the pool disagree.")
        for request in self._requests.values():
            if len(request.blocks) * self._block_tokens < request.computed:
                raise IntegrityError(f"Request {request.key} has {request.computed} tokens but too few blocks.")
            if request.state is RequestState.WAITING and (request.blocks or request.cursor):
                raise IntegrityError(f"Waiting request {request.key} holds blocks.")
            # Blocks behind the cursor are unwritten, or written by a step in flight, or were not worth keeping.
            own = request.blocks[request.cursor.blocks :] if request.cursor else ()
            if any(held[b] > 1 or self._pool.is_kept(b) for b in own):
                raise IntegrityError(f"Request {request.key} would write into a KV block that others read.")
        if any(not r.flights for r in self._leaving) or (self._leaving and not self._in_flight):
            raise IntegrityError("A finished request holds blocks that no step in flight uses.")
        self._prefix.check_integrity()

    # -- parts ---------------------------------------------------------------------------------------------------

    def _extend(self, request: Request, plan: StepPlan) -> bool:
        """Take another block, preempting less urgent requests; False if the request itself had to go."""
        while self._pool.num_free == 0:
            victim = self._running.last
            self._preempt(victim, plan)
            if victim is request:
                return False
        request.blocks.extend(self._pool.allocate(1))
        return True

    def _prefill(self, request: Request, budget: int, plan: StepPlan) -> int:
        """Schedule the next chunk of a request whose blocks are all there; returns the tokens it takes."""
        rows = self._settings.max_num_seqs - plan.rows
        if budget == 0 or rows == 0 or request.state is not RequestState.RUNNING:
            return 0
        length = min(len(request.tokens) - request.computed, budget)
        if request.is_unscored:
            length = self._score(request, length, rows, plan)
        last = request.computed + length == len(request.tokens)
        plan.slices.append(ScheduledSlice(request, request.computed, length, last))
        plan.rows += last
        return length

    def _score(self, request: Request, length: int, rows: int, plan: StepPlan) -> int:
        """Score the prompt positions of a chunk of `length` tokens as far as `rows` allow; returns its new length."""
        first, end = max(request.computed, request.scored), request.prompt_len - 1
        # Half of the rows, so that others can end their prefill beside it.
        count = min(request.computed + length, end, first + max(1, rows // 2)) - first
        if count <= 0:
            return length  # recomputed after a preemption: these were scored before
        plan.scored.append(ScoredPositions(len(plan.slices), first, count))
        plan.rows += count
        # The last token of a prompt samples, which takes a row of its own.
        return first + count - request.computed if first + count < end or count == rows else length

    def _admit(self, budget: int, level: int, plan: StepPlan) -> None:
        while budget > 0 and self._waiting and len(self._running) < self._settings.max_num_seqs:
            request = self._waiting.first
            hit = self._room(request, level)
            if hit is None:
                plan.short_of_blocks = True
                return
            self._waiting.remove(request)
            self._start(request, hit, plan)
            budget -= self._prefill(request, budget, plan)

    def _room(self, request: Request, level: int) -> Hit | None:
        """What a waiting request may reuse, if the other blocks it needs and the watermark are free; else None."""
        spare = int(self._settings.watermark * self._pool.capacity) + 1 if self._running else 0
        missing = self.blocks_for(len(request.tokens)) + spare - self._pool.num_free
        if missing > self._pool.num_used:
            return None  # not even if every live block were shared
        hit = self._find(request, level)
        return hit if missing <= self._live(hit) else None

    def _find(self, request: Request, level: int) -> Hit:
        """What the prefix cache has of a request: nothing if its prompt is to be scored, for that takes its logits."""
        return self._prefix.find(() if request.is_unscored else request.tokens, level)

    def _live(self, hit: Hit) -> int:
        """Blocks of a hit that others hold; taking the rest of them uses up room."""
        return sum(1 for block in hit.blocks if self._pool.holders(block))

    def _start(self, request: Request, hit: Hit, plan: StepPlan) -> None:
        """Let a request run; there is room."""
        request.shared = self._live(hit)
        request.cursor = self._prefix.take(hit)  # before others are allocated, so that these are not evicted for them
        request.computed = len(hit.blocks) * self._block_tokens
        fresh = self._pool.allocate(self.blocks_for(len(request.tokens)) - len(hit.blocks))
        request.blocks = array("i", [*hit.blocks, *fresh])
        request.state = RequestState.RUNNING
        self._running.add(request)
        if not request.started:
            request.started = True
            request.cached_tokens = request.computed
            self.prefix_queries += len(request.tokens)
            self.prefix_hits += request.computed
            plan.started.append(request)

    def _preempt(self, request: Request, plan: StepPlan) -> None:
        """Take a running request's blocks; when it is admitted again, what the prefix cache lacks is recomputed.

        It is the least urgent and decodes are served by urgency, so the plan has no slice of it yet.
        """
        if self._in_flight:
            raise IntegrityError(f"Request {request.key} is preempted while a step is in flight.")
        plan.preempted.append(request)
        self._running.remove(request)
        self._release(request)
        request.preemptions += 1
        self.preemptions += 1
        request.state = RequestState.WAITING
        self._waiting.add(request)

    def _finish(self, request: Request) -> None:
        while request.tokens[-1] < 0:  # its end came before what the step in flight samples
            request.tokens.pop()
        if request.state is RequestState.RUNNING:
            self._running.remove(request)
            if request.flights:
                self._leaving.add(request)
            else:
                self._release(request)
        else:
            self._waiting.remove(request)
        request.state = RequestState.FINISHED
        del self._requests[request.key]

    def _release(self, request: Request) -> None:
        cursor = request.cursor
        assert cursor is not None
        self.computed_tokens += request.computed - cursor.reused
        self.clean_tokens += min(request.computed, cursor.clean) - cursor.reused
        self._prefix.leave(cursor)
        self._pool.free(reversed(request.blocks))  # the end of a prefix is evicted before its beginning
        request.cursor = None
        request.blocks = array("i")
        request.shared = 0
        request.computed = 0
