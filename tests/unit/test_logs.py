"""Log lines: JSON, context bound, nothing private, nothing forged."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from config import logs
from config.settings import Log


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def _lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_carries_process_and_context(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Log(format="json"), process="api")
    with structlog.contextvars.bound_contextvars(request_id="req_1", tenant="ten_1"):
        logs.get_logger("t").info("job_accepted", job_id="job_1")
    logging.getLogger("foreign").warning("said %s", "this")
    mine, foreign = _lines(capsys)
    assert mine["event"] == "job_accepted"
    assert (mine["process"], mine["request_id"], mine["tenant"]) == ("api", "req_1", "ten_1")
    assert (foreign["event"], foreign["process"]) == ("said this", "api")


def test_content_and_credentials_are_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Log(format="json"), process="api")
    logs.get_logger("t").info("odd", prompt="my secret", authorization="Bearer x", output="so")
    (line,) = _lines(capsys)
    assert line["prompt"] == line["authorization"] == line["output"] == "[redacted]"


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_value_can_t_forge_a_line(form, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Log(format=form), process="api")
    logs.get_logger("t").info("odd", path="a\r\nINFO forged\x1b[2J")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_level_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Log(format="json", level="warning"), process="api")
    logs.get_logger("t").info("quiet")
    assert _lines(capsys) == []


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_traceback_shows_no_values(form, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Log(format=form), process="api")

    def run(prompt: str) -> None:
        raise RuntimeError("the engine broke")

    try:
        run("my secret" * 2)
    except RuntimeError as error:
        logs.get_logger("t").error("run_crashed", exc_info=error)
    shown = capsys.readouterr().err
    assert "the engine broke" in shown
    assert "my secretmy secret" not in shown
