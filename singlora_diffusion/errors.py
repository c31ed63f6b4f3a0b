"""The one exception whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """A mistake its reader can mend: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
