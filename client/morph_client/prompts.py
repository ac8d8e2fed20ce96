"""Prompts of a wanted length in tokens, cut by words from a text."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

from morph_client.aio_client import AsyncMorphClient
from morph_client.errors import BadInput
from morph_client.texts import read_words
from morph_client.types import SamplingParams

# What English prose costs with a small vocabulary, for when the server cannot be asked.
USUAL_TOKENS_PER_WORD = 1.4

_PROBES = 6
_PROBE_WORDS = 64


class PromptMaker:
    """Cuts prompts from ``words``. Equal ``seed``, ``index`` and length give an equal prompt.

    With ``shared_tokens``, each prompt begins with that many tokens of one of ``prefixes`` common beginnings, drawn by
    seed and index.
    """

    def __init__(
        self, words: Sequence[str], tokens_per_word: float, seed: int, shared_tokens: int = 0, prefixes: int = 1
    ) -> None:
        if not words:
            raise BadInput("the prompt text holds no words")
        if not (math.isfinite(tokens_per_word) and tokens_per_word > 0):
            raise BadInput(f"the number of tokens per word must be positive, not {tokens_per_word}")
        check_shared(shared_tokens, prefixes)
        self._words = list(words)
        self._ratio = tokens_per_word
        self._seed = seed
        self._shared = round(shared_tokens / tokens_per_word)
        self._prefixes = prefixes

    def make(self, tokens: int, index: int) -> str:
        """A prompt of about ``tokens`` tokens.

        Its own part begins with its number, so that no two share more than is meant and a prefix cache cannot blur a
        measurement.
        """
        count = max(1, round(tokens / self._ratio))
        draw = random.Random(f"{self._seed}/{index}")
        start = draw.randrange(len(self._words))
        words = self._prefix(draw.randrange(self._prefixes))[: count - 1] if self._shared else []
        words += ["Page", f"{index + 1}."]
        if len(words) > count:
            return " ".join([*words[: count - 1], words[-1]])
        return " ".join(words + self._stretch(start, count - len(words)))

    def _prefix(self, number: int) -> list[str]:
        start = random.Random(f"{self._seed}/prefix/{number}").randrange(len(self._words))
        return self._stretch(start, self._shared)

    def _stretch(self, start: int, count: int) -> list[str]:
        """``count`` words from ``start`` on, and from the beginning again at the text's end."""
        words: list[str] = []
        while len(words) < count:
            words.extend(self._words[start : start + count - len(words)])
            start = 0
        return words


def check_shared(shared_tokens: int, prefixes: int) -> None:
    """Raises :class:`BadInput` for a length below 0 or fewer than one prefix."""
    if shared_tokens < 0:
        raise BadInput(f"a shared prefix must have at least 0 tokens, not {shared_tokens}")
    if prefixes < 1:
        raise BadInput(f"there must be at least 1 shared prefix, not {prefixes}")


async def measure_tokens_per_word(client: AsyncMorphClient, words: Sequence[str]) -> float:
    """Asks the server how many tokens samples from all over ``words`` are. Raises what a request can raise."""
    step = max(1, (len(words) - _PROBE_WORDS) // (_PROBES - 1))
    tokens = counted = 0
    for start in range(0, min(len(words), step * (_PROBES - 1) + 1), step):
        sample = list(words[start : start + _PROBE_WORDS])
        answer = await client.generate(" ".join(sample), sampling=SamplingParams(max_tokens=1, temperature=0.0))
        tokens, counted = tokens + answer.num_input_tokens, counted + len(sample)
    return tokens / counted if tokens else USUAL_TOKENS_PER_WORD


def words_of(path: Path | None) -> list[str]:
    """The words of a text file, or of the built-in text. Raises :class:`BadInput` if the file cannot be used."""
    return _BUILT_IN.split() if path is None else read_words(path)


_BUILT_IN = """
The keeper of the lighthouse wrote a line in his book every evening, and the line was nearly always the same.
On the first night of the storm he left the page empty, for the ink had frozen in its well.
His daughter, who was then eleven years old, learned the names of the ships before she learned her prayers.
She would stand at the window with the brass telescope and call them out as they rounded the point.
In the village below, the baker lit his oven at three, and the smell of bread reached the tower before the light.
There was a schoolmaster too, a thin and patient man, who collected shells and could not bear to be hurried.
He had come to the coast for a month, on account of his lungs, and had stayed for twenty years.
When the letter arrived it was wet through, and the name upon it could hardly be read.
They dried it before the fire, the three of them, and no one spoke until the paper began to curl.
It came from a merchant in the city, who wished to know the price of the old mill and the field beside it.
Nobody had worked the mill since the great flood, and the wheel was green with moss.
The field, however, was the best in the parish, and every farmer had at one time or another wished to own it.
So it was decided that an answer should be written, and that the answer should say very little.
The schoolmaster held the pen; the baker found the words; the keeper, who trusted neither, read it twice.
A week passed, and then another, and the apples in the orchard turned from green to yellow.
At last a carriage was seen upon the road, drawn by two grey horses and covered with dust.
Out of it stepped a lady in a travelling cloak, who asked for water and for the way to the church.
She walked among the graves for an hour, reading the stones, and came away with a leaf between her fingers.
That evening she told them that her grandfather had built the mill with his own hands.
He had quarrelled with his brother over the water, as brothers will, and had gone away without a farewell.
Now he was dead, and in his desk she had found a drawing of the wheel, and a key.
The key was long and black and fitted no door that anybody could remember.
They tried it in the mill, and in the church, and in the chest where the keeper kept his flags.
It was the child who thought of the small iron gate beneath the bridge, where the stream runs deepest in spring.
The lock was stiff with rust, and the schoolmaster went back for oil, and the rain began again.
Behind the gate there was a passage, dry and clean, and at the end of the passage a room without windows.
Upon a table stood a clock which had stopped at twenty minutes past four.
Beside the clock lay a book of accounts, and between its pages there were letters tied with a blue thread.
The lady did not open them that night, but sat with her hand upon the cover until the candle was low.
In the morning the whole village knew, and each told the story in his own way, and every way was a little different.
Some said that there was gold, and some that there was only dust, and the baker said that bread was better than either.
The keeper wrote a second line in his book, and under it a third, which he had never done before.
When summer ended the wheel was turning, and the sound of it could be heard as far as the sea.
"""
