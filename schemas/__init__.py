"""The request bodies: one JSON Schema file each, and the wording of a refusal (contract, 2.2).

A file is the only description of its body. Its keywords are checked in the order in which they
stand in the file, so the order of the contract is the order of the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

QUOTED = 64  # characters of a client's key or value that an error repeats


class InvalidParams(Exception):
    """A body that its schema refuses; the text is what the client is told."""


def load(name: str) -> dict[str, Any]:
    """Return the JSON Schema of `schemas/NAME.json`."""
    schema: dict[str, Any] = json.loads(files(__name__).joinpath(f"{name}.json").read_bytes())
    return schema


def checker(name: str) -> Callable[[Any], None]:
    """Return a function that raises `InvalidParams` for the first fault of a JSON value.

    The validator is built here, once: building it costs some fifty times as much as a check.
    """
    validator = _ClientOrder(load(name))

    def check(body: Any) -> None:
        # Lazily the first error alone: all errors of a hostile body take half a second.
        error = next(validator.iter_errors(body), None)
        if error is not None:
            raise InvalidParams(_match_error(error))

    return check


def _properties(
    validator: Any, properties: Mapping[str, Any], instance: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    """Check the keys in the order in which the client sent them, unknown ones in their turn."""
    if not validator.is_type(instance, "object"):
        return
    for key, value in instance.items():
        if key in properties:
            yield from validator.descend(value, properties[key], path=key, schema_path=key)
        elif schema.get("additionalProperties") is False:
            yield ValidationError("", validator="additionalProperties", path=(key[:QUOTED],))


_ClientOrder: Any = extend(  # type: ignore[no-untyped-call] # the stubs leave it without types
    Draft202012Validator, {"properties": _properties}
)


def _match_error(error: ValidationError) -> str:
    """Word an error as Meteor's `check` does; jsonschema's own message quotes the data."""
    field = "".join(
        f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path
    )
    where = f" in field {field[1:]}" if error.absolute_path else ""
    return f"Match error: {_expectation(error)}{where}"


def _expectation(error: ValidationError) -> str:
    wanted: Any = error.validator_value
    value: Any = error.instance
    match error.validator:
        case "type" if wanted == "array":
            quoted = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
            return f"Expected array, got {quoted[:QUOTED]}"
        case "type" if wanted == "object" and isinstance(value, list):
            return "Expected plain object"
        case "type":
            return f"Expected {wanted}, got {_typeof(value)}"
        case "required":
            return f"Missing key '{next(key for key in wanted if key not in value)}'"
        case "additionalProperties":
            return "Unknown key"
        case "maxLength":
            return f"Expected at most {wanted} characters"
        case "minLength":
            return f"Expected at least {wanted} character{'' if wanted == 1 else 's'}"
        case "maxItems":
            return f"Expected at most {wanted} items"
        case "pattern":
            return "Expected text without NUL characters"
    raise NotImplementedError(f"no wording for the keyword {error.validator}")


def _typeof(value: Any) -> str:
    """Return what JavaScript's `typeof` says of a JSON value, but "null" for null."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "string"
    return "number" if isinstance(value, int | float) else "object"
