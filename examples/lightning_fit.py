"""Lightning: a small convolutional network on digits, with sparse epochs from a callback."""

import argparse
from collections.abc import Sequence

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from ssprop_fx import SparsityScheduler, bar, ssprop_compile
from ssprop_fx.integrations.lightning import SsPropCallback


class Classifier(lightning.LightningModule):
    """A network compiled in place, so that the names in its checkpoints do not change."""

    def __init__(self, scheduler: SparsityScheduler, args: argparse.Namespace) -> None:
        super().__init__()
        self.lr = args.lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        self.compiled = ssprop_compile(self.net, scheduler, backend=args.backend, in_place=True)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy on a batch."""
        right = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", 100 * right, batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main(argv: Sequence[str] | None = None) -> None:
    """Train and print the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of AdamW")
    parser.add_argument("--drop-rate", type=float, default=0.8, help="drop rate of sparse epochs")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "aot_eager"])
    args = parser.parse_args(argv)
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    data = random_split(TensorDataset(images, torch.tensor(digits.target)), [0.8, 0.2])
    train = DataLoader(data[0], args.batch_size, shuffle=True, drop_last=True)
    scheduler = SparsityScheduler(bar(args.drop_rate, period=2 * len(train)))
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        callbacks=[SsPropCallback(scheduler)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(Classifier(scheduler, args), train, DataLoader(data[1], len(data[1])))
    accuracy = trainer.callback_metrics["accuracy"].item()
    print(f"accuracy {accuracy:.2f} % after {scheduler.last_step} steps")


if __name__ == "__main__":
    main()
