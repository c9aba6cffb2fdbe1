"""Layers are stacked by the pattern that they repeat."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlinfer.stacks import Run, runs, stacks


@pytest.mark.parametrize(
    "kinds, want",
    [
        ("", []),
        ("d" * 32, [(0, 1, 32)]),
        ("dmmm", [(0, 1, 1), (1, 1, 3)]),
        ("ddd" + "m" * 58, [(0, 1, 3), (3, 1, 58)]),  # DeepSeek V3
        ("dmdm", [(0, 2, 2)]),
        ("sssssf" * 4 + "ss", [(0, 6, 4), (24, 1, 2)]),  # Gemma 3
        ("mmm" + "llm" * 8 + "mm", [(0, 1, 3), (3, 3, 8), (27, 1, 2)]),
        ("abcde", [(0, 5, 1)]),  # nothing repeats
    ],
)
def test_patterns(kinds, want):
    assert runs(kinds) == tuple(Run(*run) for run in want)


@given(st.lists(st.sampled_from("abc"), max_size=24), st.integers(1, 4))
def test_every_layer_has_one_place_in_order(kinds, times):
    kinds = kinds * times
    found = runs(kinds)
    assert [run.first for run in found] == [0, *(run.end for run in found)][: len(found)]
    assert (found[-1].end if found else 0) == len(kinds)
    for run in found:
        by_turns = [layer for turn in zip(*run.stacks, strict=True) for layer in turn]
        assert by_turns == list(range(run.first, run.end))
    assert all(len({kinds[layer] for layer in stack}) == 1 for stack in stacks(kinds))
    assert sorted(layer for stack in stacks(kinds) for layer in stack) == list(range(len(kinds)))


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=8), st.integers(2, 5))
def test_a_pattern_costs_no_more_programs_than_it_is_long(pattern, times):
    assert len(stacks(pattern * times)) <= len(pattern)
