"""A page of the console as a tenant drives it, and looks at what it shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.apiserver import Api, job
from tests.webhooklab import Receiver

KEY: Final = "a"
CHECKS: Final = Path(__file__).with_name("checks.js").read_text()


@dataclass
class Console:
    """A page on a running API, and what it logged."""

    page: Any
    api: Api
    receiver: Receiver
    #: Errors and warnings that the page may not have; a test that wants one takes it out.
    errors: list[str] = field(default_factory=list)
    #: Every request: method, address, headers.
    requests: list[Any] = field(default_factory=list)

    async def sign_in(self, view: str = "jobs") -> None:
        """Past the form: what it does has a test of its own."""
        # Another view of the same page would not load it anew.
        await self.page.goto("about:blank")
        await self.page.add_init_script(f"sessionStorage.setItem('forebay-key', '{KEY}')")
        await self.open(view)

    async def open(self, view: str) -> None:
        await self.page.goto(f"{self.api.url}console#{view}")
        await self.page.locator(f"nav a[aria-current][href='#{view}']").wait_for()

    async def check(self, name: str, argument: Any = None) -> Any:
        """The value of a function in checks.js."""
        return await self.page.evaluate(f"(given) => {CHECKS.rstrip()}.{name}(given)", argument)

    async def job(self, prompt: str, **changes: Any) -> dict[str, Any]:
        """Submit one beside the page."""
        body = job(prompt, body={"stream": True}, **changes)
        response = await self.api.client.post("/v1/jobs", json=body)
        assert response.status == 202, await response.text()
        made: dict[str, Any] = await response.json()
        return made
