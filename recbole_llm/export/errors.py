"""Errors of exports and of the service, each with the sentence that a user reads."""


class ExportError(ValueError):
    """An export cannot be read: damaged, foreign, unsafe, or written by a version that this one does not read."""


class UnknownItemError(LookupError):
    """No item, or no live item, has this id."""


class UnknownUserError(LookupError):
    """No user has this id."""
