"""The OpenAPI document as a judge: what it describes, and whether an answer is as described.

`python -m tests.openapi` puts schemas/openapi.json into its format.
"""

import json
import re

from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

import schemas
from settings import VERSION
from tests.server import ROOT

FILE = ROOT / "schemas" / "openapi.json"
DOCUMENT = schemas.openapi(VERSION)
METHODS = ("get", "post", "delete")
_REGISTRY = Registry().with_resource(
    "urn:openapi", Resource(contents=DOCUMENT, specification=DRAFT202012)
)


def resolve(part):
    """Return what a reference stands for, and all else as it is."""
    while "$ref" in part:
        names = part["$ref"].removeprefix("#/").split("/")
        part = DOCUMENT
        for name in names:
            part = part[name]
    return part


def validator(schema):
    """Return a validator of a schema of the document, whose references it follows."""
    absolute = json.dumps(schema).replace('"$ref": "#', '"$ref": "urn:openapi#')
    return Draft202012Validator(json.loads(absolute), registry=_REGISTRY)


def operations():
    """Yield path, method and operation of everything that is described."""
    for path, item in DOCUMENT["paths"].items():
        for method in METHODS:
            if method in item:
                yield path, method, item[method]


def find(method, path):
    """Return the described operation of a request, or None."""
    for template in sorted(DOCUMENT["paths"], key=lambda template: "{" in template):
        pattern = re.escape(template).replace(r"\{token\}", ".+") + "/?"
        if re.fullmatch(pattern, path, re.DOTALL):
            return DOCUMENT["paths"][template].get("get" if method == "HEAD" else method.lower())
    return None


def check(method, path, status, headers, body):
    """Raise where the answer to a described request is not as described."""
    operation = find(method, path)
    if operation is None or (status == 404 and "404" not in operation["responses"]):
        return
    described = resolve(operation["responses"][str(status)])
    for name, header in described["headers"].items():
        header = resolve(header)
        assert name in headers or not header.get("required"), name
        if name in headers:
            validator(header["schema"]).validate(headers[name])
    (media_type,) = described.get("content", {"application/json": {}})
    assert headers["Content-Type"].partition(";")[0] == media_type
    if method != "HEAD" and "content" in described:
        validator(described["content"][media_type]["schema"]).validate(body)


def formatted(value, indent="", around=1):
    """Return JSON of a value in as few lines of 100 characters as it takes to see its structure.

    What fits stands on one line, and so do its neighbours; what is the only one in its container
    shares the lines of its brackets. `around` is what else stands on the value's first line.
    """
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(indent) + around + len(line) <= 100:
        return line
    opening, closing = line[0], line[-1]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    keys = [f"{json.dumps(key)}: " if isinstance(value, dict) else "" for key, _ in items]
    values = list(value.values()) if isinstance(value, dict) else value
    if len(values) == 1:
        inside = formatted(values[0], indent, around + len(opening + keys[0] + closing))
        return f"{opening}{keys[0]}{inside}{closing}"
    deeper, lines = f"{indent}  ", []
    for key, one in zip(keys, values, strict=True):
        part = key + formatted(one, deeper, len(key) + 1)
        together = f"{lines[-1]}, {part}" if lines else "\n"
        if "\n" in together or len(deeper + together) + 1 > 100:
            lines.append(part)
        else:
            lines[-1] = together
    return f"{opening}\n{deeper}" + f",\n{deeper}".join(lines) + f"\n{indent}{closing}"


if __name__ == "__main__":
    FILE.write_text(formatted(json.loads(FILE.read_text())) + "\n")
