"""A command whose reader closes the output early, as `head` does, ends without a traceback."""

import subprocess
import sys

import pytest

PRINTS = """
import sys
from sparsekd_ray import cli, commands

def lines():
    '''Prints more than a pipe holds.'''
    for number in range(200_000):
        print(number)

commands.COMMANDS = {**commands.COMMANDS, "lines": lines}
sys.exit(cli.main(sys.argv[1:]))
"""
BREAKS = """
import sys
from sparsekd_ray import cli, commands

def connect():
    '''Meets a broken pipe that is not its output.'''
    raise BrokenPipeError("a connection")

commands.COMMANDS = {"connect": connect}
sys.exit(cli.main(["connect"]))
"""


def closed_early(code: str, *arguments: str) -> tuple[int, str]:
    """Status and standard error of a program whose standard output nobody reads."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    return process.wait(timeout=60), errors


@pytest.mark.parametrize(("arguments", "status"), [(["lines"], 141), (["configs"], 0), (["--help"], 141)])
def test_a_reader_that_stops_early_is_no_error(arguments: list[str], status: int) -> None:
    assert closed_early(PRINTS, *arguments) == (status, "")


def test_another_broken_pipe_is_not_hidden() -> None:
    found = subprocess.run([sys.executable, "-c", BREAKS], capture_output=True, text=True, timeout=60)
    assert found.returncode == 1 and "BrokenPipeError: a connection" in found.stderr
