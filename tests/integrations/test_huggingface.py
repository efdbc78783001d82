"""The callback for Hugging Face's Trainer, with the real library."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssprop_fx import SparsityConfig, SparsityScheduler, bar, ssprop_compile

transformers = pytest.importorskip("transformers", reason="the extra `transformers`")
pytest.importorskip("accelerate", reason="the extra `transformers`")

WIDTH = 32


def resnet() -> "transformers.ResNetForImageClassification":
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=WIDTH,
        hidden_sizes=[WIDTH],
        depths=[1],
        layer_type="basic",
        hidden_act="tanh",
        num_labels=5,
    )
    return transformers.ResNetForImageClassification(config)


def compiled(scheduler: SparsityScheduler) -> "transformers.ResNetForImageClassification":
    model = resnet()
    config = SparsityConfig(channel_multiple=1)
    ssprop_compile(model, scheduler, config=config, backend="aot_eager", in_place=True)
    return model


def images(number: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": torch.tensor(i % 5)}
        for i in range(number)
    ]


class Rows(transformers.TrainerCallback):
    """Records how many rows of a weight have a gradient in each step."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        weight = model.resnet.encoder.stages[0].layers[0].layer[0].convolution.weight
        self.rows.append(int(weight.grad.flatten(1).any(1).sum()))


def trainer(
    model: torch.nn.Module, scheduler: SparsityScheduler, folder: Path, **flags: object
) -> "tuple[transformers.Trainer, Rows]":
    from ssprop_fx.integrations.huggingface import SsPropCallback

    args = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        save_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **flags,
    )
    rows = Rows()
    made = transformers.Trainer(
        model,
        args,
        train_dataset=images(12),
        callbacks=[SsPropCallback(scheduler), rows],
    )
    return made, rows


@pytest.mark.slow
def test_a_run_and_its_continuation(tmp_path: Path) -> None:
    scheduler = SparsityScheduler(bar(0.75, period=2))
    model = compiled(scheduler)
    flags = {"num_train_epochs": 2, "gradient_accumulation_steps": 2}
    whole, noted = trainer(model, scheduler, tmp_path, **flags)
    whole.train()
    assert scheduler.last_step == whole.state.global_step == 6
    assert [rows == WIDTH for rows in noted.rows] == [True, False] * 3
    # Two batches are accumulated; each keeps a quarter of the channels.
    assert all(rows <= 2 * WIDTH // 4 for rows in noted.rows[1::2])

    again = SparsityScheduler(bar(0.75, period=2))
    other = compiled(again)
    continued, noted_again = trainer(other, again, tmp_path / "again", **flags)
    continued.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert noted_again.rows == noted.rows[3:]
    assert again.last_step == 6
    assert all(map(torch.equal, other.parameters(), model.parameters()))

    loaded = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "checkpoint-6")
    assert loaded.state_dict().keys() == resnet().state_dict().keys()
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))


def test_a_step_that_the_gradient_scaler_skips_is_none(tmp_path: Path) -> None:
    scheduler = SparsityScheduler(bar(0.75, period=2))
    run, _ = trainer(resnet(), scheduler, tmp_path, num_train_epochs=1, optim="adamw_torch")
    # Accelerate has one only on GPUs.
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    run.train_dataset[5]["pixel_values"][0, 0, 0] = torch.nan
    run.train()
    assert run.state.global_step == 6
    assert scheduler.last_step == 5


def test_it_wants_a_scheduler() -> None:
    from ssprop_fx.integrations.huggingface import SsPropCallback

    with pytest.raises(TypeError, match="scheduler must be a SparsityScheduler, got BarSchedule"):
        SsPropCallback(bar(0.75, period=2))


def test_the_backend_by_its_name_is_not_for_the_trainer(tmp_path: Path) -> None:
    """As docs/integrations.md says; where accelerate takes it, the page can offer it."""
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        torch_compile=True,
        torch_compile_backend="ssprop",
        report_to=[],
        use_cpu=True,
    )
    with pytest.raises(ValueError, match="'SSPROP' is not a valid DynamoBackend"):
        transformers.Trainer(resnet(), arguments)
