"""When a rank knows that what it has sent has arrived."""

from __future__ import annotations

from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.schedules.actions import Action, Link, Receive, Send
from meshwright.compiler.schedules.settled import settled

F, B = Phase.FORWARD, Phase.BACKWARD
DOWN, UP, ON = Link(0, F, 1, F), Link(1, B, 0, B), Link(1, F, 2, F)


def test_a_gradient_tells_that_the_activations_before_it_have_arrived() -> None:
    first = [
        *(each for i in (0, 1) for each in (Action(F, 0, i), Send(DOWN, i, 1))),
        *(each for i in (0, 1) for each in (Receive(UP, i, 1), Action(B, 0, i))),
    ]
    second = [
        *(Receive(DOWN, i, 0) for i in (0, 1)),
        *(each for i in (0, 1) for each in (Action(F, 1, i), Action(B, 1, i), Send(UP, i, 0))),
    ]
    # Gradient 0 is sent before activation 1 is taken, and nothing tells of the gradients.
    assert settled([first, second]) == ({5: (1,), 7: (3,)}, {})


def test_one_value_tells_of_all_that_was_sent_before_it() -> None:
    first = [
        *(each for i in (0, 1) for each in (Action(F, 0, i), Send(DOWN, i, 1))),
        *(Receive(UP, 1, 1), Action(B, 0, 1)),
    ]
    second = [
        *(each for i in (0, 1) for each in (Receive(DOWN, i, 0), Action(F, 1, i))),
        *(Action(B, 1, 1), Send(UP, 1, 0)),
    ]
    assert settled([first, second]) == ({5: (1, 3)}, {})


def test_what_others_have_passed_on_tells_too() -> None:
    back = Link(2, F, 0, B)
    first = [Action(F, 0), Send(DOWN, 0, 1), Receive(back, 0, 2), Action(B, 0)]
    second = [Receive(DOWN, 0, 0), Action(F, 1), Send(ON, 0, 2)]
    third = [Receive(ON, 0, 1), Action(F, 2), Send(back, 0, 0)]
    assert settled([first, second, third]) == ({3: (1,)}, {}, {})


def test_ranks_that_wait_for_ever_know_nothing() -> None:
    first = [Receive(UP, 0, 1), Action(B, 0), Send(DOWN, 0, 1)]
    second = [Receive(DOWN, 0, 0), Action(F, 1), Send(UP, 0, 0)]
    assert settled([first, second]) == ({}, {})
