"""The type of every error that a user can mend."""


class LatentMASError(ValueError):
    """An input, a file or a setting that is not supported. The message says what was got, what is supported, and what to do.

    The command line prints it as one line and the server answers with it; any other exception is a bug and keeps its traceback.
    """
