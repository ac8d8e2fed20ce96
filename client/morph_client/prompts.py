"""Prompts of a wanted length in tokens, cut by words from a text."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

from morph_client.aio_client import AsyncMorphClient
from morph_client.errors import BadInput
from morph_client.types import SamplingParams

# What English prose costs with a small vocabulary, for when the server cannot be asked.
USUAL_TOKENS_PER_WORD = 1.4

_PROBE_WORDS = 96


class PromptMaker:
    """Cuts prompts from ``words``. Equal ``seed``, ``index`` and length give an equal prompt."""

    def __init__(self, words: Sequence[str], tokens_per_word: float, seed: int) -> None:
        if not words:
            raise BadInput("the prompt text holds no words")
        if not (math.isfinite(tokens_per_word) and tokens_per_word > 0):
            raise BadInput(f"the number of tokens per word must be positive, not {tokens_per_word}")
        self._words = list(words)
        self._ratio = tokens_per_word
        self._seed = seed

    def make(self, tokens: int, index: int) -> str:
        """A prompt of about ``tokens`` tokens.

        It begins with its number, so that no two share a prefix and a prefix cache cannot blur a measurement.
        """
        count = max(1, round(tokens / self._ratio))
        start = random.Random(f"{self._seed}/{index}").randrange(len(self._words))
        words = ["Page", f"{index + 1}."]
        while len(words) < count:
            words.extend(self._words[start : start + count - len(words)])
            start = 0
        return " ".join(words[-count:] if count < 2 else words[:count])


async def measure_tokens_per_word(client: AsyncMorphClient, words: Sequence[str]) -> float:
    """Asks the server how many tokens a sample of ``words`` is. Raises what a request can raise."""
    sample = list(words[:_PROBE_WORDS])
    answer = await client.generate(" ".join(sample), sampling=SamplingParams(max_tokens=1, temperature=0.0))
    return answer.num_input_tokens / len(sample) if answer.num_input_tokens else USUAL_TOKENS_PER_WORD


def words_of(path: Path | None) -> list[str]:
    """The words of a text file, or of the built-in text. Raises :class:`BadInput` if the file cannot be used."""
    if path is None:
        return _BUILT_IN.split()
    try:
        words = path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not a UTF-8 text file") from None
    if not words:
        raise BadInput(f"{path} holds no words")
    return words


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
