"""Text in, token windows out: reading, cleaning, tokenizer training, packing and sampling."""

from __future__ import annotations

import gzip
import lzma
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"
"""Document separator in the text files, and the tokenizer's only special token (bos, eos and pad)."""

WRAPPED_SHARE = 0.15
"""A document is hard-wrapped when more than this share of its line starts are lower-case letters."""

_INVISIBLE = re.compile("[\u200b\u2060\ufeff\x80-\x9f]")
_SENTENCE_END = re.compile(r"[.!?:;][\"'”’)\]]*$")


def read_text(path: Path) -> str:
    """Return the whole UTF-8 text of ``path``; ``.xz`` and ``.gz`` files are unpacked on the fly.

    Raises:
        FileNotFoundError: when there is no such file.
        UnicodeDecodeError: when the file is not UTF-8.
    """
    if path.suffix == ".xz":
        data = lzma.decompress(path.read_bytes())
    elif path.suffix == ".gz":
        data = gzip.decompress(path.read_bytes())
    else:
        data = path.read_bytes()
    return data.decode("utf-8").replace("\r\n", "\n")


def unwrap(document: str) -> str:
    """Undo hard line wraps, so that one line is one paragraph.

    Only documents that look wrapped (see :data:`WRAPPED_SHARE`) are changed: there a line is joined to the one
    before it, unless the earlier line ends a sentence and the later one begins with no lower-case letter.
    """
    lines = [line.strip() for line in document.split("\n")]
    filled = [line for line in lines if line]
    if not filled or sum(line[0].islower() for line in filled) <= WRAPPED_SHARE * len(filled):
        return document
    paragraphs: list[str] = []
    open_paragraph = False
    for line in lines:
        if not line:
            open_paragraph = False
            continue
        if open_paragraph and (line[0].islower() or not _SENTENCE_END.search(paragraphs[-1])):
            paragraphs[-1] += " " + line
        else:
            paragraphs.append(line)
        open_paragraph = not line.isupper()
    return "\n".join(paragraphs)


def read_documents(paths: Iterable[Path]) -> list[str]:
    """Read files and return their cleaned, non-empty documents, each ending in one newline."""
    documents: list[str] = []
    for path in paths:
        for raw in read_text(path).split(END_OF_TEXT):
            document = unwrap(_INVISIBLE.sub("", raw).strip())
            if document:
                documents.append(document + "\n")
    if not documents:
        raise ValueError("no text found in the input files")
    return documents


def _lines(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        yield from document.splitlines(keepends=True)


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of exactly ``vocab_size`` entries; no input is ever unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(documents), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the text yields only {tokenizer.get_vocab_size()} vocabulary entries, not {vocab_size}")
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """Encode documents, each followed by the end-of-text token, into one int32 tensor ``[tokens]``."""
    end = np.asarray([tokenizer.token_to_id(END_OF_TEXT)], dtype=np.int32)
    parts: list[np.ndarray] = []
    for document in documents:
        encodings = tokenizer.encode_batch_fast(list(_lines([document])), add_special_tokens=False)
        parts.extend(np.asarray(e.ids, dtype=np.int32) for e in encodings)
        parts.append(end)
    return torch.from_numpy(np.concatenate(parts))


class WindowSampler:
    """Draws training windows from one packed token stream, epoch by epoch, without replacement.

    Each epoch cuts the stream at a fresh random offset, so a token is seen at other positions every time. A share
    ``bos_share`` of the windows is moved on to the next paragraph start and gets the end-of-text token as its first
    input, so that the token also works as a begin-of-text mark. In a share ``copy_share`` a passage of 64 tokens or
    more comes a second time later in the window: prose repeats itself too little to teach a small model to look back.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        *,
        newline_id: int,
        bos_id: int,
        bos_share: float,
        copy_share: float,
        seed: int,
        device: torch.device,
    ) -> None:
        """Take ``tokens`` (int32 ``[tokens]``); everything random comes from ``seed``."""
        self.tokens = tokens.to(device)
        self.bos_id = bos_id
        self.bos_share = bos_share
        self.copy_share = copy_share
        self.device = device
        self.epochs = 0.0
        self._generator = torch.Generator().manual_seed(seed)
        self._starts = torch.empty(0, dtype=torch.long)
        self._seq_len = 0
        newlines = torch.nonzero(tokens == newline_id).flatten()
        index = torch.searchsorted(newlines, torch.arange(len(tokens)))
        last = len(newlines) - 1
        self._next_newline = newlines[index.clamp(max=last)] if last >= 0 else torch.arange(len(tokens))

    def batch(self, windows: int, seq_len: int) -> torch.Tensor:
        """Return int64 ``[windows, seq_len + 1]`` on the device: inputs and, shifted by one, their targets."""
        span = seq_len + 1
        if len(self.tokens) < span + seq_len:
            raise ValueError(f"the training text has {len(self.tokens)} tokens: too few for windows of {seq_len}")
        if seq_len != self._seq_len:
            self._starts, self._seq_len = self._starts[:0], seq_len
        while len(self._starts) < windows:
            offset = int(torch.randint(seq_len, (1,), generator=self._generator))
            count = (len(self.tokens) - offset - 1) // seq_len
            order = torch.randperm(count, generator=self._generator)
            self._starts = torch.cat([self._starts, offset + seq_len * order])
        starts, self._starts = self._starts[:windows], self._starts[windows:]
        self.epochs += windows * seq_len / len(self.tokens)
        as_bos = torch.rand(windows, generator=self._generator) < self.bos_share
        starts = torch.where(as_bos, self._next_newline[starts], starts).clamp(max=len(self.tokens) - span)
        starts_on_device = starts.to(self.device, non_blocking=True)
        rows = self.tokens[starts_on_device[:, None] + torch.arange(span, device=self.device)].long()
        rows[:, 0] = torch.where(as_bos.to(self.device, non_blocking=True), self.bos_id, rows[:, 0])
        return rows.gather(1, self._copy_sources(windows, span).to(self.device, non_blocking=True))

    def _copy_sources(self, windows: int, span: int) -> torch.Tensor:
        """Return int64 ``[windows, span]``: which position of the window each position takes its token from."""
        position = torch.arange(span).expand(windows, span)
        longest = min(512, span // 2)
        if longest < 64:
            return position
        draw = torch.rand(windows, 4, generator=self._generator)
        length = (64 + draw[:, 0] * (longest - 64)).long()
        target = (length + draw[:, 1] * (span - 2 * length)).long()
        source = (draw[:, 2] * (target - length)).long()
        offset = (position - target[:, None]).long()
        copied = (offset >= 0) & (offset < length[:, None]) & (draw[:, 3:] < self.copy_share)
        return torch.where(copied, source[:, None] + offset, position)
