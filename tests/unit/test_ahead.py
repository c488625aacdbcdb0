"""Rollouts ahead of the trainer: order, what a checkpoint holds, failures. The collector is made up; threads are real."""

import threading
from typing import Any

import pytest

from eureka_megatron.errors import UserError
from eureka_megatron.rollout.ahead import Ahead


class Numbers:
    """A collector whose groups are numbers drawn one after the other; step 3 waits for `go`, step 5 fails."""

    def __init__(self) -> None:
        self.drawn, self.metrics, self.go = 0, dict[str, float](), threading.Event()

    def collect(self, step: int) -> list[Any]:
        if step == 3:
            assert self.go.wait(60)
        if step == 5:
            raise UserError("no engine is left")
        self.drawn += 1
        self.metrics = {"step": float(step)}
        return [self.drawn]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


def test_steps_in_turn_without_lookahead() -> None:
    collector = Numbers()
    ahead = Ahead(collector, ahead=0, steps=3)  # type: ignore[arg-type]
    assert [ahead.take(step).groups for step in range(3)] == [[1], [2], [3]]
    assert collector.drawn == 3
    assert not ahead._before, "what was there before a step goes with it"
    ahead.close()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_checkpoint_holds_what_is_ready_and_the_state_before_what_is_not(depth: int) -> None:
    collector = Numbers()
    ahead = Ahead(collector, ahead=depth, steps=6)  # type: ignore[arg-type]
    assert ahead.take(0).groups == [1]
    found = ahead.take(1)
    assert (found.groups, found.metrics) == ([2], {"step": 1.0})
    whole = ahead.state_dict(wait=depth == 1)  # with depth 2, step 3 is held up
    if depth == 1:
        assert [ready.step for ready in whole["ready"]] == [2]
        assert whole["drawn"] == 3
    found = ahead.take(2)
    assert found.groups == [3]
    held_up = ahead.state_dict(wait=False)
    assert held_up == {"drawn": 3, "ready": []}, "step 3 will be collected again, from before it"
    again = Ahead(Numbers(), ahead=depth, steps=6)  # type: ignore[arg-type]
    again._collector.go.set()  # type: ignore[attr-defined]
    again.load_state_dict(held_up)
    collector.go.set()
    assert again.take(3).groups == ahead.take(3).groups == [4]
    again.close()
    ahead.close()


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_what_was_ready_is_used_after_a_resume_at_any_depth(depth: int) -> None:
    collector = Numbers()
    ahead = Ahead(collector, ahead=1, steps=3)  # type: ignore[arg-type]
    ahead.take(0)
    state = ahead.state_dict(wait=True)
    ahead.close()
    resumed = Ahead(Numbers(), ahead=depth, steps=3)  # type: ignore[arg-type]
    resumed.load_state_dict(state)
    assert resumed.take(1).groups == [2]
    assert resumed.take(2).groups == [3]
    assert resumed.state_dict(wait=True) == {"drawn": 3, "ready": []}, "nothing beyond the last step"
    resumed.close()


def test_a_failure_is_raised_when_its_step_is_asked_for() -> None:
    collector = Numbers()
    ahead = Ahead(collector, ahead=1, steps=9)  # type: ignore[arg-type]
    ahead.take(4)
    assert ahead.state_dict(wait=True) == {"drawn": 1, "ready": []}
    with pytest.raises(UserError, match="no engine is left"):
        ahead.take(5)
    ahead.close()
