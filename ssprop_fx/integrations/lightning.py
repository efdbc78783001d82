"""Lightning: a callback that steps the scheduler and keeps its state in Lightning's checkpoints."""

from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ssprop_fx.integrations.optimizer import check_hooks
from ssprop_fx.scheduling.scheduler import SparsityScheduler

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    # The same library under its old name.
    from pytorch_lightning import Callback, LightningModule, Trainer

__all__ = ["SsPropCallback"]


class SsPropCallback(Callback):  # type: ignore[misc]
    """Steps a scheduler once for each training step of Lightning's `Trainer`.

    A training step ends with a batch in which an optimizer stepped. So accumulated batches count as
    one step, and so do the steps of several optimizers in one batch. A step that a gradient scaler
    skips does not count, except with fused optimizers, which are called anyway. The scheduler's
    state is in Lightning's checkpoints, so `fit(ckpt_path=...)` continues the schedule.

    Compile the network inside the LightningModule, in place, so that names in its checkpoints do
    not change. This callback does not save the memory of `SparsityConfig(memory=...)`.

    Args:
        scheduler: the scheduler that the network was compiled with.

    Raises:
        TypeError: `scheduler` is not a SparsityScheduler.

    Examples:
        >>> from ssprop_fx import SparsityScheduler, constant, ssprop_compile
        >>> from torch import nn
        >>> scheduler = SparsityScheduler(constant(0.8))
        >>> class Classifier(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Linear(64, 64)
        ...         ssprop_compile(self.net, scheduler, in_place=True)
        >>> callbacks = [SsPropCallback(scheduler)]  # for Trainer(callbacks=callbacks, ...)
        >>> list(Classifier().state_dict())
        ['net.weight', 'net.bias']
    """

    def __init__(self, scheduler: SparsityScheduler) -> None:
        super().__init__()
        if not isinstance(scheduler, SparsityScheduler):
            raise TypeError(
                f"scheduler must be a SparsityScheduler, got {type(scheduler).__name__}"
            )
        self.scheduler = scheduler
        self._stepped = False
        self._hooks: list[RemovableHandle] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the optimizers, because Lightning also counts steps that a gradient scaler skips.

        Raises:
            TypeError: an optimizer does not run hooks.
        """
        for optimizer in trainer.optimizers:
            check_hooks(optimizer)
        self._stepped = False
        self._hooks = [o.register_step_post_hook(self._note_step) for o in trainer.optimizers]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step the scheduler if an optimizer has stepped."""
        if self._stepped:
            self._stepped = False
            self.scheduler.step()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks; Lightning calls this after an exception, too."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state for a checkpoint."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the schedule from a checkpoint."""
        self.scheduler.load_state_dict(state_dict)

    def _note_step(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._stepped = True
