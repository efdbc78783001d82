"""Random layers of every kind against the oracle."""

from layer_cases import run


def test_five_hundred_random_layers_equal_the_oracle() -> None:
    run(500)
