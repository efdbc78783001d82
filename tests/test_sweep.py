"""Every timm module against the oracle; `python tests/support/sweep.py` does the same in
parallel."""

from importlib.util import find_spec

import pytest
import timm
from sweep import MODELS, SKIPPED, TOLERANCE, check_apart


def test_the_table_names_every_timm_module_and_only_models_that_exist() -> None:
    # Without modules that other packages register, as the study does.
    modules = {name for name in timm.list_modules() if find_spec(f"timm.models.{name}")}
    assert set(MODELS) | set(SKIPPED) == modules
    for module, names in MODELS.items():
        assert names
        assert set(names) <= set(timm.list_models(module=module))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for names in MODELS.values() for name in names])
def test_gradients_equal_the_oracle(name: str) -> None:
    row = check_apart(name)
    assert not row.failure
    assert row.error < TOLERANCE
    assert row.kinds
