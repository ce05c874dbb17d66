"""What a tenant does in the console, in a real browser."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import orjson
import pytest
from playwright.async_api import expect

from tests.apiserver import CHAT, eventually
from tests.browser.driving import Console

pytestmark = pytest.mark.asyncio(loop_scope="module")

VIEWS = ("jobs", "prompt", "webhooks", "usage")


async def _shows(locator: Any, text: str) -> None:
    await locator.filter(has_text=re.compile(re.escape(text))).first.wait_for()


async def test_signing_in_and_out(console: Console) -> None:
    page = console.page
    await page.goto(f"{console.api.url}console")
    key = page.get_by_label("API key")
    assert await key.get_attribute("type") == "password"
    await key.fill("fb_live_wrong")
    await page.keyboard.press("Enter")
    await _shows(page.get_by_role("alert"), "invalid_api_key")
    assert await key.get_attribute("aria-invalid") == "true"
    # The browser tells of the 401 by itself.
    assert [error for error in console.errors if "401" not in error] == []
    console.errors.clear()

    await key.fill("a")
    await page.keyboard.press("Enter")
    await page.get_by_role("heading", name="Jobs").wait_for()
    assert await page.evaluate("document.activeElement.tagName") == "H1"
    await page.reload()
    await page.get_by_role("heading", name="Jobs").wait_for()
    await page.get_by_role("button", name="Sign out").click()
    await key.wait_for()
    assert await page.evaluate("sessionStorage.length + localStorage.length") == 0
    assert await key.input_value() == ""

    await key.fill("a")
    await page.get_by_label("Stay signed in").uncheck()
    await page.get_by_role("button", name="Sign in").click()
    await page.get_by_role("heading", name="Jobs").wait_for()
    assert await page.evaluate("sessionStorage.length") == 0
    await page.reload()
    await key.wait_for()

    assert await page.context.cookies() == []
    sent = [each for each in console.requests if each.headers.get("authorization")]
    assert sent
    assert {each.headers["authorization"] for each in sent} == {"Bearer fb_live_wrong", "Bearer a"}
    assert all("/v1/" in each.url and "fb_live" not in each.url for each in sent)


async def test_a_key_that_is_revoked_signs_out(console: Console) -> None:
    await console.sign_in()
    console.api.accounts._principals.clear()
    await console.page.evaluate("location.hash = '#usage'")
    await _shows(console.page.get_by_role("alert"), "invalid_api_key")
    assert await console.page.locator("#view").is_hidden()
    console.errors.clear()


async def test_a_prompt_streams_and_is_listed(console: Console) -> None:
    page = console.page
    await console.sign_in("prompt")
    await page.get_by_label("Prompt", exact=True).fill("say it")
    await page.get_by_label("Most tokens").fill("16")
    await page.keyboard.press("Control+Enter")
    await page.get_by_label("Prompt", exact=True).press("Control+Enter")
    answer = page.get_by_role("log", name="Answer")
    await _shows(answer, "one two three")
    await _shows(page.locator(".state"), "completed")
    await _shows(page.get_by_role("status"), "5 + 3 tokens")
    assert await answer.get_attribute("aria-busy") == "false"
    await page.get_by_role("link", name="Jobs").click()
    row = page.locator("tr[data-job]").first
    await _shows(row, "completed")
    await row.get_by_role("button", name="Open job_").click()
    dialog = page.get_by_role("dialog")
    await _shows(dialog.get_by_role("region", name="Output"), "one two three")
    await page.keyboard.press("Escape")
    await dialog.wait_for(state="detached")
    assert await page.evaluate("document.activeElement.getAttribute('aria-label')") is not None


async def test_a_running_job_is_cancelled_where_it_streams_and_in_the_list(
    console: Console,
) -> None:
    page, worker = console.page, console.api.worker
    await console.sign_in("prompt")
    await page.get_by_label("Prompt", exact=True).fill("hold it")
    await page.get_by_role("button", name="Send").click()
    await _shows(page.get_by_role("log", name="Answer"), "held")
    await page.get_by_role("button", name="Cancel").click()
    await _shows(page.locator(".state"), "cancelled")
    assert worker.held == []

    made = await console.job("hold it too")
    await page.get_by_role("link", name="Jobs").click()
    await page.get_by_role("button", name=f"Cancel {made['id']}").click()
    await _shows(page.locator(f"tr[data-job={made['id']}]"), "cancelled")


async def test_queues_and_places_follow_what_happens(console: Console) -> None:
    page, queue = console.page, console.api.queue
    queue.pause(CHAT)
    first, second = await console.job("one"), await console.job("one more")
    await console.job("two", priority="batch")
    await console.sign_in()
    await _shows(page.locator(f"tr[data-job={first['id']}]"), "next")
    await _shows(page.locator(f"tr[data-job={second['id']}]"), "1 before it")
    tile = page.locator(f"article[data-model='{CHAT}']")
    await _shows(tile, "paused")
    await _shows(tile, "interactive 2 · standard 0 · batch 1")
    await page.get_by_label("Priority").select_option("batch")
    await expect(page.locator("tr[data-job]")).to_have_count(1)
    queue.resume(CHAT)
    console.api.worker.ring()
    await _shows(page.locator("tr[data-job]"), "completed")


async def test_a_broken_stream_goes_on_where_it_was(console: Console) -> None:
    """The first answer ends in the middle of an event."""
    page = console.page
    seen: list[str | None] = []

    async def broken(route: Any) -> None:
        seen.append(route.request.headers.get("last-event-id"))
        if len(seen) > 1:
            await route.continue_()
            return
        events = [
            {"seq": 1, "type": "job.queued", "attempt": 0},
            {"seq": 2, "type": "job.in_progress", "attempt": 1},
            {"seq": 3, "type": "job.delta", "attempt": 1, "text": "one "},
        ]
        text = "".join(
            f"id: {each['seq']}\nevent: {each['type']}\ndata: {orjson.dumps(each).decode()}\n\n"
            for each in events
        )
        await route.fulfill(content_type="text/event-stream", body=text + "id: 4\ndata: {")

    await page.route("**/events", broken)
    await console.sign_in("prompt")
    await page.get_by_label("Prompt", exact=True).fill("say it")
    await page.get_by_role("button", name="Send").click()
    await _shows(page.locator(".state"), "completed")
    assert seen == [None, "3"]
    assert await page.get_by_role("log", name="Answer").text_content() == "one two three"


async def test_the_parser_of_streams(console: Console) -> None:
    """Lines that end in any way, cut anywhere; comments and unknown fields."""
    await console.sign_in()
    text = (
        ": ping\r\n\r\nid: 1\r\nevent: a\r\ndata: é\ndata:  two\rdata\n\n"
        "retry: 5\ndata: {}\n\ndata: half"
    )
    found = await console.check("parsed", text)
    wanted = [
        {"id": "1", "event": "a", "data": "é\n two\n"},
        {"id": None, "event": "message", "data": "{}"},
    ]
    assert found == [wanted] * 4


async def test_what_others_wrote_is_only_text(console: Console) -> None:
    page = console.page
    markup = "<img src=x onerror=alert(1)>"
    made = await console.job(f"fail {markup}", metadata={"<b>who</b>": markup})
    await console.sign_in()
    row = page.locator(f"tr[data-job={made['id']}]")
    await _shows(row, "failed")
    await row.get_by_role("button", name="Open").click()
    dialog = page.get_by_role("dialog")
    await _shows(dialog.locator("dd"), markup)
    await _shows(dialog.locator(".problem"), markup)
    assert await dialog.locator("img, b").count() == 0
    assert await console.check("written") == "TypeError"
    # That was the policy at work.
    await eventually(lambda: console.errors)
    assert all("TrustedHTML" in error or "Trusted" in error for error in console.errors)
    console.errors.clear()


async def test_a_webhook_from_its_making_to_a_redelivery(console: Console) -> None:
    page, receiver = console.page, console.receiver
    await console.sign_in("webhooks")
    await page.get_by_label("URL").fill("http://10.0.0.1/hook")
    await page.get_by_role("button", name="Create endpoint").click()
    await _shows(page.get_by_role("alert"), "(url)")
    assert all("400" in error for error in console.errors)
    console.errors.clear()

    await page.get_by_label("URL").fill(f"{receiver.url}/hook")
    await page.get_by_label("Name").fill("orders")
    await page.get_by_role("button", name="Create endpoint").click()
    secret = await page.locator(".secret").text_content()
    assert secret.startswith("whsec_")
    await page.get_by_role("button", name="I have stored it").click()
    assert secret not in await page.content()
    await page.reload()
    await page.get_by_role("heading", name="orders").wait_for()
    assert secret not in await page.content()

    await page.get_by_role("button", name="Send test: orders").click()
    await _shows(page.locator(".endpoint [role=status]"), "Delivered: it answered 204.")
    await page.get_by_role("button", name="Deliveries: orders").click()
    row = page.locator("tr[data-delivery]")
    await _shows(row, "delivered")
    await row.get_by_role("button", name="Redeliver").click()
    await eventually(lambda: len(receiver.got) == 2)
    assert receiver.got[0].headers["webhook-id"] == receiver.got[1].headers["webhook-id"]

    await page.get_by_role("button", name="Switch off: orders").click()
    await _shows(page.locator(".endpoint .badge"), "off")
    await page.get_by_role("button", name="Delete: orders").click()
    await page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    await _shows(page.locator(".empty"), "No endpoint is registered yet.")


async def test_usage_as_charts_and_as_tables(console: Console) -> None:
    page = console.page
    made = [await console.job(text) for text in ("a", "b", "fail out_of_memory")]
    for each in made:
        await console.api.client.get(f"/v1/jobs/{each['id']}", params={"wait": "5"})
    await console.sign_in("usage")
    await page.get_by_role("img", name="Jobs: 3 jobs in all").wait_for()
    await page.get_by_role("img", name="Tokens: 16 tokens in all").wait_for()
    assert await page.locator("svg rect.good").count() >= 1
    assert await page.locator("svg rect.bad").count() >= 1
    await _shows(page.locator(".figures"), "66.7 %")
    await page.locator("summary").first.click()
    cells = await page.locator("figure:first-child tbody td:nth-child(2)").all_text_contents()
    assert sum(int(cell) for cell in cells) == 2
    await page.get_by_label("Model").select_option(CHAT)
    await page.get_by_label("Last").select_option("168")
    await _shows(page.get_by_role("status"), "168 hours")
    assert await page.get_by_label("Model").input_value() == CHAT
    assert await page.locator("figure:first-child tbody tr").count() == 14
    await page.get_by_role("img", name="Jobs: 3 jobs in all").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_names_contrast_and_a_phones_width(console: Console, scheme: str) -> None:
    page = console.page
    await console.job("a")
    await console.job("fail worker_lost")
    await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    await page.set_viewport_size({"width": 360, "height": 740})
    await page.goto(f"{console.api.url}console")
    await page.get_by_label("API key").wait_for()
    assert await console.check("nameless") == []
    assert await console.check("faint") == []
    await console.sign_in()
    for view in VIEWS:
        await console.open(view)
        await page.wait_for_load_state("networkidle")
        assert await console.check("nameless") == [], view
        assert await console.check("faint") == [], view
        assert await console.check("tooWide") == [], view
        assert await page.locator("h1").filter(visible=True).count() == 1


async def test_by_keyboard_alone(console: Console) -> None:
    page = console.page
    await console.sign_in()
    await page.keyboard.press("Tab")
    focused = "document.activeElement.textContent"
    # The heading had the focus of a fresh page or none; links come in their order from the top.
    seen = [await page.evaluate(focused)]
    for _ in range(5):
        await page.keyboard.press("Tab")
        seen.append(await page.evaluate(focused))
    assert seen == ["Skip to content", "Jobs", "Prompt", "Webhooks", "Usage", "Sign out"]
    await page.keyboard.press("Shift+Tab")
    await page.keyboard.press("Enter")
    await page.get_by_role("heading", name="Usage").wait_for()
    assert await page.evaluate(focused) == "Usage"


async def test_an_absent_server_is_told_and_found_again(console: Console) -> None:
    page = console.page
    await console.sign_in()
    await page.locator("article").first.wait_for()
    away = asyncio.Event()

    async def drop(route: Any) -> None:
        away.set()
        await route.abort()

    await page.route("**/v1/**", drop)
    await page.get_by_label("Status").select_option("failed")
    await asyncio.wait_for(away.wait(), 5)
    await _shows(page.get_by_role("alert"), "can't be reached")
    await page.unroute("**/v1/**")
    await page.get_by_label("Status").select_option("")
    await page.get_by_role("alert").wait_for(state="hidden")
    console.errors.clear()


async def test_the_reference_opens_under_its_policy(console: Console) -> None:
    await console.page.goto(f"{console.api.url}docs")
    await console.page.get_by_text("/v1/jobs/{job_id}/events").wait_for()
