"""The command line, made from the options of each system."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Union

import tyro

if TYPE_CHECKING:
    from evojax_suite.reporting.comparison import Columns
    from evojax_suite.running.options import Command, RunOptions
    from evojax_suite.running.system import System

_LOST = 75  # EX_TEMPFAIL of sysexits.h: to try again may help


def _fail(message: str) -> int:
    print(f"evojax-suite: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _in_one_line(text: str, command: list[str]) -> str:
    """tyro's box, without the options of other commands that it also thinks of."""
    drawn = r"[─-╿]+|-{9,}|Error parsing (__tyro\S+|Placement:|Options:)|Value error"
    text = " ".join(re.sub(drawn, " ", text).split())
    text, _, ending = text.partition("For full helptext, ")
    text = re.sub(r"Unrecognized options (?=Unrec)|Invalid choice (?=invalid)", "", text)
    text, _, guesses = text.partition("Perhaps you meant:")
    if guesses:
        text += f"; perhaps you meant {guesses.split()[0]}"
        ending = f"run evojax-suite {' '.join(command)} --help"
    return f"{text.strip()}; for the options, {ending}".replace(" ;", ";")


def _parse(commands, arguments: list[str], **settings):
    """tyro's result; what it says of a wrong option becomes one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                commands,
                prog="evojax-suite",
                description="Evolution over thousands of small neural networks, in JAX.",
                args=arguments,
                **settings,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_in_one_line(said.getvalue(), arguments[:1])) from None


@contextlib.contextmanager
def _terminate_like_interrupt(received: list[int]):
    """SIGTERM raises KeyboardInterrupt, as SIGINT does; `received` tells it from that."""

    def raise_interrupt(number, frame):
        del frame
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, raise_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _settle(arguments: list[str]) -> None:
    """Take the devices and meet the other processes, before a command is imported: evosax starts
    the devices when it is."""
    from evojax_suite.cli.config_file import arguments_of, named_in
    from evojax_suite.running.options import Placement

    asks = {"-h", "--help"} & set(arguments)
    if not asks and not any(argument.startswith("--tyro-") for argument in arguments):
        file = named_in(arguments)
        said = arguments_of(file, Placement, "skip") if file else []
        placement, _ = _parse(Placement, [*said, *arguments], return_unknown_args=True)
        placement.settle()


class _Command(NamedTuple):
    """What a command takes, and what it does with it."""

    options: type[Command]
    run: Callable[[Any], int | None]
    recipes: Mapping[str, Sequence[str]] = {}


def _commands() -> dict[str, _Command]:
    """The commands by name: the systems, then what works on what they made."""
    from evojax_suite import systems
    from evojax_suite.cli import compare, doctor, evaluate, export

    records = systems.find()
    columns = {system.name: system.columns for system in records.values()}
    found = {
        name: _Command(
            system.options, functools.partial(_run_system, system, columns), system.recipes
        )
        for name, system in records.items()
    }
    return found | {
        "evaluate": _Command(evaluate.Options, evaluate.run),
        "export": _Command(export.Options, export.run),
        "compare": _Command(compare.Options, functools.partial(compare.run, columns=columns)),
        "doctor": _Command(doctor.Options, doctor.run),
    }


def _completed(arguments: list[str], commands: dict[str, _Command]) -> list[str]:
    """`arguments`, before them those of the recipe and of the file that they name: what is given
    later wins."""
    from evojax_suite.cli.config_file import arguments_of, named_in, value_of

    command = commands.get(arguments[0]) if arguments else None
    if command is None:
        return arguments
    said: list[str] = []
    if (file := named_in(arguments)) is not None:
        typed = {argument.partition("=")[0] for argument in arguments}
        without = ({"--seed", "--seeds"} if {"--seed", "--seeds"} & typed else set()) - typed
        said = arguments_of(file, command.options, "refuse", without)
    recipe = value_of("--recipe", [*said, *arguments])
    return [arguments[0], *command.recipes.get(recipe or "", ()), *said, *arguments[1:]]


@contextlib.contextmanager
def _naming_the_file(arguments: list[str]):
    """What is wrong with an option may be wrong in the file that the arguments name."""
    from evojax_suite.cli.config_file import named_in

    try:
        yield
    except ValueError as error:
        file = named_in(arguments)
        if file is None or str(file) in str(error):
            raise
        raise ValueError(f"{error} (with the options of {file})") from None


@contextlib.contextmanager
def _compiled_once():
    """What is compiled is not compiled again inside, by another run with the same program."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    wanted = {"jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in wanted}
    if before["jax_compilation_cache_dir"] is not None:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="evojax-suite-") as folder:
        try:
            for name, value in (wanted | {"jax_compilation_cache_dir": folder}).items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()  # JAX asks once whether there is one
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def _run_system(system: System, columns: Mapping[str, Columns], options: RunOptions) -> None:
    """A run; one for each seed where there are several, and then a page of them all."""
    from evojax_suite.reporting import comparison
    from evojax_suite.reporting.progress import console
    from evojax_suite.running import runner

    if options.dry_run:
        runner.dry_run(system, options)
        return
    if options.seeds is None:
        runner.run(system, options.here())
        return
    each = [one.here() for one in options.each()]
    at_once = options.resolved_seeds_in_flight()
    parts = [each[first : first + at_once] for first in range(0, len(each), at_once)]
    with _compiled_once():
        runs = [directory for part in parts for directory in runner.run(system, *part)]
    folder = runs[0].parent / f"{runs[0].name.rpartition('-seed')[0]}-all-seeds"
    repeat = [shlex.join(["evojax-suite", *options.typed])]
    console.say(comparison.write(runs, folder, repeat, columns))
    console.say(f"all seeds: {folder / 'report.html'}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for errors, 75 where another process of
    the run is lost, 128 + signal when stopped."""
    from evojax_suite import __version__
    from evojax_suite.runtime import devices, loop
    from evojax_suite.runtime.results import owned_runs

    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(__version__)
        return 0
    for name in ("absl", "matplotlib.font_manager"):  # Orbax's errors come as exceptions
        logging.getLogger(name).setLevel(logging.CRITICAL)
    received = []
    try:
        with _terminate_like_interrupt(received):
            with _naming_the_file(arguments):
                _settle(arguments)
            commands = _commands()
            choices = Union[  # noqa: UP007
                tuple(
                    Annotated[command.options, tyro.conf.subcommand(name)]
                    for name, command in commands.items()
                )
            ]
            with _naming_the_file(arguments):
                options = _parse(choices, _completed(arguments, commands))
            command = next(c for c in commands.values() if isinstance(options, c.options))
            options = options.from_command_line(arguments).here()
            with owned_runs():
                return command.run(options) or 0
    except loop.Interrupted as stop:
        print(f"evojax-suite: {stop}; the same command with --resume goes on", file=sys.stderr)
        return 128 + stop.signal_number
    except KeyboardInterrupt:  # outside the generations: what they saved is complete
        number = received[0] if received else signal.SIGINT
        print("evojax-suite: stopped; a run goes on with --resume", file=sys.stderr)
        return 128 + number
    except devices.ProcessLost as lost:
        print(
            f"evojax-suite: another process of the run is lost; {devices.HOW_TO_GO_ON} ({lost})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(_LOST)  # the usual way out would wait for the other process
    except (ValueError, OSError) as error:
        if os.environ.get("EVOJAX_SUITE_TRACEBACK"):
            traceback.print_exc()
        return _fail(str(error))


def run() -> None:
    """The entry point. A network or a fitness function may lie in the working directory."""
    sys.path.append(os.getcwd())
    sys.exit(main())
