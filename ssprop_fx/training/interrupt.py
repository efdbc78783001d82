"""StopRequest: turns an interrupt into a request to stop after the current step."""

import signal
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopRequest"]


class StopRequest:
    """Context that records the first SIGINT or SIGTERM instead of raising; a second one raises.

    Use it in the main thread: no other thread may handle signals.

    Attributes:
        signal: number of the signal that arrived, or None.

    Examples:
        >>> with StopRequest() as stop:
        ...     signal.raise_signal(signal.SIGINT)
        >>> stop.exit_code
        130
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """Exit status of a command that the signal ended, or 0."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
