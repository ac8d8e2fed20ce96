"""Definitions to grammars, in a thread of its own, with a bounded cache."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from morph_runtime.engine.messages import StructuredOutputs
from morph_runtime.errors import RequestError
from morph_runtime.structured.matcher import GrammarMatcher, complaint

FIELD = "structured_outputs"
MAX_LEXER_STATES = 50_000
"""States of one grammar's lexer, 1 to 2 kB each; more is an error of the request."""


class CompiledGrammar:
    """A grammar in its initial state."""

    def __init__(self, inner: LLMatcher) -> None:
        self._inner = inner

    def matcher(self) -> GrammarMatcher:
        """A matcher of its own at the beginning; takes microseconds."""
        return GrammarMatcher(self._inner.deep_copy())


class GrammarCompiler:
    """Compiles each definition once while it stays in the cache. `compile` is for the step loop's thread alone."""

    def __init__(
        self,
        tokenizer_file: Path,
        vocab: int,
        eos_ids: Sequence[int],
        cache: int,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """The tokenizer is read when the first grammar is asked for.

        Args:
            tokenizer_file: `tokenizer.json` of the model.
            vocab: columns of the model's logits.
            eos_ids: tokens that end the output; a grammar allows them where it is complete.
            cache: definitions to keep compiled; 0 keeps none.
            wake: called from the compiler's thread whenever a grammar is ready or refused.
        """
        self._tokenizer_file = tokenizer_file
        self._vocab = vocab
        self._eos_ids = list(eos_ids)
        self._cache: OrderedDict[StructuredOutputs, Future[CompiledGrammar]] = OrderedDict()
        self._size = cache
        self._wake = wake
        self._tokenizer: LLTokenizer | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")

    def compile(self, wanted: StructuredOutputs) -> Future[CompiledGrammar]:
        """The grammar, now or later; the future raises RequestError if the definition is refused."""
        known = self._cache.get(wanted)
        if known is not None:
            self._cache.move_to_end(wanted)
            return known
        future = self._worker.submit(self._compile, wanted)
        future.add_done_callback(lambda _: self._wake())
        self._cache[wanted] = future
        while len(self._cache) > self._size:
            self._cache.popitem(last=False)
        return future

    def close(self) -> None:
        """End the thread; what has not begun is dropped."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _compile(self, wanted: StructuredOutputs) -> CompiledGrammar:
        if self._tokenizer is None:
            self._tokenizer = self._read_tokenizer()
        try:
            limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
            inner = LLMatcher(self._tokenizer, _grammar(wanted), log_level=0, limits=limits)
            # The first mask is the slow one, and shows what the definition alone does not: that nothing matches.
            inner.compute_bitmask()
        except Exception as error:  # whatever the library makes of a client's text ends that request alone
            raise _refusal(wanted, str(error)) from error
        if inner.is_error():
            raise _refusal(wanted, inner.get_error())
        return CompiledGrammar(inner)

    def _read_tokenizer(self) -> LLTokenizer:
        try:
            text = self._tokenizer_file.read_text(encoding="utf-8")
            try:
                return LLTokenizer(text, n_vocab=self._vocab, eos_token=self._eos_ids)
            except ValueError:
                fitting = _without_tokens_from(self._vocab, text)
                if fitting is None:
                    raise
                return LLTokenizer(fitting, n_vocab=self._vocab, eos_token=self._eos_ids)
        except (OSError, ValueError) as error:
            raise RequestError(FIELD, f"not served with this model: its tokenizer cannot be used ({error}).") from None


def _without_tokens_from(vocab: int, text: str) -> str | None:
    """A `tokenizer.json` without its added tokens from `vocab` on, which the model was not made for; None: has none."""
    try:
        definition = json.loads(text)
        added = definition["added_tokens"]
        kept = [token for token in added if token["id"] < vocab]
        return json.dumps({**definition, "added_tokens": kept}) if len(kept) < len(added) else None
    except (LookupError, TypeError, ValueError, RecursionError):
        return None  # no tokenizer at all, of which the library says more


def _grammar(wanted: StructuredOutputs) -> str:
    """The library's own form of a definition. Raises ValueError or RecursionError."""
    if wanted.kind == "json":
        options = {"whitespace_pattern": wanted.whitespace} if wanted.whitespace else {"whitespace_flexible": False}
        return LLMatcher.grammar_from_json_schema(wanted.text, overrides=options)  # type: ignore[arg-type]
    if wanted.kind == "regex":
        return LLMatcher.grammar_from_regex(wanted.text)
    if wanted.kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(c) for c in json.loads(wanted.text)))
    return grammar_from("grammar", wanted.text)


def _refusal(wanted: StructuredOutputs, reason: str) -> RequestError:
    return RequestError(FIELD, f"the {wanted.kind} is refused by the grammar library: {complaint(reason)}.")
