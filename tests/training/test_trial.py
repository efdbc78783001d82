"""A model that cannot train on the images of a run is one line."""

import pytest
import timm
import torch
from torch import nn
from training_runs import TINY

from ssprop_fx.cli.app import main
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.errors import CommandError
from ssprop_fx.training.trial import check_model


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--model", "test_vit", "--img-size", "33"],
            "--model test_vit cannot train on images of 3x33x33 (--img-size 33): Input height",
        ),
        (
            ["--model", "inception_v3", "--img-size", "32"],
            "--model inception_v3 cannot train on images of 3x32x32 (--img-size 32): ",
        ),
        (
            ["-b", "1"],
            "--batch-size 1: test_resnet cannot train on one image: Expected more than 1 value",
        ),
        (
            [*("--model", "inception_v3", "--img-size", "299"), "--model-kwargs", "aux_logits=1"],
            "--model inception_v3 returns a tuple in training, and the trainer needs one tensor",
        ),
        (
            ["--model-kwargs", "num_classes=3"],
            "--model test_resnet returns [2, 3] for 2 images, and the trainer needs [2, 10]",
        ),
        (["--model-kwargs", "block=3"], "--model test_resnet"),
    ],
)
def test_a_model_that_does_not_fit_is_one_line(flags, message, tmp_path, capsys):
    assert main([*TINY, *flags, "--output", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


class _ReadsValues(nn.Module):
    """Runs with real tensors alone."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, images):
        means = self.norm(images.mean(dim=(2, 3)))
        return means if float(means.sum()) < 1e6 else None


def test_the_trial_leaves_the_model_and_the_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(())
    resnet = timm.create_model("test_resnet", num_classes=3, drop_path_rate=0.1).eval()
    for model in (resnet, _ReadsValues().eval()):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        torch.manual_seed(0)
        check_model(TrainConfig(batch_size=2), model, (3, 32, 32), 3)
        assert torch.rand(()) == expected
        assert not model.training
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(CommandError, match=r"returns \[2, 3\] for 2 images"):
        check_model(TrainConfig(batch_size=2), _ReadsValues(), (3, 32, 32), 4)
