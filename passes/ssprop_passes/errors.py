"""Errors and warnings that users see."""

__all__ = ["CaptureError", "NoEffectWarning", "SsPropCompileError"]


class SsPropCompileError(RuntimeError):
    """The sparse graph could not be compiled; the cause is chained.

    This is a separate class because some exceptions raised inside a torch.compile backend make
    Dynamo silently fall back to eager, that is dense, execution.
    """


class NoEffectWarning(UserWarning):
    """Sparse back-propagation was requested, but nothing became sparse."""


class CaptureError(RuntimeError):
    """A model's graphs could not be captured without running it; the message is one line."""
