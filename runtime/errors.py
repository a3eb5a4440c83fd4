"""The error that ends a run for a reason outside of the program. Imports nothing."""


class RunError(ValueError):
    """Ends a run for a reason that is no fault of the program.

    The message is one sentence, with the file and the cure.
    """
