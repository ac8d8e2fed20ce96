"""Single values of a request, checked and coerced: numbers may come as strings, as Triton's clients send them.

Every function raises RequestError that names the field and what is allowed.
"""

from __future__ import annotations

import json
import math
from typing import Any

from morph_runtime.errors import RequestError


def read_integer(key: str, value: Any, low: int, high: int) -> int:
    """A whole number from `low` to `high`; a float or a string that is one will do."""
    number: int | None = None
    if isinstance(value, bool):
        number = None
    elif isinstance(value, int):
        number = value
    elif isinstance(value, float):
        number = int(value) if math.isfinite(value) and value == int(value) else None
    elif isinstance(value, str):
        text = value.strip()
        digits = text[1:] if text[:1] in ("+", "-") else text
        if digits.isascii() and digits.isdigit():
            # More digits than any limit has: out of range, whatever they say (and slow to convert).
            number = int(text) if len(digits) <= 30 else (-1 if text[0] == "-" else 1) * 10**30
    if number is None:
        raise RequestError(key, f"must be a whole number between {low} and {high}, but is {shown(value)}.")
    if not low <= number <= high:
        raise RequestError(key, f"must be between {low} and {high}, but is {shown(value)}.")
    return number


def read_number(key: str, value: Any) -> float:
    """A finite number, or a string that is one."""
    result = math.nan
    spelt = isinstance(value, str) and "_" not in value  # Python reads "1_0" as 10; nobody else does
    if spelt or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        try:
            result = float(value)
        except (ValueError, OverflowError):
            result = math.nan
    if not math.isfinite(result):
        raise RequestError(key, f"must be a finite number, but is {shown(value)}.")
    return result


def read_boolean(key: str, value: Any) -> bool:
    """True or false; 0, 1 and their names as strings will do."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0"):
        return value.strip().lower() in ("true", "1")
    raise RequestError(key, f"must be true or false, but is {shown(value)}.")


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded (no half of a surrogate pair)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """A value as part of an error text: short and always encodable."""
    text = value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else ""
    if not text:
        text = "a very large number" if isinstance(value, int) and abs(value) >= 10**30 else repr(value)
    return f"'{printable(text)}'" if isinstance(value, str) else printable(text)


def printable(text: str) -> str:
    """A text as part of an error text: short, on one line."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return f"{text[:60]}…" if len(text) > 60 else text


def json_type(value: Any) -> str:
    """What JSON calls the value's type."""
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def read_nested(key: str, value: Any) -> Any:
    """A list or an object, or the JSON text of one: request parameters and Triton's clients cannot nest."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=lambda name: _refuse_constant(key, name))
    except RequestError:
        raise
    except (ValueError, RecursionError):
        raise RequestError(key, "the string must be JSON text.") from None


def read_number_between(key: str, value: Any, low: float, high: float) -> float:
    """A number from `low` to `high`."""
    number = read_number(key, value)
    if not low <= number <= high:
        raise RequestError(key, f"must be between {low:g} and {high:g}, but is {shown(value)}.")
    return number


def read_strings(key: str, value: Any, most: int, most_chars: int) -> tuple[str, ...]:
    """One string or a list of them: none empty, at most `most`, each of at most `most_chars` characters."""
    what = f"{key.replace('_', ' ').removesuffix('s')}{' string' if key == 'stop' else ''}"
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise RequestError(key, "must be a string or a list of strings.")
    if len(items) > most:
        raise RequestError(key, f"at most {most} {what}s, but there are {len(items)}.")
    for item in items:
        if not item:
            raise RequestError(key, f"a {what} must not be empty.")
        if len(item) > most_chars:
            raise RequestError(key, f"a {what} may have at most {most_chars} characters, but one has {len(item)}.")
        if not is_unicode(item):
            raise RequestError(key, f"a {what} must be valid Unicode (it holds half of a surrogate pair).")
    return tuple(items)


def read_token_ids(key: str, value: Any, most: int, vocab_size: int) -> tuple[int, ...]:
    """A list of at most `most` token ids below `vocab_size`."""
    items = read_nested(key, value)
    if not isinstance(items, (list, tuple)):
        raise RequestError(key, "must be a list of token ids.")
    if len(items) > most:
        raise RequestError(key, f"at most {most} token ids, but there are {len(items)}.")
    return tuple(read_integer(key, item, 0, vocab_size - 1) for item in items)


def _refuse_constant(key: str, name: str) -> Any:
    raise RequestError(key, f"{name} is not a number that JSON allows.")
