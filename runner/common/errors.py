"""The exception for errors that the user can fix."""


class UserError(ValueError):
    """Raised for invalid user input. The message states the invalid value, what was expected, and the remedy."""
