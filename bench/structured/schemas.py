"""Seeded random JSON schemas whose every instance is short: strings, arrays, objects and numbers have bounds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
NAMES = ("name", "age", "tags", "is_open", "größe", 'a "b"', "kind", "x-1", "parent", "note")
WORDS = ("red", "green", "blue", "yes", "no", 'a "quote"', "naïve", "tab\there", "☃")
PATTERNS = ("^[a-z]{2,6}$", "^[0-9]{4}-[0-9]{2}$", "^(cat|dog)s?$", "^[A-Z][a-z]{1,5}( [A-Z][a-z]{1,5})?$")
FORMATS = ("date", "uuid", "ipv4")


def random_schema(seed: int, depth: int = 3) -> Schema:
    """The schema of `seed`: an object at the top, nested up to `depth` levels."""
    rng = random.Random(seed)
    schema = _object(rng, depth)
    if rng.random() < 0.3:
        schema["$defs"] = {"part": _any(rng, 1)}
        schema["properties"]["ref"] = {"$ref": "#/$defs/part"}
        schema["required"] = [*schema["required"], "ref"]
    return schema


def _any(rng: random.Random, depth: int) -> Schema:
    kinds: list[Callable[[random.Random, int], Schema]] = [_string, _integer, _number, _plain, _listed]
    if depth > 0:
        kinds += [_object, _array, _one_of_several]
    return rng.choice(kinds)(rng, depth - 1)


def _string(rng: random.Random, _: int) -> Schema:
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": rng.choice(FORMATS)}
    least = rng.randrange(4)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(10)}


def _integer(rng: random.Random, _: int) -> Schema:
    low = rng.randrange(-1000, 1000)
    schema: Schema = {"type": "integer", "minimum": low, "maximum": low + rng.randrange(2000)}
    if rng.random() < 0.3:
        schema["exclusiveMaximum"] = schema.pop("maximum") + 1
    return schema


def _number(rng: random.Random, _: int) -> Schema:
    return {"type": "number", "minimum": rng.randrange(-9, 1), "maximum": rng.randrange(1, 9), "multipleOf": 0.25}


def _plain(rng: random.Random, _: int) -> Schema:
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}])


def _listed(rng: random.Random, _: int) -> Schema:
    values: list[Any] = [*rng.sample(WORDS, 3), rng.randrange(100), None, True]
    return {"const": rng.choice(values)} if rng.random() < 0.3 else {"enum": rng.sample(values, rng.randrange(1, 5))}


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randrange(3)
    if rng.random() < 0.2:
        prefix = [_any(rng, 0) for _ in range(least + 1)]
        return {"type": "array", "prefixItems": prefix, "items": False, "minItems": len(prefix)}
    return {"type": "array", "items": _any(rng, depth), "minItems": least, "maxItems": least + rng.randrange(3)}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(NAMES, rng.randrange(1, 5))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }


def _one_of_several(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randrange(2, 4))]}
