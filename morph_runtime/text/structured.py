"""`structured_outputs` as clients send it, and under the older names that vLLM had for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from morph_runtime.engine.messages import StructuredOutputs
from morph_runtime.errors import RequestError
from morph_runtime.text.values import is_unicode, printable, read_boolean, read_nested, read_strings

WHITESPACE = r"[ \t\n\r]{1,20}"
"""White space between JSON tokens unless the request says otherwise; bounded, so that no model loops in it."""
MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 4096
MAX_DEFINITION_CHARS = 1 << 16
KINDS = ("json", "json_object", "regex", "choice", "grammar")
OPTIONS = ("disable_any_whitespace", "whitespace_pattern")
IGNORED = ("backend", "disable_fallback", "disable_additional_properties", "structural_tag")
"""Keys that vLLM knows and we do not serve: they pass when they ask for nothing."""
OLD_NAMES = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding")


def with_current_names(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same parameters with `guided_json` and its like, and `guided_decoding`, as `structured_outputs`.

    Raises:
        RequestError: several of them are given.
    """
    old = [key for key in OLD_NAMES if key in values]
    given = [key for key in (*old, "structured_outputs") if values.get(key) is not None]
    if len(given) > 1:
        raise RequestError("structured_outputs", f"given more than once: {', '.join(given)}.")
    current = {key: value for key, value in values.items() if key not in old}
    if not given or given == ["structured_outputs"]:
        return current
    kind = given[0].removeprefix("guided_")
    value = values[given[0]]
    return {**current, "structured_outputs": value if kind == "decoding" else {kind: value}}


def structured_outputs(key: str, value: Any) -> StructuredOutputs | None:
    """The wanted form from an object (or the JSON text of one) with exactly one of `KINDS`.

    What the definition means is checked by the engine's compiler.

    Raises:
        RequestError: not such an object, an unknown key, or a definition of the wrong type or too long.
    """
    wanted = read_nested(key, value)
    if not isinstance(wanted, Mapping):
        raise RequestError(key, "must be an object, or the JSON text of one.")
    given = {name: item for name, item in wanted.items() if item is not None and item is not False}
    for name in given:
        if name in IGNORED:
            raise RequestError(key, f"{name} is not supported.")
        if name not in KINDS + OPTIONS:
            known = ", ".join(KINDS + OPTIONS)
            raise RequestError(key, f"unknown key '{printable(str(name))}'; known are: {known}.")
    kinds = [name for name in given if name in KINDS]
    if not kinds and not given:
        return None
    if len(kinds) != 1:
        raise RequestError(key, f"needs exactly one of {', '.join(KINDS)}, but has {len(kinds)}.")
    kind = kinds[0]
    text = _READERS[kind](f"{key}.{kind}", given[kind])
    if len(text) > MAX_DEFINITION_CHARS:
        raise RequestError(key, f"the {kind} may have at most {MAX_DEFINITION_CHARS} characters, but has {len(text)}.")
    if not is_unicode(text):
        raise RequestError(key, f"the {kind} must be valid Unicode (it holds half of a surrogate pair).")
    if kind.startswith("json"):
        return StructuredOutputs("json", text, _whitespace(key, given))
    return StructuredOutputs(kind, text)


def _whitespace(key: str, given: Mapping[str, Any]) -> str:
    if read_boolean(f"{key}.disable_any_whitespace", given.get("disable_any_whitespace", False)):
        return ""
    pattern = given.get("whitespace_pattern", WHITESPACE)
    if not isinstance(pattern, str) or not is_unicode(pattern):
        raise RequestError(f"{key}.whitespace_pattern", "must be a regular expression.")
    return pattern


def _schema(key: str, value: Any) -> str:
    schema = read_nested(key, value)
    if not isinstance(schema, Mapping):
        raise RequestError(key, "must be a JSON schema: an object, or the JSON text of one.")
    try:
        return json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        raise RequestError(key, "must be JSON: it holds a number or a nesting that JSON does not allow.") from None


def _any_object(key: str, value: Any) -> str:
    read_boolean(key, value)
    return '{"type": "object"}'


def _choices(key: str, value: Any) -> str:
    choices = read_nested(key, value)
    if not isinstance(choices, (list, tuple)) or not choices:
        raise RequestError(key, "must be a list with at least one string.")
    return json.dumps(read_strings(key, choices, MAX_CHOICES, MAX_CHOICE_CHARS))


def _definition(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise RequestError(key, "must be a string that is not empty.")
    return value


_READERS: Mapping[str, Callable[[str, Any], str]] = {
    "json": _schema,
    "json_object": _any_object,
    "regex": _definition,
    "choice": _choices,
    "grammar": _definition,
}
