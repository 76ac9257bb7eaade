"""The exceptions of the library."""


class UserError(Exception):
    """An error that the user can fix: one line with the value and the remedy; exit code 2."""


class NonFiniteLossError(Exception):
    """A loss became NaN or infinite at `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss became non-finite at step {step}")
        self.step = step
