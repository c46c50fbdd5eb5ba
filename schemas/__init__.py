"""The requests: one JSON Schema file each, named like its URL, and the wording of a refusal.

A file is the only description of its body, or of its query parameters.
Its keywords are checked in the order in which they stand in the file, so the order of the
contract is the order of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

QUOTED = 64  # characters of a client's key or value that an error repeats


class InvalidParams(Exception):
    """What a schema refuses; the text is what the client is told."""


def load(name: str) -> dict[str, Any]:
    """Return the JSON Schema of `schemas/NAME.json`."""
    schema: dict[str, Any] = json.loads(files(__name__).joinpath(f"{name}.json").read_bytes())
    return schema


def openapi(version: str) -> dict[str, Any]:
    """Return the OpenAPI document of a version of the service.

    `openapi.json` says only once, as `x-common`, what many answers have: the headers of every
    answer, those of every answer of a route with a rate limit (one that can answer 429), and the
    answers that the server gives on every route before the route is looked at.
    """
    document = load("openapi")
    document["info"]["version"] = version
    for name in ("visitor", "visitor.status", "custom.field", "custom.fields"):
        document["components"]["schemas"][name] = load(name)
    common = document.pop("x-common")
    answers = document["components"]["responses"]
    named = {f"#/components/responses/{name}": answer for name, answer in answers.items()}
    every = list(named.values())
    for path in document["paths"].values():
        for operation in (part for key, part in path.items() if key != "parameters"):
            responses = operation["responses"]
            own = [named.get(answer.get("$ref"), answer) for answer in responses.values()]
            for answer in own if "429" in responses else ():
                answer["headers"] = common["limited"] | answer.get("headers", {})
            operation["responses"] = dict(sorted((responses | common["responses"]).items()))
            every += own
    for answer in every:
        answer["headers"] = common["headers"] | answer.get("headers", {})
    return document


def match_checker(name: str) -> Callable[[Any], None]:
    """Return a function that raises `InvalidParams` for the first fault of a JSON value.

    The first is the one that the client sent first; worded as Meteor's `check` does.
    """
    return _checker(_client_order(), load(name), _match_error)


def ajv_checker(name: str) -> Callable[[Any], None]:
    """Return a function that raises `InvalidParams` for the first fault of a JSON value.

    The first is the one that stands first in the schema; worded as the JavaScript library Ajv does.
    """
    return _checker(_SchemaOrder, load(name), _ajv_error)


def match_limit(limit: str, field: str) -> InvalidParams:
    """Return the refusal of more than a `limit` such as "256 items", worded as `check` does."""
    return InvalidParams(f"Match error: Expected at most {limit} in field {field}")


def ajv_limit(limit: str) -> InvalidParams:
    """Return the refusal of more than a `limit` such as "256 items", worded as Ajv does."""
    return InvalidParams(f"must NOT have more than {limit} [invalid-params]")


def _checker(
    validator_class: Any, schema: Mapping[str, Any], word: Callable[[ValidationError], str]
) -> Callable[[Any], None]:
    # Built here, once: building a validator costs some fifty times as much as a check.
    validator = validator_class(schema)

    def check(value: Any) -> None:
        # Lazily the first error alone: all errors of a hostile body take half a second.
        error = next(validator.iter_errors(value), None)
        if error is not None:
            raise InvalidParams(word(error))

    return check


def _type(_validator: Any, wanted: str, instance: Any, _schema: Any) -> Errors:
    right = isinstance(instance, _TYPES[wanted])
    if isinstance(instance, bool):
        right = wanted == "boolean"
    return () if right else (ValidationError(""),)


def _required(_validator: Any, keys: list[str], instance: Any, _schema: Any) -> Errors:
    missing = isinstance(instance, dict) and any(key not in instance for key in keys)
    return (ValidationError(""),) if missing else ()


def _max_length(_validator: Any, most: int, instance: Any, _schema: Any) -> Errors:
    return (ValidationError(""),) if isinstance(instance, str) and len(instance) > most else ()


def _pattern(_validator: Any, pattern: str, instance: Any, _schema: Any) -> Errors:
    if isinstance(instance, str) and not _compile(pattern).search(instance):
        return (ValidationError(""),)
    return ()


Errors = tuple[ValidationError, ...]
_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "number": (int, float),
    "integer": int,
}
_compile = cache(re.compile)
_extend: Any = extend  # which has no types
# The keywords of most values. jsonschema's own are generators, and find out about types each time:
# they make a check cost twice as much.
_SchemaOrder = _extend(
    Draft202012Validator,
    {"type": _type, "required": _required, "maxLength": _max_length, "pattern": _pattern},
)


def _client_order() -> Any:
    """Return a class of validators that look at keys in the order in which the client sent them."""
    # The checks of each schema within a schema, by its id. jsonschema would make a validator for
    # each value, and a generator for each of them, which is half of the cost of a check.
    within: dict[int, list[tuple[str, Any, Any]]] = {}

    def first_error(validator: Any, schema: Any, value: Any, step: int | str) -> Errors:
        """Return the first error of a value within another one; nobody asks for a second."""
        if id(schema) not in within:
            known = validator.VALIDATORS
            within[id(schema)] = [(key, known[key], schema[key]) for key in schema if key in known]
        for keyword, check, wanted in within[id(schema)]:
            for found in check(validator, wanted, value, schema) or ():
                error = found
                if keyword not in ("properties", "items"):  # which know better where it is
                    error = ValidationError(
                        "", validator=keyword, validator_value=wanted, instance=value
                    )
                error.path.appendleft(step)
                return (error,)
        return ()

    def properties(
        validator: Any, known: Mapping[str, Any], instance: Any, schema: Mapping[str, Any]
    ) -> Errors:
        """Check the keys, unknown ones in their turn."""
        for key, value in instance.items() if isinstance(instance, dict) else ():
            if key not in known:
                if schema.get("additionalProperties") is False:
                    where = (key[:QUOTED],)
                    return (ValidationError("", validator="additionalProperties", path=where),)
            elif errors := first_error(validator, known[key], value, key):
                return errors
        return ()

    def items(validator: Any, each: Any, instance: Any, _schema: Any) -> Errors:
        """Check the items of an array, each alike."""
        for index, value in enumerate(instance if isinstance(instance, list) else ()):
            if errors := first_error(validator, each, value, index):
                return errors
        return ()

    keywords = {
        "properties": properties,
        "items": items,
        "additionalProperties": lambda *_: (),  # which `properties` looks at
    }
    return _extend(_SchemaOrder, keywords)


# What a refusal says, by keyword. jsonschema's own message quotes the data, and is never used.
_MATCH = {
    "required": "Missing key '{missing}'",
    "additionalProperties": "Unknown key",
    "minLength": "Expected at least {wanted} character",
    "maxLength": "Expected at most {wanted} characters",
    "maxItems": "Expected at most {wanted} items",
    "pattern": "Expected text without NUL characters",
}
_AJV = {
    "type": "must be {wanted}",
    "required": "must have required property '{missing}'",
    "additionalProperties": "must NOT have additional properties",
    "minLength": "must NOT have fewer than {wanted} characters",
    "maxLength": "must NOT have more than {wanted} characters",
    "maxItems": "must NOT have more than {wanted} items",
    "minimum": "must be >= {wanted}",
    "maximum": "must be <= {wanted}",
    "enum": "must be equal to one of the allowed values",
    "anyOf": "must match a schema in anyOf",
    "not": "must NOT be valid",
    "pattern": "must NOT contain NUL characters",
}


def _word(error: ValidationError, wording: Mapping[str, str]) -> str:
    wanted: Any = error.validator_value
    value: Any = error.instance
    required = wanted if error.validator == "required" else ()
    missing = next((key for key in required if key not in value), None)
    return wording[str(error.validator)].format(wanted=wanted, missing=missing)


def _ajv_error(error: ValidationError) -> str:
    return f"{_word(error, _AJV)} [invalid-params]"


def _match_error(error: ValidationError) -> str:
    expectation = _mistyped(error) if error.validator == "type" else _word(error, _MATCH)
    field = "".join(
        f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path
    )
    where = f" in field {field[1:]}" if error.absolute_path else ""
    return f"Match error: {expectation}{where}"


def _mistyped(error: ValidationError) -> str:
    value: Any = error.instance
    if error.validator_value == "array":
        quoted = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return f"Expected array, got {quoted[:QUOTED]}"
    if error.validator_value == "object" and isinstance(value, list):
        return "Expected plain object"
    return f"Expected {error.validator_value}, got {_typeof(value)}"


def _typeof(value: Any) -> str:
    """Return what JavaScript's `typeof` says of a JSON value, but "null" for null."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "string"
    return "number" if isinstance(value, int | float) else "object"
