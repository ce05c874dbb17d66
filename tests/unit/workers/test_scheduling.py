"""How prompts share a step with answers, on transformers' scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from workers.engines.scheduling import BoundedScheduler


class Cache:
    """As much of the cache as the scheduler asks."""

    use_prefix_sharing = True
    max_blocks_per_request = 0
    max_decode_fast_path_length = 0
    read_cache_limit = None
    num_blocks = 1000
    pool = SimpleNamespace(try_to_free_sectors=lambda: None)

    def __init__(self) -> None:
        self.shared: dict[str, int] = {}
        self.looked_up: list[str] = []

    def search_prefix_match(self, request_id: str, tokens: list[int]) -> int:
        self.looked_up.append(request_id)
        return self.shared.get(request_id, 0)

    def compute_free_capacity(self) -> float:
        return 1.0

    def can_store_request_tokens(self, state: Any, length: int) -> bool:
        return True

    def count_new_complete_blocks(self, state: Any, length: int) -> int:
        return 0


class Loop:
    """Steps of the loop without a model: what was scheduled counts as done."""

    def __init__(self, *, work: float, answers: int = 0) -> None:
        self.cache = Cache()
        self.scheduler = BoundedScheduler(self.cache, 0.0, 64)
        self.scheduler.pace = SimpleNamespace(  # type: ignore[assignment]
            work=lambda: work, observe=lambda work, seconds: self.observed.append(work)
        )
        self.observed: list[float] = []
        for number in range(answers):
            self.add(f"answer {number}", 1)
        if answers:
            self.step()
            self.observed.clear()

    def add(self, name: str, tokens: int, *, shared: int = 0) -> None:
        self.cache.shared[name] = shared
        state = RequestState(request_id=name, initial_tokens=[5] * tokens, max_new_tokens=1000)
        self.scheduler.add_waiting_request(state)

    def step(self, budget: int = 512) -> dict[str, int]:
        """Tokens of each request in the next step."""
        scheduled = self.scheduler.schedule_batch(budget, 1_000_000)[0]
        taken = {}
        for future in scheduled:
            state = future.state
            taken[state.request_id] = len(state.tokens_to_process)
            state.position_offset += len(state.tokens_to_process)
            if state.status == RequestStatus.DECODING:
                state.tokens_to_process = [7]
        return taken


def _prompts(taken: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in taken.items() if not name.startswith("answer")}


def test_without_answers_a_prompt_has_the_whole_step() -> None:
    loop = Loop(work=100)
    loop.add("long", 2000)
    assert loop.step() == {"long": 512}


def test_beside_answers_its_parts_shrink_as_it_grows() -> None:
    loop = Loop(work=200, answers=3)
    loop.add("long", 6000)
    parts = []
    while left := _prompts(taken := loop.step()).get("long"):
        assert {name: taken[name] for name in taken if name != "long"} == {
            f"answer {number}": 1 for number in range(3)
        }
        parts.append(left)
        if sum(parts) == 6000:
            break
    assert sum(parts) == 6000
    assert parts[0] == 200
    assert parts[:-1] == sorted(parts[:-1], reverse=True)
    assert parts[-2] < 80


def test_a_prompt_always_gets_on() -> None:
    loop = Loop(work=0, answers=3)
    loop.add("long", 6000)
    parts = [loop.step()["long"] for _ in range(80)]
    assert parts[0] == 64
    assert parts[-1] >= 16


def test_a_short_prompt_need_not_wait_for_a_long_one() -> None:
    loop = Loop(work=200, answers=1)
    loop.add("long", 6000)
    loop.step()
    loop.add("other long", 5000)
    loop.add("short", 40)
    # The oldest has at least half, the shortest comes next, what is left is the other's.
    taken = _prompts(loop.step())
    assert taken["short"] == 40
    assert 90 <= taken["long"] <= 100
    assert 0 < taken["other long"] <= 60


def test_the_oldest_takes_what_others_leave() -> None:
    loop = Loop(work=200, answers=1)
    loop.add("long", 6000)
    loop.add("short", 10)
    assert _prompts(loop.step()) == {"long": 190, "short": 10}


def test_a_shared_beginning_is_counted_before_the_part_is_cut() -> None:
    loop = Loop(work=200, answers=1)
    loop.add("known", 7000, shared=6144)
    assert _prompts(loop.step()) == {"known": 50}
    assert loop.observed == []
    loop.step()
    assert loop.observed == [pytest.approx(50 * 4.0)]


def test_what_gets_no_part_is_not_looked_up() -> None:
    loop = Loop(work=70, answers=1)
    for number in range(20):
        loop.add(f"long {number}", 5000)
    loop.cache.looked_up.clear()
    loop.step()
    assert set(loop.cache.looked_up) == {"long 0", "long 1"}


def test_a_full_batch_takes_no_more() -> None:
    loop = Loop(work=200, answers=63)
    loop.add("a", 30)
    loop.add("b", 10)
    assert _prompts(loop.step()) == {"a": 30}


def test_only_steps_with_answers_are_learnt_from() -> None:
    loop = Loop(work=200)
    loop.add("long", 600)
    loop.step()
    loop.step()
    assert loop.observed == []
    loop.step()
    loop.step()
    assert loop.observed == [0.0]
