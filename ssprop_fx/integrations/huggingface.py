"""Hugging Face: a callback that steps the scheduler and keeps its state in checkpoints."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ssprop_fx.scheduling.scheduler import SparsityScheduler

__all__ = ["SsPropCallback"]

# Of `TrainerState.stateful_callbacks`, which is part of each checkpoint. The library's own way of
# filling it is no way for us: it makes a callback anew from what is saved, and so a scheduler that
# no model was compiled with.
_KEY = "ssprop"


class SsPropCallback(TrainerCallback):  # type: ignore[misc]
    """Steps a scheduler once an optimizer step of `transformers.Trainer`.

    Accumulated batches are one step, and a step that a gradient scaler skips is none (but for
    fused optimizers, Trainer's default, which are called all the same). The scheduler's state is
    in Trainer's checkpoints (`trainer_state.json`), so `train(resume_from_checkpoint=...)`
    continues the schedule.

    Compile the model in place: Trainer then sees the model itself, and the names in its
    checkpoints stay as they are, so that `from_pretrained` loads them. What
    `SparsityConfig(memory=...)` keeps is not saved here.

    Args:
        scheduler: the scheduler that the model was compiled with.

    Raises:
        TypeError: `scheduler` is not a SparsityScheduler.

    Examples:
        >>> from ssprop_fx import SparsityScheduler, constant, ssprop_compile
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> model = ViTForImageClassification(ViTConfig(num_hidden_layers=1, hidden_size=48))
        >>> scheduler = SparsityScheduler(constant(0.8))
        >>> compiled = ssprop_compile(model, scheduler, in_place=True)
        >>> callbacks = [SsPropCallback(scheduler)]  # of Trainer(model, callbacks=callbacks, ...)
    """

    def __init__(self, scheduler: SparsityScheduler) -> None:
        if not isinstance(scheduler, SparsityScheduler):
            raise TypeError(
                f"scheduler must be a SparsityScheduler, got {type(scheduler).__name__}"
            )
        self.scheduler = scheduler

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Continue the schedule, if training continues from a checkpoint."""
        if _KEY in state.stateful_callbacks:
            self.scheduler.load_state_dict(state.stateful_callbacks[_KEY])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step the scheduler, before a checkpoint of this step is written."""
        # Accelerate's optimizer says so; any other has no gradient scaler.
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.scheduler.step()
        state.stateful_callbacks[_KEY] = self.scheduler.state_dict()
