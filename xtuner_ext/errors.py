"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A mistake in what the user gave: a file, a config key, a command line.

    The message is one sentence that names the file, key or line, what was found there and
    what was expected. The command line prints it without a traceback and exits with status 2.
    """
