"""The command line, which is made from the options of each system."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Union

import tyro

from evojax_suite import __version__
from evojax_suite.cli import config_file, help, processes
from evojax_suite.names import did_you_mean
from evojax_suite.runtime import devices, loop, results

if TYPE_CHECKING:
    from evojax_suite.reporting.comparison import Columns
    from evojax_suite.reporting.progress import Terminal
    from evojax_suite.running.options import Command, RunOptions
    from evojax_suite.running.system import System


PATIENCE = 7.0
"""Seconds that a signal leaves a command to end in order."""


_ASKS = {"-h", "--help", "--help-all"}


def _console() -> Terminal | None:
    """The console, where a command has begun."""
    module = sys.modules.get("evojax_suite.reporting.progress")
    return module.console if module else None


def _say(text: str) -> None:
    console, line = _console(), f"evojax-suite: {text}"
    print(console.formatted(line) if console else line, file=sys.stderr, flush=True)


def _in_one_line(text: str, command: list[str]) -> str:
    """Returns tyro's error message on one line, without the options of other commands."""
    drawn = r"[─-╿]+|-{9,}|Error parsing (__tyro\S+|Placement:|Options:)|Value error"
    text = " ".join(re.sub(drawn, " ", text).split())
    text = text.partition("For full helptext, ")[0]
    text = re.sub(r"Unrecognized options (?=Unrec)|Invalid choice (?=invalid)", "", text)
    text = text.partition("Perhaps you meant:")[0].partition("Argument helptext:")[0]
    if choice := re.search(r"invalid choice '(.*?)' for argument '(\S+?)'.*one of \((.*)\)", text):
        value, flag, allowed = choice.groups()
        names = re.findall(r"'(.*?)'", allowed)
        hint = did_you_mean(value, names)
        text = f"{flag} must be one of {', '.join(names)}, got {value!r}{hint}"
    if wrong := re.search(r"Error parsing (--\S+): .*?('[^']*'|\[.*\])$", text.strip()):
        text = f"{wrong[1]} takes no value like {wrong[2]}"
    ending = f"evojax-suite {' '.join(command)} --help".replace("  ", " ")
    return f"{text.strip()}; for the options, run {ending}".replace(" ;", ";")


def _parse(commands: Any, arguments: list[str], **settings: Any):
    """Returns tyro's result. Raises ValueError, one line, for a wrong option."""
    errors = io.StringIO()
    settings |= {"prog": "evojax-suite", "description": help.PURPOSE, "add_help": False}
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(commands, args=arguments, **settings)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_in_one_line(errors.getvalue(), arguments[:1])) from None


@contextlib.contextmanager
def _terminate_like_interrupt(received: list[int]):
    """Makes SIGTERM raise KeyboardInterrupt, as SIGINT does, and adds its number to `received`."""

    def raise_interrupt(number: int, frame: FrameType | None):
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
    """Take the devices and join the other processes, before a command is imported, as the import of
    evosax starts the devices."""
    from evojax_suite.running.options import Placement

    asks = not arguments or _ASKS & set(arguments) or processes.wanted(arguments)
    if not asks and not any(argument.startswith("--tyro-") for argument in arguments):
        file = config_file.named_in(arguments)
        in_file = config_file.arguments_of(file, Placement, "skip") if file else []
        placement, _ = _parse(Placement, [*in_file, *arguments], return_unknown_args=True)
        placement.settle()


class _Command(NamedTuple):
    """A command: its options, the function that runs it, its recipes, arguments by name, and what
    its help shows first."""

    options: type[Command]
    run: Callable[[Any], int | None]
    recipes: Mapping[str, Sequence[str]] = {}
    essentials: Sequence[str] = ()
    examples: Sequence[str] = ()


def _commands() -> dict[str, _Command]:
    """Returns the commands by name: the systems, then those that work on their results."""
    from evojax_suite import systems
    from evojax_suite.cli import compare, doctor, evaluate, export

    records = systems.find()
    columns = {system.name: system.columns for system in records.values()}
    commands = {
        name: _Command(
            system.options,
            partial(_run_system, system, columns),
            system.recipes,
            system.essentials,
            system.examples,
        )
        for name, system in records.items()
    }
    return commands | {
        "evaluate": _Command(evaluate.Options, evaluate.run, examples=[evaluate.EXAMPLE]),
        "export": _Command(export.Options, export.run, examples=[export.EXAMPLE]),
        "compare": _Command(
            compare.Options, partial(compare.run, columns=columns), examples=[compare.EXAMPLE]
        ),
        "doctor": _Command(doctor.Options, doctor.run),
    }


