"""The console's files: what is served, under which headers, and what is in them."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from tests.apiserver import Api

ASSETS = resources.files("api.console") / "assets"
NAMES = sorted(file.name for file in ASSETS.iterdir())
NOBODY = {"Authorization": ""}


def _text(name: str) -> str:
    return (ASSETS / name).read_text()


async def test_the_page_is_for_anybody_and_strict(api: Api) -> None:
    page = await api.client.get("/console", headers=NOBODY)
    assert (page.status, page.content_type, page.charset) == (200, "text/html", "utf-8")
    policy = page.headers["Content-Security-Policy"]
    for part in (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ):
        assert part in policy
    assert "unsafe" not in policy
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert page.headers["Referrer-Policy"] == "no-referrer"
    assert "Set-Cookie" not in page.headers


@pytest.mark.parametrize("name", [name for name in NAMES if name != "index.html"])
async def test_files_are_kept_until_they_change(api: Api, name: str) -> None:
    first = await api.client.get(f"/console/{name}", headers=NOBODY)
    kinds = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert (first.status, first.content_type) == (200, kinds[name.rpartition(".")[2]])
    assert await first.text() == _text(name)
    assert first.headers["Cache-Control"] == "no-cache"
    assert "Content-Security-Policy" in first.headers
    tag = first.headers["ETag"]
    again = await api.client.get(f"/console/{name}", headers={**NOBODY, "If-None-Match": tag})
    assert (again.status, await again.read(), again.headers["ETag"]) == (304, b"", tag)
    other = await api.client.get(f"/console/{name}", headers={**NOBODY, "If-None-Match": '"old"'})
    assert other.status == 200


@pytest.mark.parametrize("name", ["index.html", "none.js", "..%2F..%2Fapp.py", "__init__.py"])
async def test_nothing_else_is_served(api: Api, name: str) -> None:
    assert (await api.client.get(f"/console/{name}")).status == 404


def test_the_page_loads_all_modules_and_nothing_inline() -> None:
    page = _text("index.html")
    named = set(re.findall(r'(?:src|href)="console/([^"]+)"', page))
    assert named | {"index.html"} == set(NAMES)
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|https?://", page)
    assert len(re.findall(r"<script\b[^>]*\bsrc=", page)) == len(re.findall("<script", page))


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".js")])
def test_scripts_make_no_markup_and_keep_no_key_for_long(name: str) -> None:
    script = _text(name)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function"
        r"|localStorage|indexedDB|\.cookie|https?://(?!www\.w3\.org/2000/svg|example\.com)",
        script,
    )
    imported = re.findall(r'from "\./([^"]+)"', script)
    assert set(imported) <= set(NAMES)
    if name != "api.js":
        assert "sessionStorage" not in script
        assert "fetch(" not in script
    assert len(script.splitlines()) < 300
