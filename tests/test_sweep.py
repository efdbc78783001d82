"""Every timm module against the oracle; `python tests/support/sweep.py` does the same in
parallel."""

from importlib.util import find_spec

import pytest
import timm
from sweep import LOOSE, REFUSED, SAMPLES_TOLERANCE, TOLERANCE, check_apart
from sweep_models import MODELS, SKIPPED

NAMES = [name for names in MODELS.values() for name in names]


def test_the_table_names_every_timm_module_and_only_models_that_exist() -> None:
    # Without modules that other packages register, as the study does.
    modules = {name for name in timm.list_modules() if find_spec(f"timm.models.{name}")}
    assert set(MODELS) | set(SKIPPED) == modules
    for module, names in MODELS.items():
        assert names
        assert set(names) <= set(timm.list_models(module=module))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_the_oracle(name: str) -> None:
    row = check_apart(name, "channel")
    assert not row.failure
    assert row.error < TOLERANCE
    assert row.kinds


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_the_kept_samples_equal_the_reference(name: str) -> None:
    row = check_apart(name, "sample")
    if name in REFUSED:
        assert REFUSED[name] in row.failure
        return
    assert not row.failure
    assert row.error < LOOSE.get(name, SAMPLES_TOLERANCE)
