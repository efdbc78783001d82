"""Rows that several tables share."""

from typing import Any

__all__ = ["SAMPLES", "STEPS", "WEIGHT", "adaptive_rows", "core_rows", "early", "late"]

STEPS = {"schedule": "bar:rate=0.8,period=2"}
WEIGHT = {"schedule": "constant:rate=0.8", "gradients": "weight"}
SAMPLES = {"schedule": "constant:rate=0.5", "axis": "sample"}


def early(epochs: float) -> dict[str, Any]:
    """Return the flags of `epochs` sparse epochs, then dense ones."""
    return {"schedule": f"constant:rate=0.8 until {epochs:g}ep then none"}


def late(epochs: float) -> dict[str, Any]:
    """Return the flags of `epochs` dense epochs, then sparse ones."""
    return {"schedule": f"none until {epochs:g}ep then constant:rate=0.8"}


def core_rows(
    epochs: int, fewer: tuple[int, ...], narrow: dict[str, Any], dropout: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the rows that every table has.

    Args:
        epochs: epochs of the whole training.
        fewer: epochs of dense trainings that stop earlier.
        narrow: flags of a network that saves as much arithmetic as half of the steps at 0.8.
        dropout: flags of a network with dropout.
    """
    return {
        "dense": {},
        **{f"dense-{n}ep": {"epochs": n} for n in fewer},
        "steps-0.8": STEPS,
        "early-0.8": early(epochs / 2),
        "weight-0.8": WEIGHT,
        "constant-0.3": {"schedule": "constant:rate=0.3"},
        "weight-0.5": {"schedule": "constant:rate=0.5", "gradients": "weight"},
        "narrow": narrow,
        "steps-0.8-random": {**STEPS, "select": "random"},
        "samples-0.3": {**SAMPLES, "schedule": "constant:rate=0.3"},
        "samples-0.5": SAMPLES,
        "dropout": dropout,
        "dropout-steps-0.8": {**dropout, **STEPS},
    }


def adaptive_rows() -> dict[str, dict[str, Any]]:
    """Return rows whose layers all keep the same mass, at the arithmetic of a single rate.

    The budget is the cost of a backward at that rate, so the target mass is out of reach.
    """
    return {
        "steps-0.8-adaptive": {**STEPS, "controller": "kept_mass:target=0.99,budget=0.19"},
        "constant-0.3-adaptive": {
            "schedule": "constant:rate=0.3",
            "controller": "kept_mass:target=0.99,budget=0.69",
        },
    }
