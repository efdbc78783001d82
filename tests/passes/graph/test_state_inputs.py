"""StateInputs: `pack` and `split` use the same order of a graph's state."""

import pytest
from ssprop_passes.graph.state_inputs import StateInputs

FORMS = [
    StateInputs(),
    StateInputs(table="table"),
    StateInputs(keep_counts="counts"),
    StateInputs(memories=("m0", "m1")),
    StateInputs(table="table", memories=("m0",), keep_counts="counts"),
]


@pytest.mark.parametrize("state", FORMS, ids=str)
def test_split_finds_what_pack_appended(state: StateInputs[str]) -> None:
    own = ["x", "weight"]
    assert state.split([*own, *state.pack()]) == (own, state)


def test_the_order_is_table_memories_keep_counts() -> None:
    assert FORMS[-1].pack() == ["table", "m0", "counts"]


def test_too_few_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="must end with 3 state inputs, got 2"):
        FORMS[-1].split(["a", "b"])
