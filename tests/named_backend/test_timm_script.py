"""The calls of timm's train.py with `--torchcompile ssprop`, in their order, on few images.

This stands in for the script, which is in timm's repository but not in its package.
"""

import contextlib
from collections.abc import Callable

import pytest
import timm
import torch
from no_edit import kept_rows, variant
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import ModelEmaV2, ModelEmaV3, NativeScaler, dispatch_clip_grad, unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssprop_fx import report

BATCHES = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 1])) for _ in range(4)]


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSPROP_SCHEDULE", "bar:rate=0.75,period=2")
    monkeypatch.setenv("SSPROP_CHANNEL_MULTIPLE", "1")
    monkeypatch.setenv("SSPROP_BACKEND", "aot_eager")


def create_model() -> nn.Module:
    model: nn.Module = timm.create_model(
        "test_resnet", num_classes=3, drop_path_rate=0.1, zero_init_last=False
    )
    return model.to(memory_format=torch.channels_last)


def train_one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    forward: Callable[[Tensor, Tensor], Tensor],
    after_update: Callable[[], None],
    scaler: NativeScaler | None = None,
    accumulation: int = 1,
) -> None:
    model.train()
    optimizer.zero_grad()
    for index, (images, target) in enumerate(BATCHES):
        need_update = (index + 1) % accumulation == 0
        has_sync = not hasattr(model, "no_sync") or need_update
        with contextlib.nullcontext() if has_sync else model.no_sync():
            value = forward(images.contiguous(memory_format=torch.channels_last), target)
            value = value / accumulation
            parameters = model_parameters(model, exclude_head=False)
            if scaler is not None:
                scaler(
                    value,
                    optimizer,
                    clip_grad=1.0,
                    clip_mode="norm",
                    parameters=parameters,
                    create_graph=False,
                    need_update=need_update,
                )
            else:
                value.backward(create_graph=False)
                if need_update:
                    dispatch_clip_grad(parameters, value=1.0, mode="norm")
                    optimizer.step()
        if need_update:
            after_update()
            optimizer.zero_grad()


@pytest.mark.parametrize(
    ("is_scaled", "accumulation"),
    [
        pytest.param(False, 1, id="bfloat16-1"),
        pytest.param(True, 2, id="float16-2", marks=pytest.mark.slow),
        pytest.param(False, 2, id="bfloat16-2", marks=pytest.mark.slow),
        pytest.param(True, 1, id="float16-1", marks=pytest.mark.slow),
    ],
)
def test_a_run(is_scaled: bool, accumulation: int) -> None:
    original = create_model()
    optimizer = create_optimizer_v2(original, opt="lookahead_adamw", lr=1e-3, weight_decay=0.05)
    scaler = NativeScaler(device="cpu") if is_scaled else None
    if scaler is not None:
        # The default first scale skips steps.
        scaler._scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    ema = ModelEmaV3(original, decay=0.5)
    model = torch.compile(original, backend="ssprop", mode=None)
    ema_compiled = torch.compile(ema, backend="ssprop", mode=None)
    updates = len(BATCHES) // accumulation
    lr_scheduler, _ = create_scheduler_v2(optimizer, num_epochs=2, updates_per_epoch=updates)
    criterion = LabelSmoothingCrossEntropy(smoothing=0.1)
    rows: list[int] = []

    def forward(images: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16 if is_scaled else torch.bfloat16):
            output = model(images)
            return criterion(output, target)

    def after_update() -> None:
        rows.append(kept_rows(original.layer4[0].conv1.weight))
        ema.update(model)

    for epoch in range(2):
        train_one_epoch(model, optimizer, forward, after_update, scaler, accumulation)
        for evaluated in (model, ema_compiled):
            evaluated.eval()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                assert evaluated(BATCHES[0][0]).shape == (4, 3)
        lr_scheduler.step(epoch + 1)

    assert variant(original).scheduler.last_step == 2 * updates
    channels = len(original.layer4[0].conv1.weight)
    assert len(rows) == 2 * updates
    assert all(row == channels for row in rows[::2]), "dense steps"
    assert all(row <= accumulation * channels // 4 for row in rows[1::2]), "sparse steps"
    assert unwrap_model(model).state_dict().keys() == create_model().state_dict().keys()
    reasons = {site.name: site.reason for site in report(model).sites}
    assert reasons["fc"] == "the classifier"
    assert reasons["layer4.0.conv1"] == ""


@pytest.mark.parametrize(
    "order", [pytest.param("ddp first", marks=pytest.mark.slow), "compile first", "task"]
)
@pytest.mark.usefixtures("process_group")
def test_distributed(order: str) -> None:
    original = create_model()
    optimizer = create_optimizer_v2(original, opt="sgd", lr=0.01)
    ema = ModelEmaV2(original, decay=0.5)
    if order == "task":
        task = ClassificationTask(original, criterion=nn.CrossEntropyLoss(), verbose=False)
        task.compile(backend="ssprop", mode=None)
        task.prepare_distributed()
        model: nn.Module = task

        def forward(images: Tensor, target: Tensor) -> Tensor:
            return task(images, target)["loss"]

    else:
        if order == "ddp first":
            model = torch.compile(DistributedDataParallel(original), backend="ssprop")
        else:
            model = DistributedDataParallel(torch.compile(original, backend="ssprop"))

        def forward(images: Tensor, target: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model(images), target)

    rows: list[int] = []

    def after_update() -> None:
        rows.append(kept_rows(original.layer4[0].conv1.weight))
        ema.update(unwrap_model(model) if order != "task" else original)

    train_one_epoch(model, optimizer, forward, after_update)
    channels = len(original.layer4[0].conv1.weight)
    assert rows == [channels, channels // 4] * 2
    assert variant(original).scheduler.last_step == len(BATCHES)
