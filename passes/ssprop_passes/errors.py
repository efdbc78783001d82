"""What the user sees when something goes wrong."""

__all__ = ["CaptureError", "NoEffectWarning", "SsPropCompileError"]


class SsPropCompileError(RuntimeError):
    """The sparse graph could not be compiled; the cause is chained.

    A class of its own, because some exceptions raised inside a torch.compile backend make Dynamo
    fall back to eager, that is dense, execution without a word.
    """


class NoEffectWarning(UserWarning):
    """Sparse back-propagation was asked for and nothing was made sparse."""


class CaptureError(RuntimeError):
    """A model's graphs could not be had without running it; the message is one line."""
