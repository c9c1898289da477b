"""The command line, made from the options of each system."""

from __future__ import annotations

import contextlib
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
from typing import Annotated, Union

import tyro

_LOST = 75  # EX_TEMPFAIL of sysexits.h: to try again may help


def _fail(message: str) -> int:
    print(f"evojax-suite: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _in_one_line(text: str, command: list[str]) -> str:
    """tyro's box, without the options of other commands that it also thinks of."""
    text = re.sub(r"[─-╿]+|Error parsing (__tyro\S+|Placement:|Options:)|Value error", " ", text)
    text = " ".join(text.split())
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


def _commands() -> dict:
    """The modules of the commands by name."""
    from evojax_suite.cli import compare, doctor, evaluate, export
    from evojax_suite.systems.cest import experiment as cest
    from evojax_suite.systems.coresets import experiment as coreset
    from evojax_suite.systems.de_nas import experiment as de_nas
    from evojax_suite.systems.devs import experiment as devs
    from evojax_suite.systems.ecomp import experiment as ecomp
    from evojax_suite.systems.ga_distillation import experiment as ga_distillation

    return {
        "ga-distillation": ga_distillation,
        "devs": devs,
        "coreset": coreset,
        "cest": cest,
        "ecomp": ecomp,
        "de-nas": de_nas,
        "evaluate": evaluate,
        "export": export,
        "compare": compare,
        "doctor": doctor,
    }


def _completed(arguments: list[str], modules: dict) -> list[str]:
    """`arguments`, before them those of the recipe and of the file that they name: what is given
    later wins."""
    from evojax_suite.cli.config_file import arguments_of, named_in, value_of

    module = modules.get(arguments[0]) if arguments else None
    if module is None:
        return arguments
    said: list[str] = []
    if (file := named_in(arguments)) is not None:
        typed = {argument.partition("=")[0] for argument in arguments}
        without = ({"--seed", "--seeds"} if {"--seed", "--seeds"} & typed else set()) - typed
        said = arguments_of(file, module.Options, "refuse", without)
    recipe = value_of("--recipe", [*said, *arguments])
    return [arguments[0], *getattr(module, "RECIPES", {}).get(recipe, ()), *said, *arguments[1:]]


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


def _run(command, options) -> int:
    """The command; for each seed where there are several, and then a page of them all."""
    from evojax_suite.reporting import comparison
    from evojax_suite.reporting.progress import console
    from evojax_suite.running import dry_run, together
    from evojax_suite.running.options import RunOptions

    if isinstance(options, RunOptions) and options.dry_run:
        dry_run.show(command, options)
        return 0
    if not isinstance(options, RunOptions) or options.seeds is None:
        code = command.run(options.here())
        return code if isinstance(code, int) else 0
    each = [one.here() for one in options.each()]
    at_once = options.resolved_seeds_in_flight()
    with _compiled_once():
        if at_once == 1:
            runs = [command.run(one) for one in each]
        else:
            parts = [each[first : first + at_once] for first in range(0, len(each), at_once)]
            runs = [found for part in parts for found in together.run(command.run, part)]
    folder = runs[0].parent / f"{runs[0].name.rpartition('-seed')[0]}-all-seeds"
    text = comparison.write(runs, folder, [shlex.join(["evojax-suite", *options.typed])])
    console.say(text)
    console.say(f"all seeds: {folder / 'report.html'}")
    return 0


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
            modules = _commands()
            commands = Union[  # noqa: UP007
                tuple(
                    Annotated[module.Options, tyro.conf.subcommand(name)]
                    for name, module in modules.items()
                )
            ]
            with _naming_the_file(arguments):
                options = _parse(commands, _completed(arguments, modules))
            command = next(m for m in modules.values() if isinstance(options, m.Options))
            options = options.from_command_line(arguments)
            with owned_runs():
                return _run(command, options)
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
