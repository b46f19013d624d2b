"""The errors that a command reports in one line."""


class InputError(ValueError):
    """A user's mistake: a path, a flag or a file that cannot be used as given.

    Its message is one line that says what is wrong, where, and what to do; commands print it and exit with status 2.
    """


class RunStopped(RuntimeError):
    """A run with valid input that cannot continue; commands print its one line and exit with `status`."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status
