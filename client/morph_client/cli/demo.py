"""``morph demo``: the same burst twice, without morphing and with it, and a picture of the difference."""

from __future__ import annotations

import asyncio
import os
import sys
import webbrowser
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from morph_client.cli.common import command_line, orderly_termination, stdout
from morph_client.cli.demo_view import LoadView
from morph_client.demo_load import HIGH_SHARE, DemoLoad, quick_load
from morph_client.demo_run import Watch, introduce, measure, serving_capacity
from morph_client.errors import MissingDependency
from morph_client.report import decisions, files, html, plot, table
from morph_client.report.data import Run, run_to_json, spans_to_json
from morph_client.server_process import EmbeddedServer, require_launcher

_TITLE = "A burst, with and without morphing"


def demo(
    ctx: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="A shorter load; the figures are rougher.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("demo-report"),
    seconds: Annotated[float | None, typer.Option(help="Length of each of the two loads.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed for the load.")] = None,
    show: Annotated[bool | None, typer.Option("--show/--no-show", help="Open the report at the end.")] = None,
    start_timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for each server start.")] = 180.0,
) -> None:
    """Start a server, press it with a burst, and show what morphing does."""
    require_launcher()
    load = quick_load() if quick else DemoLoad()
    load = load if seconds is None else load.lasting(seconds)
    load = load if seed is None else replace(load, seed=seed)
    console = stdout()
    drawable = _can_draw(console)
    files.make_folder(out)
    _introduce(console, load)
    with orderly_termination():
        load, off = _one_run(console, load, out, "off", "full precision only", "1 of 2", start_timeout, True)
        load, on = _one_run(console, load, out, "balanced", "morphing", "2 of 2", start_timeout, False)
    said = table.verdict(off, on)
    written = _write(load, off, on, said, out, drawable, command_line(ctx))
    _conclude(console, off, on, said, written)
    page = out / "report.html"
    if show or (show is None and _has_desktop(console)):
        webbrowser.open(page.resolve().as_uri())


def _introduce(console: Console, load: DemoLoad) -> None:
    console.print(f"\n[bold]{_TITLE}[/bold]")
    console.print(
        f"The same load runs twice, {load.seconds:.0f} seconds each: quiet, a burst, quiet again. First the model "
        "keeps its full precision throughout; then its layers may be swapped to fewer bits while the burst "
        "lasts, and the memory that this frees becomes KV cache.\n"
    )


def _one_run(
    console: Console, load: DemoLoad, out: Path, mode: str, label: str, place: str, start_timeout: float, first: bool
) -> tuple[DemoLoad, Run]:
    """One server, one load. The first run also fits the load to this machine; both use what came of it."""
    console.print(f"[bold]Run {place}: {label}[/bold]  [dim](mode {mode})[/dim]")
    environment = load.server_environment(os.environ)
    with EmbeddedServer(mode, out / f"server-{mode}.log", environment=environment) as server:
        with console.status("starting Triton and loading the model"):
            took = server.wait_ready(start_timeout)
        console.print(f"[dim]ready after {took:.1f} s[/dim]")
        asyncio.run(introduce(server, _sample_printer(console) if first else _ignore))
        if first:
            with console.status("measuring how much this machine serves at full precision"):
                capacity = asyncio.run(serving_capacity(server, load))
            load = load.for_machine(capacity)
            console.print(
                f"[dim]full precision serves {capacity:.1f} such requests per second here; the load: "
                f"{load.low_rate_per_s:g} per second, in the burst {load.high_rate_per_s:g}[/dim]"
            )
        with LoadView(console) as view:
            run = asyncio.run(measure(server, load, label, Watch(load), on_load=view.show))
        with console.status("stopping the server"):
            server.stop()
    s = run.summary
    console.print(
        f"{s.requests - s.errors} of {s.requests} answers complete · TTFT p95 {table.seconds(s.ttft_s.p95)} · "
        f"{s.output_tokens_per_s:.0f} tokens/s\n"
    )
    return load, run


def _write(load: DemoLoad, off: Run, on: Run, said: str, out: Path, drawable: bool, command: str) -> list[Path]:
    runs = [off, on]
    figures, page = out / "report.json", out / "report.html"
    files.write_json(
        figures,
        {
            "verdict": said,
            "load": asdict(load),
            "phases": spans_to_json(load.spans),
            "runs": [run_to_json(r) for r in runs],
        },
    )
    written: list[Path] = [figures, page]
    svgs: list[tuple[str, str]] = []
    if drawable:
        picture = plot.Picture(_TITLE, said, runs, load.spans)
        plot.write_png(picture, out / "report.png")
        # The page says title and verdict itself.
        svgs.append(plot.themed_svgs(replace(picture, title="", subtitle="")))
        written.insert(0, out / "report.png")
    notes = [
        f"Load: {load.seconds:.0f} s in open loop with Poisson arrivals (seed {load.seed}), {load.low_rate_per_s:g} "
        f"per second and {load.high_rate_per_s:g} in the burst ({HIGH_SHARE:g} times what full precision serves here), "
        f"prompts of {load.prompt_tokens[0]} to {load.prompt_tokens[1]} tokens, outputs of {load.output_tokens[0]} "
        f"to {load.output_tokens[1]}. The client shares the machine with the server.",
        "TTFT: from the moment a request was due to its first token. TPOT: mean time per output token after the first. "
        "Level: number of quantized layers. Tokens at full precision: computed at level 0.",
    ]
    heads, rows = [run.label for run in runs], table.comparison_rows(runs)
    logs = [decisions.section(on)]
    files.write_text(page, html.render(html.Page(_TITLE, said, heads, rows, svgs, logs, command, notes)))
    return written


def _conclude(console: Console, off: Run, on: Run, said: str, written: list[Path]) -> None:
    console.print(table.render(table.comparison_rows([off, on]), [off, on]))
    console.print(f"\n[bold]{said}[/bold]\n")
    for run in (off, on):
        for sentence, count in list(run.summary.error_kinds.items())[:2]:
            console.print(f"{run.label}: {count} × {sentence}", style="yellow", markup=False)
    names = {".png": "picture", ".html": "page", ".json": "figures"}
    for path in written:
        console.print(f"{names[path.suffix]:<8} {path}", soft_wrap=True, markup=False)


def _can_draw(console: Console) -> bool:
    try:
        plot.require_matplotlib()
    except MissingDependency as error:
        console.print(f"No picture at the end: {error}", style="yellow", markup=False)
        return False
    return True


def _has_desktop(console: Console) -> bool:
    # Without one, webbrowser may start a text browser in this terminal.
    screen = sys.platform == "darwin" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    return console.is_terminal and screen and "SSH_CONNECTION" not in os.environ


def _sample_printer(console: Console) -> Callable[[str], None]:
    """Prints a text as it comes: first the prompt, dimmed, then the answer."""
    begun = False

    def say(text: str) -> None:
        nonlocal begun
        console.print(text, style=None if begun else "dim", end="", markup=False, soft_wrap=True)
        begun = True

    return say


def _ignore(_text: str) -> None:
    """The second run's sample answer only warms the server up, so that both runs begin alike."""
