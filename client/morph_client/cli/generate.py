"""``morph generate``: one prompt, its answer on standard output."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from morph_client.cli.common import UrlOption, stderr, stdout
from morph_client.errors import BadInput
from morph_client.report.table import percent, seconds
from morph_client.sync_client import MorphClient
from morph_client.types import Completion, CompletionBuilder, SamplingParams


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; the server's default is 1.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Probability mass to sample from.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Candidates to sample from; 0 is all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    n: Annotated[int | None, typer.Option("-n", help="Outputs to generate; several are printed when whole.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string to stop at; may be repeated.")] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print tokens as they come.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with times and levels.")] = False,
    url: UrlOption = "",
) -> None:
    """Generate text from a prompt."""
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        n=n,
        stop=stop or None,
    )
    text = _read_stdin() if prompt == "-" else prompt
    with MorphClient(url) as client:
        if as_json:
            print(json.dumps(asdict(client.generate(text, sampling=sampling, stream=stream)), indent=1))
            return
        if n is not None and n > 1:  # they grow side by side, so they are printed when they are whole
            answer = client.generate(text, sampling=sampling, stream=stream)
            _print_outputs(answer)
        else:
            answer = _print_stream(client, text, sampling, stream)
    if sys.stderr.isatty():
        stderr().print(_footer(answer), style="dim")


def _print_stream(client: MorphClient, text: str, sampling: SamplingParams, stream: bool) -> Completion:
    console = stdout()
    if console.is_terminal:
        console.print(text, style="dim", end="", markup=False, soft_wrap=True)
    builder = CompletionBuilder()
    printed = console.is_terminal
    try:
        with client.stream(text, sampling=sampling, stream=stream) as chunks:
            for chunk in chunks:
                builder.add(chunk)
                console.file.write(chunk.text)
                console.file.flush()
                printed = True
    finally:
        # Also after an error or Ctrl-C: what follows must not stand in the same line as the text.
        if printed:
            console.file.write("\n")
    return builder.build()


def _print_outputs(answer: Completion) -> None:
    file = stdout().file
    for number, output in enumerate(answer.outputs, 1):
        file.write(f"--- {number} of {len(answer.outputs)} ({output.finish_reason})\n{output.text}\n")


def _footer(answer: Completion) -> str:
    tokens = sum(output.num_output_tokens for output in answer.outputs)
    parts = [f"{tokens} tokens", f"the first after {seconds(answer.ttft_s)}"]
    if answer.e2e_s > answer.ttft_s:
        parts.append(f"{(tokens - 1) / (answer.e2e_s - answer.ttft_s):.0f} tokens/s")
    if answer.num_cached_tokens:
        parts.append(f"{answer.num_cached_tokens} of {answer.num_input_tokens} prompt tokens cached")
    levels = tuple(level for output in answer.outputs for level in output.levels)
    if levels:
        parts.append(f"level {_levels(levels)}")
    if answer.rung_share is not None and not answer.more:
        parts.append(f"{percent(answer.rung_share.full)} at full precision")
    if any(output.finish_reason == "length" for output in answer.outputs):
        parts.append("stopped at --max-tokens")
    return " · ".join(parts)


def _levels(levels: tuple[int, ...]) -> str:
    low, high = min(levels), max(levels)
    return str(low) if low == high else f"{low} to {high}"


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise BadInput("standard input is not UTF-8 text") from None
