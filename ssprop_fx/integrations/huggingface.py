"""Hugging Face: a callback that steps the scheduler and keeps its state in checkpoints."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ssprop_fx.scheduling.scheduler import SparsityScheduler

__all__ = ["SsPropCallback"]

# Our key in `TrainerState.stateful_callbacks`, which is part of each checkpoint. We fill it
# ourselves: the library would restore a new callback with a new scheduler, but no model was
# compiled with that scheduler.
_KEY = "ssprop"


class SsPropCallback(TrainerCallback):  # type: ignore[misc]
    """Steps a scheduler once for each optimizer step of `transformers.Trainer`.

    Accumulated batches count as one step. A step that a gradient scaler skips does not count,
    except with fused optimizers (Trainer's default), which are called anyway. The scheduler's
    state is in Trainer's checkpoints (`trainer_state.json`), so
    `train(resume_from_checkpoint=...)` continues the schedule.

    Compile the model in place. Trainer then sees the model itself, and names in its checkpoints do
    not change, so `from_pretrained` loads them. This callback does not save the memory of
    `SparsityConfig(memory=...)`.

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
        >>> callbacks = [SsPropCallback(scheduler)]  # for Trainer(model, callbacks=callbacks, ...)
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
        """Continue the schedule if training continues from a checkpoint."""
        if _KEY in state.stateful_callbacks:
            self.scheduler.load_state_dict(state.stateful_callbacks[_KEY])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step the scheduler, before a checkpoint of this step is written."""
        # Only Accelerate's optimizer has this attribute; any other has no gradient scaler.
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.scheduler.step()
        state.stateful_callbacks[_KEY] = self.scheduler.state_dict()
