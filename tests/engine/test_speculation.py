"""When drafting goes on and when it stops, by what passes cost and what came of drafts."""

import pytest

from acttail.engine.speculation import Pace

PLAIN, SHARED = 1.0, 1.1  # seconds of a token, and of a pass over several


def rounds(pace, count, kept, seconds=SHARED, source="n-grams"):
    """So many rounds of three drafts, as an engine makes them; how many were made."""
    made = 0
    for _ in range(count):
        if not pace.keep(source, [0.5] * 3, 8):
            pace.note_pass(1, PLAIN)
            pace.note_plain()
            continue
        made += 1
        pace.note_pass(4, seconds)
        for i in range(3):
            pace.note_outcome(source, 0.5, i < kept)
            if i >= kept:
                break
        pace.note_round(source, kept + 1, seconds)
    return made


@pytest.fixture
def pace():
    found = Pace()
    for _ in range(3):
        found.note_pass(1, PLAIN)
    return found


def test_what_pays_goes_on(pace):
    assert rounds(pace, 100, kept=3) >= 95  # a plain token in 32 rounds
    assert pace.gain("n-grams") == pytest.approx(4 * PLAIN / SHARED)


def test_what_is_never_kept_is_left_and_tried_ever_more_rarely(pace):
    assert rounds(pace, 400, kept=0) < 40
    assert rounds(pace, 400, kept=0) < 10


@pytest.mark.parametrize("at", [0, 2, 5])
def test_one_round_that_the_machine_held_up_ends_nothing(pace, at):
    rounds(pace, at, kept=3)
    rounds(pace, 1, kept=3, seconds=40 * SHARED)
    assert rounds(pace, 60, kept=3) >= 55


def test_passes_that_were_measured_at_a_bad_moment_are_measured_again(pace):
    # All of the trial, and so all that is known of a pass over four.
    rounds(pace, 9, kept=3, seconds=40 * SHARED)
    assert not pace.keep("n-grams", [0.5] * 3, 8)
    assert rounds(pace, 600, kept=3) > 400


def test_a_source_that_is_tried_drafts_whatever_is_expected_of_it(pace):
    pace.note_pass(4, 40 * SHARED)
    assert pace.trying("n-grams")
    assert pace.worth("n-grams", [0.5] * 3, 8) < 0
    assert pace.keep("n-grams", [0.5] * 3, 8) == 3
    assert not Pace(fixed=3).trying("n-grams")
