"""Tables, numbers, progress, and the command as a whole."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from api.cli import COMMANDS, main
from api.cli.console import duration, percentile, print_table, show
from api.cli.demo_figures import Run, batch_steps, cosine, mean_batch, nearest, tenant_row
from api.cli.failures import CommandError
from api.cli.jobs import clock
from api.cli.pulling import PullError, progress_bars, pull
from api.cli.queues import to_json
from api.cli.submit import StreamedText
from api.client import JobEvent
from broker.jobs import BANDS
from broker.stats import BandStats, QueueStats, TenantStats


# -- numbers and tables ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (None, "-"),
        (0, "0 ms"),
        (340.4, "340 ms"),
        (2_140, "2.1 s"),
        (302_000, "5 min 02 s"),
        (11_400_000, "3 h 10 min"),
    ],
)
def test_durations(milliseconds: float | None, text: str) -> None:
    assert duration(milliseconds) == text


def test_percentiles_are_values_that_were_measured() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile(list(range(1, 101)), 0.95) == 95
    assert percentile([7], 0.95) == 7


def test_cells_cannot_drive_the_terminal() -> None:
    assert show("\x1b[2J") == "\\x1b[2J"
    assert show(None) == "-"
    assert show(1.25) == "1.2"


def test_a_table_on_a_pipe_is_not_folded(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("Name", "Count>"), [("x" * 120, 1), ("[red]y[/red]", 22)], empty="none")
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["Name", "Count"]
    assert first.split() == ["x" * 120, "1"]
    assert second.split() == ["[red]y[/red]", "22"]
    print_table(("Name",), [], empty="none")
    assert capsys.readouterr().out == "none\n"


def test_times_of_jobs() -> None:
    assert clock(None) == "-"
    assert clock(0) == "-"
    assert clock(1_700_000_000).startswith("2023-11-1")


def test_a_queue_as_json_has_depth_and_names() -> None:
    stats = QueueStats(
        queue="q",
        bands=tuple(BandStats(band=band, depth=2, oldest_ms=5) for band in BANDS),
        delayed=1,
        in_flight=3,
        dead=0,
        top_tenants=(TenantStats(tenant="ten_1", queued=4, in_flight=1),),
    )
    document = json.loads(json.dumps(to_json(stats, {"ten_1": "acme"})))
    assert document["depth"] == 6
    assert document["bands"][0] == {"band": "interactive", "depth": 2, "oldest_ms": 5}
    assert document["top_tenants"][0]["name"] == "acme"


# -- the text of a stream -------------------------------------------------------------------------
def event(kind: str, text: str = "", attempt: int = 1) -> JobEvent:
    return JobEvent(seq=1, type=kind, attempt=attempt, text=text)


def test_a_stream_is_shown_once_whatever_happens() -> None:
    shown = StreamedText()
    assert shown.take(event("job.delta", "one ")) == "one "
    # A resume that came too late brings all text so far.
    assert shown.take(event("job.snapshot", "one two ")) == "two "
    assert shown.take(event("job.delta", "three")) == "three"
    assert shown.take(event("job.requeued")) == "\n"
    assert shown.take(event("job.delta", "uno")) == "uno"
    assert shown.take(event("job.snapshot", "due")) == "\ndue"
    assert shown.take(event("job.completed")) == ""
    assert shown.text == "due"


# -- figures of the demo --------------------------------------------------------------------------
def run(start: float, end: float, **more: float) -> Run:
    made = Run("t", submitted=0.0, started=start, ended=end, status="done")
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_mean_batch_is_an_average_over_time() -> None:
    long, short = run(0, 10), run(0, 5)
    assert mean_batch(long, [long, short]) == pytest.approx(1.5)
    assert mean_batch(short, [long, short]) == pytest.approx(2)
    assert mean_batch(Run("t", 0.0), [long]) is None


def test_a_row_of_the_table() -> None:
    runs = [
        run(1, 3, queue_ms=1000, first_text=1.5, output_tokens=20),
        run(2, 4, queue_ms=2000, first_text=2.5, output_tokens=20),
    ]
    row = tenant_row("acme", runs, runs)
    assert row == ("acme", "2", "1.0 s", "2.0 s", "1.5 s", "10.0", "1.5")
    assert tenant_row("none", [], runs) == ("none", "0", "-", "-", "-", "-", "-")


def test_steps_are_read_from_the_metrics() -> None:
    text = (
        "# HELP forebay_workers_batch_requests Requests in an engine step.\n"
        'forebay_workers_batch_requests_sum{engine="simulated",model="m"} 30.0\n'
        'forebay_workers_batch_requests_count{engine="simulated",model="m"} 10.0\n'
        'forebay_workers_batch_requests_sum{engine="simulated",model="other"} 99.0\n'
        'forebay_workers_batch_requests_bucket{engine="simulated",le="1.0",model="m"} 7.0\n'
    )
    assert batch_steps(text, "m") == (30.0, 10.0)


def test_the_nearest_sentence() -> None:
    assert cosine([1, 0], [0, 0]) == 0
    found = nearest([[1, 0], [0.9, 0.1], [0, 1]])
    assert [best for best, _ in found.values()] == [1, 0, 1]


# -- fetching models ------------------------------------------------------------------------------
def fetch(code: str) -> list[tuple[str, str, float]]:
    seen: list[tuple[str, str, float]] = []
    asyncio.run(
        pull(
            ["m"],
            {},
            report=lambda *step: seen.append(step),
            command=(sys.executable, "-c", code),
        )
    )
    return seen


def test_progress_lines_are_reported_and_others_ignored() -> None:
    line = json.dumps({"model": "m", "stage": "download", "fraction": 0.5})
    assert fetch(f"print('noise'); print('{line}')") == [("m", "download", 0.5)]


def test_a_failed_fetch_says_why() -> None:
    with pytest.raises(PullError, match=r"^no such package$"):
        fetch("import sys; print('x\\nno such package', file=sys.stderr); sys.exit(1)")
    with pytest.raises(PullError, match="status 3"):
        fetch("raise SystemExit(3)")


def test_progress_on_a_pipe_is_a_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars() as report:
        report("m", "download", 0.0)
        report("m", "download", 0.5)
        report("m", "ready", 1.0)
    assert capsys.readouterr().err == "m: download\nm: ready\n"


# -- the command ----------------------------------------------------------------------------------
def test_help_names_every_command_and_imports_none() -> None:
    code = (
        "import sys; from api.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'celery', 'aiohttp', 'sqlalchemy', 'redis'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"  {name} " in done.stdout


def test_every_command_explains_itself_without_torch_or_celery() -> None:
    code = (
        "import sys; from api.cli import main\n"
        "for name in sys.argv[1:]:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as end:\n"
        "        if end.code: raise\n"
        "    heavy = {'torch', 'celery'} & set(sys.modules)\n"
        "    if heavy: sys.exit(f'{name} imported {heavy}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *COMMANDS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert re.search(rf"^Usage: .* {name}\b", done.stdout, re.MULTILINE), name


def test_known_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner()
    monkeypatch.setenv("FOREBAY_API__PORT", "http")
    done = runner.invoke(main, ["queues"])
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: FOREBAY_API__PORT='http'")
    assert len(done.stderr.splitlines()) == 1
    monkeypatch.setenv("FOREBAY_API__PORT", "1")
    monkeypatch.setenv("FOREBAY_REDIS__URL", "redis://127.0.0.1:1/0")
    done = runner.invoke(main, ["queues"])
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    done = runner.invoke(main, ["submit", "x", "--api", "http://127.0.0.1:1", "--model", "m"])
    assert done.exit_code == 2
    assert "no API key" in done.stderr
    assert runner.invoke(main, ["nonsense"]).exit_code == 2


def test_a_message_of_many_lines_becomes_one() -> None:
    assert CommandError("a\n  b").message == "a b"
