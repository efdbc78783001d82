"""Small training runs for the tests of `ssprop-fx train`."""

import csv

import torch

STEPS_PER_EPOCH = 11
# Digits; an epoch takes two seconds.
TINY = [
    *("train", "--model", "test_resnet", "--img-size", "32", "-b", "128", "--device", "cpu"),
    *("--compile-backend", "aot_eager", "--channel-multiple", "8", "--min-channels", "16"),
]
# One dense and one sparse epoch; drop path uses the random generators.
TWO_PHASES = [*TINY, "--epochs", "2", "--drop-path", "0.1", "--telemetry"]


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def content(path):
    return torch.load(path, weights_only=True)


def is_equal(left, right):
    """Return whether two parts of checkpoints are equal bit for bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(is_equal(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(is_equal, left, right))
    return left == right


def assert_same_run(left, right, but=()):
    """Assert that two folders hold the same weights and rows, except times and `but`."""
    whole, other = content(left / "last.pt"), content(right / "last.pt")
    own = {"config", "seconds", "gpu_joules", "cpu_joules", *but}  # measured or named, not computed
    assert whole.keys() == other.keys()
    differing = [key for key in whole if key not in own and not is_equal(whole[key], other[key])]
    assert differing == []
    for file, columns in (
        ("steps.csv", ("step", "epoch", "loss", "drop_rate", "backward_saved", "lr")),
        ("summary.csv", ("epoch", "train_loss", "eval_loss", "eval_top1")),
    ):
        for one, two in zip(rows(left / file), rows(right / file), strict=True):
            assert [one[key] for key in columns] == [two[key] for key in columns]
