"""The command line: `sparsekd COMMAND …`, and the same commands as scripts under jobs/.

    sparsekd cascade --config laptop --distill.lr 3e-4 --dry-run

A command is a function of `commands.py`. Its settings come from a YAML file and from dotted options, and `--help`
shows the loaded values as defaults. The function's result is printed as the last line, `RESULT {json}`.

This module imports nothing heavy, so that help answers in well under a second.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sparsekd_ray.config import load
from sparsekd_ray.errors import ConfigError, SparseKDError
from sparsekd_ray.runtime import logging

CLOSED_OUTPUT = 141  # the status that a shell gives a program which SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command, `argv` or this process's own arguments; returns the exit status.

    A reader of the output that closes it early, as `head` does, is no error worth a traceback.
    """
    logging.setup()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads leave the cores alone
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "false")
    try:
        result = _run(list(sys.argv[1:] if argv is None else argv))
        logging.headline(f"RESULT {json.dumps(result)}")
        return 0
    except SparseKDError as error:
        return fail(error)
    except BrokenPipeError:
        if _drop_closed_output("\n"):
            return CLOSED_OUTPUT
        raise  # another pipe broke, such as a connection to Ray
    finally:
        _drop_closed_output("")  # Python would print an error when it flushes the output at exit


def _drop_closed_output(probe: str) -> bool:
    """Whether standard output does not take `probe` because its reader closed it. Then it goes nowhere from now on."""
    try:
        print(probe, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _run(arguments: list[str]) -> Any:
    from sparsekd_ray.commands import COMMANDS

    command: Any = COMMANDS
    names: list[str] = []
    while isinstance(command, Mapping):
        if "run" in command and arguments and _is_option(arguments[0]):  # a verb may be left out
            arguments.insert(0, "run")
        if not arguments or arguments[0] not in command:
            _choose(command, names, arguments or ["--help"])
        names.append(arguments.pop(0))
        command = command[names[-1]]
    return _call(command, arguments, f"sparsekd {' '.join(names)}")


def _is_option(argument: str) -> bool:
    """Whether it is an option of a command, and no plea for help with the choice of one."""
    return argument.startswith("-") and argument not in ("-h", "--help")


def _choose(commands: Mapping[str, Any], names: Sequence[str], arguments: Sequence[str]) -> None:
    """Prints the available commands, with an error unless the user asked for help. Ends the process."""
    import tyro

    def listed(command: Any) -> Any:
        summary = (
            ", ".join(command) if isinstance(command, Mapping) else (command.__doc__ or "").split("\n\n")[0]
        )

        def stub() -> None: ...

        stub.__doc__ = summary
        return stub

    tyro.extras.subcommand_cli_from_dict(
        {name: listed(command) for name, command in commands.items()},
        prog=" ".join(["sparsekd", *names]),
        args=list(arguments),
        description="Every command takes --help.",
    )


def _call(command: Any, arguments: Sequence[str], program: str) -> Any:
    import tyro

    if "common" in inspect.signature(command).parameters:
        from sparsekd_ray.commands import Common

        file = _config_file(arguments, Common.config)
        command = functools.partial(command, common=Common(load(file), file))
    plain = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(command, prog=program, args=list(arguments), config=plain)


def _config_file(arguments: Sequence[str], default: str) -> str:
    """The value of --config. It is read first, because its settings are the defaults of all other options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=default)
    return parser.parse_known_args(arguments)[0].config


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows as a table. A column is as wide as its cells. A value that is missing or None is printed as –."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in row))
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        texts = any(isinstance(row.get(name), str) for row in rows)
        grid.add_column(escape(name), justify="left" if texts else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*(escape(_cell(row.get(name))) for name in names))
    # a log file has no width, and rich would cut the table at 80 columns
    width = Console(width=10_000).measure(grid).maximum
    Console(width=max(width, 1), soft_wrap=True, highlight=False).print(grid)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return (
        f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )


def fail(error: Exception) -> int:
    """Prints the error as one message; returns an exit status that is not 0."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, ConfigError) else 1
