"""What the documents list is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from api.cli.fleet.metrics import FleetMetrics
from api.errors import CODES
from api.metrics import Metrics, _families
from broker.stats import QueueStats
from workers.device_metrics import DeviceMetrics
from workers.metrics import WorkerMetrics
from workers.webhooks.metrics import WebhookMetrics

ROOT = Path(__file__).parents[2]


def _rows(name: str) -> list[list[str]]:
    lines = (ROOT / "docs" / name).read_text().splitlines()
    return [
        [cell.strip().strip("`") for cell in line.strip("|").split(" | ")]
        for line in lines
        if line.startswith("| `")
    ]


def test_errors() -> None:
    assert [(row[0], int(row[1]), row[2], row[3]) for row in _rows("errors.md")] == [
        (code, entry.status, entry.type, "yes" if entry.retryable else "no")
        for code, entry in CODES.items()
    ]


def test_metrics() -> None:
    api, workers = CollectorRegistry(), CollectorRegistry()
    Metrics(api)
    WorkerMetrics("model", "engine", workers)
    WebhookMetrics(workers)
    DeviceMetrics("", registry=workers)
    FleetMetrics(workers)
    stats = QueueStats(queue="model", bands=(), delayed=0, in_flight=0, dead=0)
    families = [*api.collect(), *workers.collect(), *_families([stats], [])]
    found = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert {row[0] for row in _rows("metrics.md")} == found


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md"))),
    ],
)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_keys_of_the_queue_in_architecture() -> None:
    """The table of keys names each suffix that the scripts use."""
    header = (ROOT / "broker/lua/_keys.lua").read_text()
    scripts = "".join(path.read_text() for path in (ROOT / "broker/lua").glob("*.lua"))
    used = {match.split(":")[0] for match in re.findall(r"base \.\. '([a-z_:]+)'", scripts)}
    assert "V:<band>" in header
    table = (ROOT / "docs/architecture.md").read_text().partition("Beside the queues")[0]
    listed = {
        name.split(":")[0]
        for row in re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", row)
    }
    assert used <= listed, used - listed


def test_guarantees_name_tests_that_exist() -> None:
    text = (ROOT / "docs/guarantees.md").read_text()
    named = re.findall(r"\[`(test_\w+)`\]\(\.\./(tests/[\w/]+\.py)\)", text)
    assert len(named) == text.count("[`test_")
    for test, path in named:
        assert re.search(rf"def {test}\(", (ROOT / path).read_text()), f"{path} has no {test}"
