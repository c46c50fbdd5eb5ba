"""Custom fields of a visitor who is there already (contract, section 5)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import falcon

import schemas
import storage
from resources.body import read
from resources.errors import bare_refusal, to_json


def _set_fields(
    store: storage.VisitorStore, token: str, fields: Collection[Mapping[str, Any]]
) -> None:
    """Write all `fields` or none; raise the refusal of what the store does not take."""
    try:
        store.set_fields(token, fields)
    except storage.VisitorNotFound:
        raise bare_refusal("invalid-token") from None
    except storage.UnknownField:
        raise bare_refusal("invalid-custom-field") from None
    except storage.OverLimit as limit:
        raise schemas.ajv_limit(str(limit)) from None


class CustomFieldResource:
    """POST /api/v1/livechat/custom.field: set one custom field."""

    def __init__(self, store: storage.VisitorStore) -> None:
        self._store = store
        self._check = schemas.ajv_checker("custom.field")

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 with the field as it was sent, also where the old value stays."""
        body = read(req, self._check)
        _set_fields(self._store, body["token"], [body])
        field = {key: body[key] for key in ("key", "value", "overwrite")}
        resp.data = to_json({"field": field, "success": True})


class CustomFieldsResource:
    """POST /api/v1/livechat/custom.fields: set several custom fields, all or none."""

    def __init__(self, store: storage.VisitorStore) -> None:
        self._store = store
        self._check = schemas.ajv_checker("custom.fields")

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer 200 with the fields in the order in which they were sent, keyed `Key`."""
        body = read(req, self._check)
        _set_fields(self._store, body["token"], body["customFields"])
        fields = [
            {"Key": field["key"], "value": field["value"], "overwrite": field["overwrite"]}
            for field in body["customFields"]
        ]
        resp.data = to_json({"fields": fields, "success": True})
