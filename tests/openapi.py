"""The OpenAPI document as a judge: what it describes, and whether an answer is as described."""

import json
import re

from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from resources.service import openapi

DOCUMENT = openapi()
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
    if operation is None or status == 404:
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
