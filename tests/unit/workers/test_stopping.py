"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engines.stopping import StopScanner


def _shown(stop: list[str], pieces: list[str]) -> tuple[str, bool]:
    scanner = StopScanner(stop)
    text = "".join(map(scanner.push, pieces))
    return text + ("" if scanner.stopped else scanner.finish()), scanner.stopped


@pytest.mark.parametrize(
    ("stop", "pieces", "shown", "stopped"),
    [
        ([], ["a", "b"], "ab", False),
        (["END"], ["one E", "N", "D two"], "one ", True),
        (["END"], ["one E", "N", "o"], "one ENo", False),
        (["END"], ["EEND"], "E", True),
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb", True),
        (["bcd", "b"], ["abcd"], "a", True),
        (["xyz", "yz"], ["wxy", "z"], "w", True),
        (["END"], ["EN"], "EN", False),
    ],
)
def test_text_ends_before_the_first_stop_string(
    stop: list[str], pieces: list[str], shown: str, stopped: bool
) -> None:
    assert _shown(stop, pieces) == (shown, stopped)


def test_a_possible_stop_string_is_held_back_until_it_is_none() -> None:
    scanner = StopScanner(["<end>"])
    assert scanner.push("text <e") == "text "
    assert scanner.push("n") == ""
    assert scanner.push("ough") == "<enough"


@given(
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("abc", max_size=5), max_size=10),
)
def test_pieces_do_not_matter(stop: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    ends = [text.find(each) for each in stop if each in text]
    shown, stopped = _shown(stop, pieces)
    assert stopped is bool(ends)
    # A stop string that is complete earlier wins over one that begins earlier and is not.
    if len(stop) <= 1:
        assert shown == (text[: min(ends)] if ends else text)
    assert text.startswith(shown)
    assert not any(each in shown for each in stop)
