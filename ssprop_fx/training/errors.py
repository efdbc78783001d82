"""CommandError: what the user did wrong, in one line."""

__all__ = ["CommandError"]


class CommandError(Exception):
    """A mistake that the user can put right; the message is one line without a traceback.

    Args:
        message: what is wrong and what would be right.
        exit_code: exit status of the command; 2 is a usage error.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code