def _as_typed(message: str, options: type) -> str:
    """Returns an error with the names of settings as `options`: --data-dir in place of data_dir. A
    name of one word is taken for a setting at the beginning alone, where a value is refused."""
    flags = {}
    for path, option in config_file.known(options).items():
        flags.setdefault(path.rpartition(".")[2], option.flag)
    without = {entry.flag.lower() for entry in help.entries(options)}
    for name, flag in flags.items():
        if name in without:  # it has no option, but a place
            continue
        pattern = rf"(?<![\w./-]){name}(?![\w./])" if "_" in name else rf"^{name}(?= must | needs )"
        message = re.sub(pattern, flag, message)
    return message


def _options_of(arguments: Sequence[str], commands: Mapping[str, _Command]) -> type:
    """Returns those of the command that `arguments` name, or else those of every command."""
    from evojax_suite.running.options import Placement

    command = commands.get(arguments[0]) if arguments else None
    return command.options if command else Placement


def _help(arguments: Sequence[str], commands: Mapping[str, _Command]) -> str | None:
    """Returns the help that `arguments` ask for, or None if they do not."""
    if arguments and not _ASKS & set(arguments):
        return None
    name = arguments[0] if arguments else ""
    if (command := commands.get(name)) is None:
        return help.overview({name: command.options for name, command in commands.items()})
    everything = "--help-all" in arguments
    return help.text(name, command.options, command.essentials, command.examples, everything)


def _completed(arguments: list[str], commands: dict[str, _Command]) -> list[str]:
    """Returns `arguments` with those of the recipe and of the file that they name before them, as
    the last value of an option counts."""
    command = commands.get(arguments[0]) if arguments else None
    if command is None:
        return arguments
    in_file: list[str] = []
    if (file := config_file.named_in(arguments)) is not None:
        typed = {argument.partition("=")[0] for argument in arguments}
        without = ({"--seed", "--seeds"} if {"--seed", "--seeds"} & typed else set()) - typed
        in_file = config_file.arguments_of(file, command.options, "refuse", without)
    recipe = config_file.value_of("--recipe", [*in_file, *arguments])
    return [arguments[0], *command.recipes.get(recipe or "", ()), *in_file, *arguments[1:]]


def _check_options(arguments: Sequence[str], commands: Mapping[str, _Command]) -> None:
    """Raises ValueError for a command that there is not, or an option that it does not have."""
    name = arguments[0]
    if name.startswith("--tyro-"):  # completions of shells
        return
    if name not in commands:
        given = f"{', '.join(commands)}, got {name!r}{did_you_mean(name, commands)}"
        raise ValueError(f"the command must be {given}")
    flags = {"--tyro-print-completion", "--tyro-write-completion"}
    for option in config_file.known(commands[name].options).values():
        for flag in (option.flag, *option.aliases):
            flags |= {flag, results.typed_option(flag, False)[0]}
    for argument in arguments[1:]:
        flag = argument.partition("=")[0].replace("_", "-")
        if argument.startswith("--") and flag not in flags:
            shown = {each.rpartition(".")[2]: each for each in sorted(flags)}
            shown |= {each: each for each in flags}
            hint = did_you_mean(flag, shown, shown=shown)
            given = argument.partition("=")[0]
            raise ValueError(f"{name} has no option {given}{hint}; all: {name} --help-all")


@contextlib.contextmanager
def _naming_the_file(arguments: list[str]):
    """Adds the file that `arguments` name to an error, as a wrong option may come from it."""
    try:
        yield
    except ValueError as error:
        file = config_file.named_in(arguments)
        if file is None or str(file) in str(error):
            raise
        raise ValueError(f"{error} (with the options of {file})") from None


