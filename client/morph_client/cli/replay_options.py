"""The options that ``morph replay`` and ``morph compare`` share: which requests, with which prompts, when."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TraceArgument = Annotated[
    str,
    typer.Argument(
        help="A CSV file (ours, Azure 2023 or BurstGPT, told by its columns) or the name of a trace that "
        "'morph traces get' has downloaded."
    ),
]
SpeedOption = Annotated[float, typer.Option(help="Divide all times by this.")]
ThinOption = Annotated[float, typer.Option(help="Keep one request in this many, drawn at random.")]
KeepEveryOption = Annotated[int, typer.Option(help="Keep the first request and every n-th after it.")]
SeedOption = Annotated[int, typer.Option(help="For the thinning, the prompts and the sampling.")]
OffsetOption = Annotated[float, typer.Option(help="Start this many seconds into the trace.")]
WindowOption = Annotated[float | None, typer.Option(help="Replay this many seconds of the trace.")]
MaxPromptOption = Annotated[int | None, typer.Option("--max-prompt-tokens", help="Cut longer prompts.")]
MaxOutputOption = Annotated[int | None, typer.Option("--max-output-tokens", help="Cut longer outputs.")]
FixedPromptOption = Annotated[int | None, typer.Option("--fixed-prompt", help="Tokens of every prompt.")]
FixedOutputOption = Annotated[int | None, typer.Option("--fixed-output", help="Tokens of every output.")]
SkipEmptyOption = Annotated[bool, typer.Option("--skip-empty", help="Drop rows of 0 tokens (failed requests).")]
TextOption = Annotated[
    Path | None, typer.Option(help="Cut prompts from this text, or QMSum's .jsonl; plain, .xz or .gz.")
]
TokensPerWordOption = Annotated[float | None, typer.Option(help="Default: measured with a few requests.")]
SharedPrefixOption = Annotated[int, typer.Option(help="Begin each prompt with this many common tokens.")]
PrefixesOption = Annotated[int, typer.Option(help="How many different common beginnings there are.")]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy; above it, tokens are drawn, seeded.")]
TpotSloOption = Annotated[float | None, typer.Option(help="Target for the time per output token, in seconds.")]
DeadlineOption = Annotated[float, typer.Option(min=0.1, help="Give up a request after this many seconds.")]
ConnectionsOption = Annotated[int, typer.Option(min=1, help="Connections to spread the requests over.")]
