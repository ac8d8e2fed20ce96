"""Quantizes one model with AutoAWQ. A script: it runs in the environment that `environment` makes, never here.

AutoAWQ 0.2.9 does not import beside the transformers that the server needs, so nothing of this
package is imported, and this file is the only one that knows of AutoAWQ.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

GROUP = 128
BITS = 4
COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
"""Files that go with the weights unchanged; generation_config.json is written by AutoAWQ."""


def main() -> int:
    """Quantize; 0, or 2 after one sentence on standard error about what cannot be used."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--samples", type=int, required=True, help="pieces of calibration text")
    parser.add_argument("--length", type=int, required=True, help="tokens of each piece")
    options = parser.parse_args()
    try:
        pieces = calibration_pieces(options.model, options.text, options.samples, options.length)
        with tempfile.TemporaryDirectory(prefix="morph-awq-") as folder:
            quantize(older_checkpoint(options.model, Path(folder)), options.out, pieces, options.length)
    except ValueError as error:
        print(f"{error}", file=sys.stderr)
        return 2
    for name in COPIED:
        if (options.model / name).is_file():
            shutil.copyfile(options.model / name, options.out / name)
    return 0


def calibration_pieces(model: Path, text: Path, samples: int, length: int) -> list[list[int]]:
    """Up to `samples` pieces of exactly `length` tokens, spread evenly over the text.

    Raises:
        ValueError: the text has fewer tokens than one piece.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokens = tokenizer.encode(text.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False).ids
    count = len(tokens) // length
    if count == 0:
        raise ValueError(f"'{text}' has {len(tokens)} tokens, fewer than one piece of {length}: give a longer text.")
    taken = min(samples, count)
    starts = [count * i // taken * length for i in range(taken)]
    return [tokens[start : start + length] for start in starts]


def older_checkpoint(model: Path, folder: Path) -> Path:
    """The model as transformers 4 reads it: links to its files, and a config.json in the older spelling."""
    for file in model.iterdir():
        if file.is_file() and file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(older_config(config)), encoding="utf-8")
    return folder


def older_config(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters` and `dtype`; 4 knows `rope_theta`, `rope_scaling`, `torch_dtype`."""
    values = dict(config)
    rope = values.pop("rope_parameters", None)
    if rope:
        rope = dict(rope)
        values["rope_theta"] = rope.pop("rope_theta", values.get("rope_theta", 10000.0))
        values["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    if "dtype" in values:
        values["torch_dtype"] = values.pop("dtype")
    return values


def quantize(model: Path, out: Path, pieces: list[list[int]], length: int) -> None:
    """Run AutoAWQ's search over the pieces and save the checkpoint in its GEMM layout."""
    stub = types.ModuleType("datasets")  # AutoAWQ imports it for downloads, which are not used here
    stub.__spec__ = ModuleSpec("datasets", None)
    stub.load_dataset = None  # type: ignore[attr-defined]
    sys.modules.setdefault("datasets", stub)
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer

    class CpuQuantizer(AwqQuantizer):  # type: ignore[misc]
        """AutoAWQ keeps the weights to go back to after each try with `.cpu()`, which on CPU copies nothing: the
        first try would stay in the model (the demo model: perplexity 24.7 in place of 22.0; full precision 21.4)."""

        def _compute_best_scale(self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, *more: Any) -> Any:
            original = module2inspect.state_dict
            module2inspect.state_dict = lambda: {name: value.clone() for name, value in original().items()}
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *more)
            finally:
                del module2inspect.state_dict

    wrapped = AutoAWQForCausalLM.from_pretrained(str(model), device_map="cpu", trust_remote_code=False)
    settings = {"zero_point": True, "q_group_size": GROUP, "w_bit": BITS, "version": "GEMM"}
    wrapped.quantize(
        None,
        quant_config=settings,
        calib_data=pieces,
        max_calib_samples=len(pieces),
        max_calib_seq_len=length,
        quantizer_cls=CpuQuantizer,
    )
    out.mkdir(parents=True, exist_ok=True)
    wrapped.save_quantized(str(out))


if __name__ == "__main__":
    sys.exit(main())