@contextlib.contextmanager
def _compiled_once():
    """Keeps compiled programs until the context ends, for other runs with the same program."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    def configure(settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX asks once whether there is one

    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    if before[names[0]] is not None:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="evojax-suite-") as folder:
        try:
            configure(dict(zip(names, (folder, 0.0), strict=True)))
            yield
        finally:
            configure(before)


def _run_system(system: System, columns: Mapping[str, Columns], options: RunOptions) -> None:
    """Run `system`; with several seeds once for each, and then write a page of all."""
    from evojax_suite.reporting import comparison
    from evojax_suite.reporting.progress import console
    from evojax_suite.running import runner

    if options.dry_run:
        runner.dry_run(system, options)
        return
    if options.seeds is None:
        (run,) = runner.run(system, options.here(), may_be_new=False)
        if devices.is_first():
            _list_runs(run.parent, columns)
        return
    runs: list[Path] = []
    if options.seed_processes > 1 and options.shard is None:
        runs = processes.run(system, options)
    else:
        each, at_once = [one.here() for one in options.each()], options.resolved_seeds_in_flight()
        with _compiled_once():
            for first in range(0, len(each), at_once):
                runs += runner.run(system, *each[first : first + at_once])
    if not (every := processes.page_of(runs, options)):
        console.say(f"{len(runs)} runs of this shard are done; others are not")
        return
    folder = every[0].parent / f"{every[0].name.rpartition('-seed')[0]}-all-seeds"
    repeat = [shlex.join(["evojax-suite", *options.typed])]
    console.result(comparison.write(every, folder, repeat, columns))
    console.result(f"all seeds: {folder / 'report.html'}")
    _list_runs(folder.parent, columns)


def _list_runs(folder: Path, columns: Mapping[str, Columns]) -> None:
    """Writes the page of all runs; where that fails, the run has ended well all the same."""
    from evojax_suite.reporting import index

    with contextlib.suppress(OSError):
        index.write(folder, columns)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for errors, 75 if another process of the
    run is lost, 128 + signal if stopped."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(__version__)
        return 0
    for name in ("absl", "matplotlib.font_manager"):  # Orbax's errors come as exceptions
        logging.getLogger(name).setLevel(logging.CRITICAL)
    received, commands = [], {}
    try:
        with _terminate_like_interrupt(received):
            with _naming_the_file(arguments):
                _settle(arguments)
            commands = _commands()
            if (asked := _help(arguments, commands)) is not None:
                print(asked, file=sys.stdout if arguments else sys.stderr)
                return 0 if arguments else 2
            _check_options(arguments, commands)
            kinds = [Annotated[c.options, tyro.conf.subcommand(n)] for n, c in commands.items()]
            with _naming_the_file(arguments):
                completed = _completed(arguments, commands)
                options = _parse(Union[tuple(kinds)], completed)  # noqa: UP007
            command = next(c for c in commands.values() if isinstance(options, c.options))
            options = options.from_command_line(arguments, completed).here()
            with results.owned_runs():
                return command.run(options) or 0
    except loop.Interrupted as stop:
        _say(str(stop))
        return 128 + stop.signal_number
    except KeyboardInterrupt:  # outside the loops, whose saved states are complete
        _say("stopped; a run goes on with --resume")
        return 128 + (received[0] if received else signal.SIGINT)
    except devices.ProcessLost as lost:
        _say(f"another process of the run is lost; {devices.HOW_TO_GO_ON} ({lost})")
        os._exit(75)  # EX_TEMPFAIL of sysexits.h; a usual exit would wait for the other process
    except (ValueError, OSError) as error:
        if os.environ.get("EVOJAX_SUITE_TRACEBACK"):
            traceback.print_exc()
        text = " ".join(str(error).split())
        _say(f"error: {_as_typed(text, _options_of(arguments, commands))}")
        return 2
    finally:
        if console := _console():
            console.choose()  # whoever calls this again, or prints, is heard


def _end_in_time() -> threading.Event:
    """Makes SIGINT and SIGTERM end this process `PATIENCE` seconds later, if it is still there, as
    Python handles no signal within a call of a compiled program, however long that takes. Returns
    an event to set once the command has said how it ended."""
    ended = threading.Event()
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        number = 0
        while number not in (signal.SIGINT, signal.SIGTERM):
            number = reader.recv(1)[0]
        time.sleep(PATIENCE)
        if not ended.is_set():
            if sys.stderr.isatty():
                print("\x1b[?25h", file=sys.stderr)  # the cursor, which a progress bar hides
            name = signal.Signals(number).name
            how = "" if "--dry-run" in sys.argv else "; --resume goes on from what is saved"
            _say(f"stopped by {name} within a step{how}")
        os._exit(128 + number)

    signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
    threading.Thread(target=watch, name="end in time", daemon=True).start()
    return ended


def run() -> None:
    """The entry point, which also imports a user's modules from the working directory."""
    sys.path.append(os.getcwd())
    ended = _end_in_time()
    code = main()
    ended.set()
    sys.exit(code)  # which waits for the threads of evaluations that have begun
