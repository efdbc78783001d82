"""The callback for Lightning, with the real library."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ssprop_fx import SparsityConfig, SparsityScheduler, bar, freeze_dropped, ssprop_compile

lightning = pytest.importorskip("lightning.pytorch", reason="the extra `lightning`")
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")

CHANNELS = 32


def loader(batches: int) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4 * batches, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(4 * batches) % 5), batch_size=4)


class Classifier(lightning.LightningModule):
    def __init__(self, scheduler: SparsityScheduler) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, CHANNELS, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36 * CHANNELS, 5)
        )
        compiled = ssprop_compile(
            self.net,
            scheduler,
            config=SparsityConfig(channel_multiple=1),
            backend="aot_eager",
            in_place=True,
        )
        self.compiled = (compiled,)  # as a module of this one it would be saved twice
        self.rows: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rows.append(int(self.net[0].weight.grad.flatten(1).any(1).sum()))


class TwoOptimizers(Classifier):
    """Two steps a batch, by hand."""

    def __init__(self, scheduler: SparsityScheduler) -> None:
        super().__init__(scheduler)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.SGD(layer.parameters(), lr=0.01) for layer in (self.net[0], self.net[3])
        ]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        pass


class Frozen(Classifier):
    """Freezes dropped rows. Lightning computes the gradients in a closure of the step."""

    def __init__(self, scheduler: SparsityScheduler) -> None:
        super().__init__(scheduler)
        self.moved: list[bool] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        freeze_dropped(optimizer, self.compiled[0])
        return optimizer

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        weight = self.net[0].weight
        self.before, self.kept = weight.detach().clone(), weight.grad.flatten(1).any(1)

    def on_train_batch_end(self, *_args: object) -> None:
        moved = (self.net[0].weight != self.before).flatten(1).any(1)
        self.moved.append(bool((moved & ~self.kept).any()))


def trainer(scheduler: SparsityScheduler, folder: Path, **flags: object) -> lightning.Trainer:
    from ssprop_fx.integrations.lightning import SsPropCallback

    every_step = lightning.callbacks.ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)
    return lightning.Trainer(
        callbacks=[every_step, SsPropCallback(scheduler)],
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **flags,
    )


def test_a_run_and_its_continuation(tmp_path: Path) -> None:
    scheduler = SparsityScheduler(bar(0.75, period=2))
    model = Classifier(scheduler)
    whole = trainer(scheduler, tmp_path, max_epochs=2, accumulate_grad_batches=2)
    whole.fit(model, loader(6))
    assert scheduler.last_step == whole.global_step == 6
    assert [rows == CHANNELS for rows in model.rows] == [True, False] * 3
    # Two batches are accumulated; each keeps a quarter of the channels.
    assert all(rows <= 2 * CHANNELS // 4 for rows in model.rows[1::2])

    again = SparsityScheduler(bar(0.75, period=2))
    continued = Classifier(again)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*step=3.ckpt")
    assert torch.load(checkpoint, weights_only=True)["state_dict"].keys() == {
        f"net.{name}" for name in ("0.weight", "0.bias", "3.weight", "3.bias")
    }
    trainer(again, tmp_path, max_epochs=2, accumulate_grad_batches=2).fit(
        continued, loader(6), ckpt_path=checkpoint
    )
    assert continued.rows == model.rows[3:]
    assert again.last_step == 6
    assert all(map(torch.equal, continued.parameters(), model.parameters()))


def test_a_step_that_the_gradient_scaler_skips_is_none(tmp_path: Path) -> None:
    scheduler = SparsityScheduler(bar(0.75, period=2))
    # The first step overflows.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-52)
    amp = lightning.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    run = trainer(scheduler, tmp_path, max_epochs=1, plugins=[amp])
    run.fit(Classifier(scheduler), loader(4))
    assert run.global_step == 4
    assert scheduler.last_step == 3


def test_several_optimizers_step_it_once_a_batch(tmp_path: Path) -> None:
    scheduler = SparsityScheduler(bar(0.75, period=2))
    trainer(scheduler, tmp_path, max_epochs=1).fit(TwoOptimizers(scheduler), loader(3))
    assert scheduler.last_step == 3


def test_frozen_rows_are_those_of_the_step_itself(tmp_path: Path) -> None:
    scheduler = SparsityScheduler(bar(0.75, period=4))
    model = Frozen(scheduler)
    trainer(scheduler, tmp_path, max_epochs=1).fit(model, loader(8))
    assert model.moved == [False] * 8


def test_an_optimizer_that_runs_no_hooks_is_refused(tmp_path: Path) -> None:
    from timm.optim import Lookahead

    class WithLookahead(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return Lookahead(super().configure_optimizers())

    scheduler = SparsityScheduler(bar(0.75, period=2))
    with pytest.raises(TypeError, match=r"^optimizer must run the hooks .* Lookahead does not"):
        trainer(scheduler, tmp_path, max_epochs=1).fit(WithLookahead(scheduler), loader(2))


def test_it_wants_a_scheduler() -> None:
    from ssprop_fx.integrations.lightning import SsPropCallback

    with pytest.raises(TypeError, match="scheduler must be a SparsityScheduler, got BarSchedule"):
        SsPropCallback(bar(0.75, period=2))
