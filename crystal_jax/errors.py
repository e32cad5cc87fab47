"""The two ways a command may end badly; each becomes one line and an exit code (cli.py)."""


class UserError(Exception):
    """A mistake that the user can mend: the message names the field or file, its value, the rule, the way out."""

    exit_code = 1


class FatalError(UserError):
    """A state that a restart of the same command can't help, such as a non-finite loss."""

    exit_code = 4
