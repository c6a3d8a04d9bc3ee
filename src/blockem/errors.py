"""The exceptions that a user is meant to read."""


class BlockemError(Exception):
    """Bad input or a missing part: one sentence that says what, where and what to do.

    The command line prints the sentence and exits with code 2; Python callers get it as an ordinary exception.
    """


def reason(error: BaseException) -> str:
    """What went wrong in one line, for a sentence around it: the kind of the error and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


class NoLatents(BlockemError):
    """Discovery ended without a set: no latent of the block passed."""
