"""The error that every mistake about a model's sizes or its input raises."""


class ModelError(ValueError):
    """Report a model setting or a batch that the model cannot use, and what to do about it."""
