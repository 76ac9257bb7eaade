"""The two ways in which a command ends early."""


class UserError(Exception):
    """A mistake that the user can mend: one line that names the value and the way out; exit code
    2.
    """


class NonFiniteLossError(Exception):
    """A loss became NaN or infinite; carries the step at which it did."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss became non-finite at step {step}")
        self.step = step
