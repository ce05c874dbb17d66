"""The webhook worker of the chaos run: the real one, with names that lead where they shouldn't."""

from __future__ import annotations

import sys

from config import logs, settings
from workers.__main__ import leave
from workers.webhooks.process import WebhookProcess

#: Stands for the internet, and for the inside.
OUTSIDE, INSIDE = "127.0.0.1", "127.0.0.2"

#: Receiver → addresses of its name at each look, in turn.
NAMES = {
    "private": [[INSIDE]],
    "metadata": [["169.254.169.254"]],
    "mixed": [[OUTSIDE, INSIDE]],
    "rebind": [[OUTSIDE], [INSIDE]],
}

_looks: dict[str, int] = {}


async def lookup(host: str) -> list[str]:
    """Answers like a name server that changes its mind at each question."""
    answers = NAMES.get(host.removesuffix(".test"))
    if answers is None:
        return [host]
    _looks[host] = _looks.get(host, -1) + 1
    return answers[_looks[host] % len(answers)]


def main() -> int:
    tree = settings.load()
    logs.configure(tree.log, process="webhooks")
    return WebhookProcess(tree, lookup=lookup).run()


if __name__ == "__main__":
    try:
        code = main()
    except settings.SettingsError as error:
        sys.stderr.write(f"{error}\n")
        code = 2
    leave(code)
