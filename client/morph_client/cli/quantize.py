"""``morph quantize``: an AWQ checkpoint of a model, for the W4 rung."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from morph_client.awq import environment
from morph_client.cli.common import stderr, stdout
from morph_client.errors import BadInput, MorphError

SERVED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def quantize(
    model: Annotated[Path, typer.Argument(help="Folder of the unquantized checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder for the AWQ checkpoint; must not exist or be empty.")],
    text: Annotated[Path, typer.Option(help="Calibration text, UTF-8: like what the model will be asked.")],
    samples: Annotated[int, typer.Option(min=1, max=4096, help="Pieces of the text to look at.")] = 128,
    length: Annotated[int, typer.Option(min=16, max=8192, help="Tokens of a piece.")] = 512,
    env: Annotated[
        Path | None, typer.Option(envvar="MORPH_AWQ_ENV", help="Where AutoAWQ's own Python environment is kept.")
    ] = None,
) -> None:
    """Make an AWQ checkpoint with AutoAWQ, in a Python environment of its own. Runs on CPU; nothing is downloaded
    but, the first time, that environment."""
    check_inputs(model, out, text)
    environment.check_interpreter()
    folder = (env or environment.default_folder()).expanduser().absolute()
    python = environment.ensure(folder, lambda words: stderr().print(words))
    arguments = [str(path.absolute()) for path in (model, out, text)]
    status = environment.run_worker(python, [*arguments, "--samples", str(samples), "--length", str(length)])
    if status == 2:
        raise BadInput("the model was not quantized, for the reason above.")
    if status != 0:
        raise MorphError(f"AutoAWQ failed (exit status {status}); its last words stand above.")
    stdout().print(f"{out}: serve it with MORPH_MODEL={model} MORPH_AWQ={out}", soft_wrap=True)


def check_inputs(model: Path, out: Path, text: Path) -> None:
    """Refuse what cannot work before anything is installed or read at length.

    Raises:
        BadInput: names the argument and what it needs.
    """
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"'{model}' must be the folder of a Hugging Face checkpoint: config.json: {error}.") from None
    names = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(names, list) or not names or names[0] not in SERVED:
        raise BadInput(f"'{model}' has the architecture {names}, but served are: {', '.join(SERVED)}.")
    if config.get("quantization_config") is not None:
        raise BadInput(f"'{model}' is quantized already: give the unquantized checkpoint.")
    if not (model / "tokenizer.json").is_file():
        raise BadInput(f"'{model}' has no tokenizer.json, which calibration needs.")
    if not text.is_file():
        raise BadInput(f"--text must name a file with calibration text, but '{text}' is none.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"--out '{out}' exists and is not an empty folder: give another one.")
