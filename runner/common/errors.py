"""The error that a user can fix."""


class UserError(ValueError):
    """Invalid user input. The message names the value, what was expected, and the remedy."""
