"""A model whose configs name no end takes the tokenizer's."""

from __future__ import annotations

import json
from pathlib import Path

from engine.conftest import EngineFactory, make_model, run_all, submit
from morph_runtime.engine.messages import StructuredOutputs
from tiny_model import tiny_tokenizer


def test_structured_outputs_end_at_the_tokenizers_end(engines: EngineFactory, tmp_path: Path) -> None:
    make_model(tmp_path, kv_heads=2, vocab=320)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenizer.id_to_token(0)}))
    engine = engines(tmp_path)
    submit(engine, 1, [5, 6, 7], 20, structured_outputs=StructuredOutputs("regex", "[a-f]{4}"), ignore_eos=False)
    tokens = run_all(engine)[1]
    assert tokens[-1] == 0 and len(tokenizer.decode(tokens[:-1])) == 4
