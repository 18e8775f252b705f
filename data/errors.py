"""The error that every user mistake about data raises."""


class DataError(ValueError):
    """Report a data file, column or setting that cannot be used, and what to do about it."""
