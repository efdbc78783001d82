"""Hugging Face: a small vision transformer on digits, with sparse epochs from a callback."""

import argparse
import tempfile
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from ssprop_fx import SparsityScheduler, bar, ssprop_compile
from ssprop_fx.integrations.huggingface import SsPropCallback


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, load, and print the accuracy of the loaded model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--drop-rate", type=float, default=0.8, help="drop rate of sparse epochs")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "aot_eager"])
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    classes = torch.tensor(digits.target)
    order = torch.randperm(len(images)).tolist()
    split = len(order) * 4 // 5
    train = [{"pixel_values": images[i], "labels": classes[i]} for i in order[:split]]
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=args.width,
        intermediate_size=2 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_labels=10,
    )
    scheduler = SparsityScheduler(bar(args.drop_rate, period=2 * (split // args.batch_size)))
    model = ViTForImageClassification(config)
    # In place, so that Trainer sees the model itself and saves its weights under their own names.
    ssprop_compile(model, scheduler, backend=args.backend, in_place=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            dataloader_drop_last=True,
            learning_rate=args.lr,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model, arguments, train_dataset=train, callbacks=[SsPropCallback(scheduler)]
        )
        trainer.train()
        trainer.save_model(folder)
        loaded = ViTForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        right = loaded(images[order[split:]]).logits.argmax(1) == classes[order[split:]]
    accuracy = 100 * right.float().mean().item()
    print(f"accuracy {accuracy:.2f} % after {scheduler.last_step} steps")


if __name__ == "__main__":
    main()
