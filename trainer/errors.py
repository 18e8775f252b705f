"""Errors that a user can cause; the command line prints them without a traceback and exits with code 2."""


class UserError(ValueError):
    """Report something the user asked for that cannot be done, where it was asked, and what is allowed."""


class ConfigError(UserError):
    """Report one or several mistakes in a run's configuration."""


class CheckpointError(UserError):
    """Report a checkpoint that was asked for and cannot be used."""
