"""Triton's model configuration, completed from the one that is packaged: the tensors are written down once."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2


def complete(config: Any) -> Any:
    """Add what is missing to Triton's `ModelConfig` object and return it.

    `max_batch_size` is 0 and the model decoupled, whatever the server's defaults are. The queue's limits cannot be
    completed: without `dynamic_batching` in the file the queue has no limit, no priorities and no time-outs.
    """
    packaged = packaged_config()
    given = config.as_dict()
    inputs = {item["name"] for item in given["input"]}
    outputs = {item["name"] for item in given["output"]}
    for item in packaged.input:
        if item.name not in inputs:
            config.add_input({**_tensor(item), "optional": item.optional})
    for item in packaged.output:
        if item.name not in outputs:
            config.add_output(_tensor(item))
    config.set_max_batch_size(packaged.max_batch_size)
    config.set_model_transaction_policy({"decoupled": packaged.model_transaction_policy.decoupled})
    if "dynamic_batching" not in given:
        config.set_dynamic_batching()
    return config


def packaged_config() -> Any:
    """The packaged `config.pbtxt` as a message."""
    text = (importlib.resources.files("morph_backend") / "repository" / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def names_tensors(config_pbtxt: Path) -> bool:
    """Whether a configuration says which tensors the model has."""
    return re.search(r"^\s*input\s*[:\[{]", config_pbtxt.read_text(encoding="utf-8"), re.M) is not None


def _tensor(item: Any) -> dict[str, Any]:
    return {
        "name": item.name,
        "data_type": model_config_pb2.DataType.Name(item.data_type),
        "dims": list(item.dims),
    }
