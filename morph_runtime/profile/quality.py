"""What a mix of rungs costs: perplexity, divergence from full precision, agreement of the likeliest token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from morph_runtime.profile.forward import LayeredForward, Walk
from morph_runtime.profile.text import Windows
from morph_runtime.profile.weights import LayerStore, Mix, full_mix


@dataclass
class Tally:
    """The sums of one mix."""

    losses: list[float] = field(default_factory=list)
    """Mean negative log-likelihood of a predicted token, nats, by window."""
    divergences: list[float] = field(default_factory=list)
    """Mean KL divergence of a prediction from that of full precision, nats, by window."""
    agreed: int = 0
    """Predictions whose likeliest token is that of full precision."""
    predicted: int = 0


@dataclass(frozen=True)
class Figures:
    """What a mix costs against full precision, over all windows. Errors are standard errors of the mean by window."""

    perplexity: float
    loss: float
    """Nats per token."""
    loss_change: float
    """Against full precision, nats per token."""
    loss_change_error: float
    kl: float
    """Of full precision's distribution from this one's, KL(full || mix), nats per token."""
    kl_error: float
    top1: float
    """Share of predictions whose likeliest token is that of full precision."""


def measure(
    forward: LayeredForward,
    store: LayerStore,
    windows: Windows,
    mixes: Iterable[Mix],
    say: Callable[[str], None] = lambda words: None,
) -> Mapping[Mix, Figures]:
    """Run every window under every mix, and under full precision.

    All predictions of a window are compared with those of the same window at full precision, over the whole vocabulary.

    Args:
        forward: for windows of this length.
        store: has every form that the mixes name.
        windows: the text.
        mixes: each the form of every layer.
        say: told about progress.

    Returns:
        By mix, full precision included.
    """
    full = full_mix(store.models["full"].spec.layers)
    # Neighbours in this order share as many leading layers as can be, and those are run once.
    others = sorted(set(mixes) - {full})
    tallies = {mix: Tally() for mix in (full, *others)}
    first = windows.first
    with torch.inference_mode():
        for number, tokens in enumerate(windows.tokens, 1):
            say(f"window {number} of {len(windows.tokens)}, {len(tallies)} mixes")
            walk = Walk(forward, store, tokens)
            # A prediction stands one place before the token that it predicts.
            reference = walk.run(full)[first - 1 : -1].log_softmax(-1)  # [predictions, vocab]
            targets = torch.tensor(tokens[first:], device=reference.device)
            weights, best = reference.exp(), reference.argmax(-1)
            for mix, tally in tallies.items():
                found = reference if mix == full else walk.run(mix)[first - 1 : -1].log_softmax(-1)
                tally.losses.append(float(F.nll_loss(found, targets)))
                divergence = (weights * (reference - found)).sum(-1, dtype=torch.float64)
                tally.divergences.append(float(divergence.mean()))
                tally.agreed += int((found.argmax(-1) == best).sum())
                tally.predicted += len(targets)
    return {mix: _figures(tally, tallies[full]) for mix, tally in tallies.items()}


def _figures(tally: Tally, full: Tally) -> Figures:
    loss = _mean(tally.losses)
    changes = [a - b for a, b in zip(tally.losses, full.losses, strict=True)]
    return Figures(
        perplexity=math.exp(loss),
        loss=loss,
        loss_change=_mean(changes),
        loss_change_error=_error(changes),
        kl=max(0.0, _mean(tally.divergences)),  # rounding may take it a hair below
        kl_error=_error(tally.divergences),
        top1=tally.agreed / tally.predicted,
    )


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _error(values: list[float]) -> float:
    """Standard error of the mean; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    middle = _mean(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1) / len(values))
