"""The command line, in this process."""

from typer.testing import CliRunner

from steph.cli import app


def steph(*arguments):
    """Carry out `steph` with these arguments; the result has `exit_code` and `output`."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
