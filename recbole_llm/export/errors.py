"""Errors of exports and of the service, each with the sentence that a user reads."""


class ExportError(ValueError):
    """An export cannot be read: damaged, foreign, unsafe, or written by a version that this one does not read."""


class UnknownItemError(LookupError):
    """No item, or no live item, has this id."""


class UnknownUserError(LookupError):
    """No user has this id."""


NO_PROFILES = (
    "profile: this model has no map for what is written about a user. Ask by items that the user likes; or train with "
    "user_tower: history+text, a .user file and an encoder, and where validation gives the learned block no weight with "
    "blocks: learned; then export again."
)
