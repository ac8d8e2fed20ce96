"""``morph traces``: the public traces, and how to get them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from morph_client.cli.common import OneSentenceGroup, stdout
from morph_client.errors import BadInput
from morph_client.trace_store import CATALOGUE, by_name, cache_folder, cached_file, download

traces = typer.Typer(
    cls=OneSentenceGroup,
    no_args_is_help=True,
    help="Public request traces: list them, and download them for morph replay and morph compare.",
)


@traces.command("list")
def list_() -> None:
    """What there is, and what is downloaded."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    table.add_column("MB", justify="right")
    table.add_column("here")
    table.add_column("licence", no_wrap=True)
    table.add_column("what it is")
    for trace in CATALOGUE:
        here = "yes" if cached_file(trace).is_file() else ""
        table.add_row(trace.name, f"{trace.size / 1e6:.1f}", here, trace.licence, trace.about)
    console = stdout()
    console.print(table)
    console.print(f"\nDownloaded traces are in {cache_folder()}.", style="dim", soft_wrap=True, markup=False)


@traces.command("get")
def get(
    names: Annotated[list[str], typer.Argument(help="Names from 'morph traces list', or 'all'.")],
    mirror: Annotated[str, typer.Option(help="A web folder with the files and a LICENSE, instead of GitHub.")] = "",
) -> None:
    """Download traces with their licences, and check them."""
    wanted = [trace.name for trace in CATALOGUE] if names == ["all"] else names
    known = ", ".join(trace.name for trace in CATALOGUE)
    found = [by_name(name) for name in wanted]
    for name, trace in zip(wanted, found, strict=True):
        if trace is None:
            raise BadInput(f"there is no trace called '{name}': known are {known}")
    console = stdout()
    for trace in filter(None, found):
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(trace.name, total=trace.size)
            path = download(trace, mirror, lambda count, task=task: bar.update(task, advance=count))  # type: ignore[misc]
        console.print(f"{trace.name}: {path}", soft_wrap=True, markup=False)
        console.print(f"  {trace.licence}. Cite: {trace.cite}", style="dim", soft_wrap=True, markup=False)
