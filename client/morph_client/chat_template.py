"""The model's own chat template, by ``transformers``, which is loaded only here and works without torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from morph_client.chat import PromptFormat, Turn
from morph_client.errors import BadInput, MissingDependency

_REMEDY = "pip install 'morphserve[chat]'"
# Arguments of apply_chat_template that decide what it returns: variables of a template cannot have these names.
_NOT_VARIABLES = {
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length"),
    *("padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs"),
    *("tools", "truncation"),
}


class NoChatTemplate(BadInput):
    """The tokenizer has no chat template: the model was not made for chat."""


class ChatTemplate(PromptFormat):
    """Prompts by the template in a model folder's tokenizer files."""

    def __init__(self, tokenizer: Any, encoder: Any, context: int | None) -> None:
        """``tokenizer`` is of ``transformers``; ``encoder`` is the ``tokenizers.Tokenizer`` that the server uses."""
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._context = context
        bos = tokenizer.bos_token
        # Whether the server puts a BOS in front of a text that begins with one: two of them harm the answer.
        doubled = bool(bos) and encoder.encode(bos).ids[:2] == [encoder.token_to_id(bos)] * 2
        self._bos_to_drop = str(bos) if doubled else ""

    @staticmethod
    def from_folder(folder: Path, template: str | None = None) -> ChatTemplate:
        """Reads a model folder; nothing is downloaded and no code of the model's is run.

        ``template`` is the text of a Jinja template to use instead of the folder's own.

        Raises:
            MissingDependency: transformers or Jinja is not installed.
            BadInput: the folder has no usable tokenizer; as :class:`NoChatTemplate`, the tokenizer has no template.
        """
        if not folder.is_dir():
            raise BadInput(f"--model must name the model's folder, and {folder} is not a folder")
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise BadInput(f"{folder} has no tokenizer.json: --model must name a Hugging Face model folder")
        auto_tokenizer, encoder_type = _libraries()
        try:
            tokenizer = auto_tokenizer.from_pretrained(str(folder), local_files_only=True)
            encoder = encoder_type.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the libraries raise whatever a damaged file leads to
            raise BadInput(f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}") from None
        if template is not None:
            tokenizer.chat_template = template
        if not tokenizer.chat_template:
            raise NoChatTemplate(
                f"the tokenizer in {folder} has no chat template, so this model was not made for chat: "
                "--raw lets it continue plain text instead"
            )
        encoder.no_truncation()
        encoder.no_padding()
        return ChatTemplate(tokenizer, encoder, _context(folder / "config.json"))

    @property
    def context(self) -> int | None:
        """``max_position_embeddings`` of the folder's config.json. The server's own limit may be lower."""
        return self._context

    @property
    def takes_empty(self) -> bool:
        """No: templates expect words."""
        return False

    def prompt(self, system: str, turns: Sequence[Turn], question: str) -> str:
        """The rendered template, up to where the answer begins."""
        messages = [{"role": "system", "content": system}] if system else []
        for turn in turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        messages.append({"role": "user", "content": question})
        return self.render(messages)

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        """The prompt for any conversation of roles and contents, with further ``variables`` for the template.

        Raises:
            MissingDependency: Jinja is not installed.
            BadInput: the template refuses the conversation, or a variable's name cannot be used.
        """
        variables = variables or {}
        if taken := sorted(_NOT_VARIABLES & variables.keys()):
            raise BadInput(f"'{taken[0]}' cannot be a variable of the chat template: leave it out")
        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True, **variables
                )
            )
        except ImportError as error:
            raise MissingDependency(f"the chat template needs {_first_line(error)}: {_REMEDY}") from None
        except Exception as error:  # noqa: BLE001 - templates are programs, and raise what they like
            raise BadInput(f"the model's chat template refuses this conversation: {_first_line(error)}") from None
        return text.removeprefix(self._bos_to_drop)

    def count(self, prompt: str) -> int:
        """By the same file and the same call as the server."""
        return len(self._encoder.encode(prompt).ids)


def _libraries() -> tuple[Any, Any]:
    """``AutoTokenizer`` and ``tokenizers.Tokenizer``."""
    # Without torch, transformers says so at import: true, and no concern of a client. Its import sets the level anew.
    logger = logging.getLogger("transformers")
    logger.disabled = True
    try:
        import jinja2  # noqa: F401 - transformers needs it later and would only say so then
        from tokenizers import Tokenizer
        from transformers import AutoTokenizer
    except ImportError as error:
        missing = (error.name or "transformers").partition(".")[0]
        raise MissingDependency(f"chat templates need {missing}, which is not installed: {_REMEDY}") from None
    finally:
        logger.disabled = False
    return AutoTokenizer, Tokenizer


def _context(path: Path) -> int | None:
    """The context in tokens that a config.json names; ``None`` if there is none to be read."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # the server will say its limit when it is passed
    found = config.get("max_position_embeddings") if isinstance(config, dict) else None
    return found if isinstance(found, int) and found > 0 else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
