"""The two ways a run can end badly that are the user's to know about, and nothing else.

Any other exception is a bug of the library and keeps its traceback.
"""


class InputError(ValueError):
    """A setting, file or folder that cannot be used: one line that names it, what is wrong and what to do."""

    exit_code = 2


class NumericalError(ArithmeticError):
    """A run that failed by its numbers (a NaN or infinite loss): one line that says where and what is kept."""

    exit_code = 3
