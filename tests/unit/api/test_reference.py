"""The reference: every route described, its document sound, its page whole.

That answers are as described is shown by `tests/integration/test_described_calls.py`.
"""

from __future__ import annotations

import re

import pytest

from api.reference.calls import CALLS
from api.reference.document import openapi
from api.routes import ROUTES, Route
from tests.apiserver import Api

#: Ends of paths that take no body.
BODILESS = ("/cancel", "/replay", "/test", "/redeliver")


def test_routes_and_descriptions_are_the_same() -> None:
    assert {f"{route.method} {route.path}" for route in ROUTES} == set(CALLS)


def test_a_route_without_a_description_is_refused() -> None:
    new = Route("GET", "/v1/new", ROUTES[0].handler, "jobs")
    with pytest.raises(KeyError, match="GET /v1/new"):
        openapi([*ROUTES, new])


def test_a_body_that_is_read_is_described() -> None:
    """All but those that take nothing: what POSTs a body has a schema and most have an example."""
    for route in ROUTES:
        call = CALLS[f"{route.method} {route.path}"]
        if route.method == "POST" and not route.path.endswith(BODILESS):
            assert call.body is not None, route


def test_the_document_holds_together() -> None:
    document = openapi(ROUTES)
    assert document["openapi"] == "3.1.0"
    text = str(document)
    names = set(re.findall(r"#/components/schemas/([^'\"]+)", text))
    assert names <= set(document["components"]["schemas"])
    ids = [
        operation["operationId"]
        for path in document["paths"].values()
        for operation in path.values()
    ]
    assert len(ids) == len(set(ids)) == len(ROUTES)
    # The schema of a body is the one it is checked by.
    message = document["components"]["schemas"]["ChatRequest"]["properties"]["temperature"]
    assert {"type": "number", "minimum": 0, "maximum": 2} in message["anyOf"]


def test_a_form_and_a_query_know_no_null() -> None:
    paths = openapi(ROUTES)["paths"]
    form = paths["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["required"]) == {"purpose", "file"}
    assert form["properties"]["expires_after[seconds]"]["type"] == "integer"
    assert "null" not in str(form)
    assert "null" not in str(paths["/v1/files"]["get"]["parameters"])


async def test_the_page_brings_all_it_needs(api: Api) -> None:
    page = await api.client.get("/docs", headers={"Authorization": ""})
    assert page.status == 200
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    files = re.findall(r'(?:src|href)="([^"]+)"', await page.text())
    assert len(files) == 4
    for name in files:
        response = await api.client.get(f"/{name}")
        assert response.status == 200
        assert len(await response.read()) > 100
        assert "://" not in name
    assert (await api.client.get("/docs/..%2F..%2Fsetup.cfg")).status == 404
    assert (await api.client.get("/docs/README.md")).status == 404
