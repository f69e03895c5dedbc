"""The exceptions that a user is meant to read."""


class UserError(Exception):
    """A mistake in what the user gave: a file, a config key, a command line.

    The message is one sentence that names the file, key or line, what was found there and
    what was expected. The command line prints it without a traceback and exits with status 2.
    """


class BadSample(UserError):
    """One sample of a dataset that cannot be trained on, which a run may be told to leave out.

    Args:
        message (str): Names file and line, what was found and what was expected.
        reason (str): One of :data:`xtuner_ext.data.ledger.REASONS`. A DataLoader makes the errors of its workers anew
            from their messages alone, for which there is a default.

    Attributes:
        reason (str): See above.
    """

    def __init__(self, message, reason="format"):
        super().__init__(message)
        self.reason = reason
