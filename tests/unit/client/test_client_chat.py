from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client_fakes import FakeTriton
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from typer.testing import CliRunner

from morph_client.chat import Conversation, PromptFormat, RawText, Turn, context_named_in
from morph_client.chat_template import ChatTemplate
from morph_client.cli import build_app
from morph_client.errors import BadInput, InvalidRequest

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' and m.content == 'refuse me' %}{{ raise_exception('no system role') }}{% endif %}"
    "<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
Chat = Callable[..., Any]


class Words(RawText):
    """Raw text whose tokens are its words."""

    def count(self, prompt: str) -> int:
        return len(prompt.split())


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Runs ``morph chat ARGS`` on the given lines."""
    for name in ("MORPH_URL", "MORPH_MODEL", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda lines, *args: CliRunner().invoke(build_app(), ["chat", *map(str, args)], input="\n".join(lines))


def model_folder(tmp_path: Path, template: str | None = TEMPLATE, context: int = 64, adds_bos: bool = False) -> Path:
    """A folder whose tokenizer makes one token of each word, and puts a BOS in front if ``adds_bos``."""
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "<s>": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>"])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "unk_token": "[UNK]"}
    if template is not None:
        config["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": context, "model_type": "llama"}))
    return tmp_path


def inputs(message: Any) -> dict[str, str]:
    return {t.name: raw[4:].decode() for t, raw in zip(message.inputs, message.raw_input_contents, strict=True)
            if t.datatype == "BYTES"}  # fmt: skip


def prompts(triton: FakeTriton) -> list[str]:
    return [inputs(message)["text_input"] for message in triton.service.requests]


def test_each_question_is_sent_with_the_conversation_in_the_models_template(
    chat: Chat, triton: FakeTriton, tmp_path: Path
) -> None:
    result = chat(["one", "", "two"], "--url", triton.url, "--model", model_folder(tmp_path), "--max-tokens", 2,
                  "--system", "be brief")  # fmt: skip
    assert result.exit_code == 0 and result.stdout == "w0 w1 \nw0 w1 \n" and result.stderr == ""
    first = "<s><system> be brief <user> one "
    assert prompts(triton) == [
        first + "<assistant>",
        first + "<assistant> w0 w1  <user> two <assistant>",
    ]


def test_the_model_folder_may_come_from_the_environment(
    chat: Chat, triton: FakeTriton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MORPH_MODEL", str(model_folder(tmp_path)))
    assert chat(["one"], "--url", triton.url, "--max-tokens", 1).stdout == "w0 \n"


def test_the_sampling_options_are_sent(chat: Chat, triton: FakeTriton) -> None:
    chat(["x"], "--raw", "--url", triton.url, "--max-tokens", 1, "--temperature", 0.5, "--top-p", 0.9, "--seed", 7)
    assert json.loads(inputs(triton.service.requests[0])["sampling_parameters"]) == {
        "max_tokens": 1, "temperature": 0.5, "top_p": 0.9, "seed": 7,
    }  # fmt: skip


def test_raw_text_is_continued_and_an_empty_line_goes_on(chat: Chat, triton: FakeTriton) -> None:
    result = chat(["It was", "", "then"], "--raw", "--url", triton.url, "--max-tokens", 1, "--system", "Title.")
    assert result.exit_code == 0, result.stderr
    assert prompts(triton) == ["Title. It was", "Title. It wasw0 ", "Title. It wasw0 w0 then"]


def test_without_history_each_question_stands_alone(chat: Chat, triton: FakeTriton) -> None:
    result = chat(["one", "two"], "--raw", "--no-history", "--url", triton.url, "--max-tokens", 1, "--system", "S")
    assert prompts(triton) == ["S one", "S two"] and result.stderr == ""


def test_commands_change_the_conversation(chat: Chat, triton: FakeTriton) -> None:
    lines = ["one", "/reset", "/system S", "two", "/system", "/reset", "//three", "/exit", "never"]
    result = chat(lines, "--raw", "--url", triton.url, "--max-tokens", 1)
    assert result.exit_code == 0 and prompts(triton) == ["one", "S two", "/three"]


def test_help_lists_the_commands(chat: Chat) -> None:
    text = chat(["/help"], "--raw").stderr
    for name in ("/reset", "/system", "/save", "/help", "/exit"):
        assert name in text


def test_save_writes_the_conversation_and_spares_other_files(chat: Chat, triton: FakeTriton, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    result = chat(["/system S", "one", f"/save {path}", "two", f"/save {path}"], "--raw", "--url", triton.url,
                  "--max-tokens", 1)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    messages = json.loads(path.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[4] == {"role": "assistant", "content": "w0 "}
    result = chat([f"/save {path}"], "--raw")
    assert result.exit_code == 2 and "exists already" in result.stderr and path.read_text().count("user") == 2


@pytest.mark.parametrize(
    ("line", "says"), [("/sing", "/help"), ("/save", "name of a file"), ("/save absent/x", "cannot write")]
)
def test_a_bad_command_is_one_sentence(chat: Chat, line: str, says: str) -> None:
    result = chat([line], "--raw")
    assert result.exit_code == 2 and says in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("question", "status"), [("refuse", 2), ("full", 1), ("dropped", 130), ("cut", 1)])
def test_in_a_pipe_an_error_ends_the_chat_with_its_status(
    chat: Chat, triton: FakeTriton, question: str, status: int
) -> None:
    result = chat([question, "more"], "--raw", "--url", triton.url)
    assert result.exit_code == status and len(result.stderr.splitlines()) == 1 and len(prompts(triton)) == 1


def test_the_oldest_turns_are_dropped_when_the_context_is_full(chat: Chat, triton: FakeTriton, tmp_path: Path) -> None:
    # A question is 3 tokens (its word, a role before and after), an answer of 2 words adds them: 8 + 2 do not hold two.
    result = chat(["one", "two"], "--url", triton.url, "--model", model_folder(tmp_path, context=9), "--max-tokens", 2)
    assert result.exit_code == 0, result.stderr
    assert prompts(triton)[1] == "<s><user> two <assistant>"
    note = "(the oldest turn is no longer sent: the context of 9 tokens is full)\n"
    assert result.stderr == note and result.output == f"w0 w1 \n{note}w0 w1 \n"


def test_what_the_server_says_of_its_context_is_heeded(chat: Chat, triton: FakeTriton) -> None:
    triton.service.context = 7
    lines = ["one", "two", "three", "a b c d e f"]
    result = chat(lines, "--raw", "--url", triton.url, "--max-tokens", 2, "--system", "S ")
    assert prompts(triton)[:4] == ["S one", "S onew0 w1 two", "S onew0 w1 twow0 w1 three", "S twow0 w1 three"]
    assert "the context of 7 tokens is full" in result.stderr
    assert result.exit_code == 2 and "exceed the context" in result.stderr.splitlines()[-1]


def test_dropped_turns_stay_on_record() -> None:
    conversation = Conversation("S")
    for word in ("a", "b", "c"):
        conversation.add(Turn(word, word.upper(), interrupted=word == "c"))
    conversation.forget(2)
    assert [turn.question for turn in conversation.sent] == ["c"] and len(conversation.messages()) == 7
    assert conversation.messages()[-1] == {"role": "assistant", "content": "C", "interrupted": True}
    conversation.reset()
    assert conversation.messages() == [{"role": "system", "content": "S"}] and conversation.forgotten == 0


@given(
    turns=st.lists(st.integers(1, 9), max_size=12), question=st.integers(1, 9), context=st.integers(1, 60),
    max_tokens=st.integers(1, 9),
)  # fmt: skip
def test_a_fitting_prompt_keeps_the_newest_turns_that_fit(
    turns: list[int], question: int, context: int, max_tokens: int
) -> None:
    conversation = Conversation()
    for length in turns:
        conversation.add(Turn("q " * length, "a "))
    form: PromptFormat = Words()
    prompt = conversation.fitting_prompt(form, "q " * question, context, max_tokens)
    kept = len(conversation.sent)
    assert conversation.sent == conversation.turns[len(turns) - kept :]
    assert len(prompt.split()) == sum(turns[len(turns) - kept :]) + kept + question
    assert kept == 0 or len(prompt.split()) + max_tokens <= context
    if kept < len(turns):  # one more would not have fitted
        assert len(prompt.split()) + turns[-kept - 1] + 1 + max_tokens > context


@pytest.mark.parametrize(
    ("words", "context"),
    [
        ("max_tokens: must be at most 3 for this prompt: its 5 tokens and max_tokens 9 exceed the context of 8 tokens.",
         8),
        ("text_input: the prompt has 90 tokens, but the model takes at most 63", 64),
        ("This model's maximum context length is 4096 tokens. However, you requested 5000 tokens", 4096),
        ("temperature must be at least 0", None),
    ],
)  # fmt: skip
def test_a_refusal_for_length_names_the_context(words: str, context: int | None) -> None:
    assert context_named_in(InvalidRequest(words)) == context


@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_model_sees_one_bos(tmp_path: Path, adds_bos: bool) -> None:
    form = ChatTemplate.from_folder(model_folder(tmp_path, adds_bos=adds_bos))
    prompt = form.prompt("", [], "hello")
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(prompt).ids
    assert ids.count(1) == 1 and ids[0] == 1 and form.count(prompt) == len(ids)


def test_a_template_that_refuses_is_one_sentence(tmp_path: Path) -> None:
    form = ChatTemplate.from_folder(model_folder(tmp_path))
    with pytest.raises(BadInput, match="chat template refuses this conversation: no system role"):
        form.prompt("refuse me", [], "x")


def test_a_model_without_a_template_is_one_sentence_that_names_raw(chat: Chat, tmp_path: Path) -> None:
    result = chat(["x"], "--model", model_folder(tmp_path, template=None))
    assert result.exit_code == 2 and "has no chat template" in result.stderr and "--raw" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_folder_that_cannot_be_used_is_one_sentence(chat: Chat, tmp_path: Path) -> None:
    for arguments, says in (
        ([], "MORPH_MODEL"),
        (["--model", "some/model-name"], "not a folder"),
        (["--model", tmp_path], "no tokenizer.json"),
    ):
        result = chat(["x"], *arguments)
        assert result.exit_code == 2 and says in result.stderr and len(result.stderr.splitlines()) == 1
    (tmp_path / "tokenizer.json").write_text("{")
    result = chat(["x"], "--model", tmp_path)
    assert result.exit_code == 2 and "cannot be loaded" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("library", ["transformers", "jinja2"])
def test_without_the_extra_the_remedy_is_named(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    folder = model_folder(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    result = chat(["x"], "--model", folder)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert f"need {library}" in result.stderr and "pip install 'morphserve[chat]'" in result.stderr


def test_raw_needs_no_optional_library(chat: Chat, triton: FakeTriton, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("transformers", "jinja2", "tokenizers"):
        assert importlib.util.find_spec(library)
        monkeypatch.setitem(sys.modules, library, None)
    assert chat(["x"], "--raw", "--url", triton.url, "--max-tokens", 1).stdout == "w0 \n"
