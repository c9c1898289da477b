"""The command line, made from the options of each system."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
import threading
from typing import Annotated, Union

import tyro


def _fail(message: str) -> int:
    print(f"evojax-suite: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parse(commands, arguments: list[str]):
    """tyro's result; what it says of a wrong option becomes one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                commands,
                prog="evojax-suite",
                description="Evolution over thousands of small neural networks, in JAX.",
                args=arguments,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        text = re.sub(r"[─-╿]+|Error parsing __tyro\S+|Value error", " ", said.getvalue())
        raise ValueError(text.replace("For full helptext", "; for the options").strip()) from None


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


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for errors, 128 + signal when stopped."""
    from evojax_suite import __version__, loop
    from evojax_suite.commands import (
        cest,
        coreset,
        de_nas,
        devs,
        ecomp,
        evaluate,
        ga_distillation,
    )

    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(__version__)
        return 0
    modules = {
        "ga-distillation": ga_distillation,
        "devs": devs,
        "coreset": coreset,
        "cest": cest,
        "ecomp": ecomp,
        "de-nas": de_nas,
        "evaluate": evaluate,
    }
    commands = Union[  # noqa: UP007
        tuple(
            Annotated[module.Options, tyro.conf.subcommand(name)]
            for name, module in modules.items()
        )
    ]
    received = []
    try:
        with _terminate_like_interrupt(received):
            options = _parse(commands, arguments)
            next(m for m in modules.values() if isinstance(options, m.Options)).run(options)
    except loop.Interrupted as stop:
        print(f"evojax-suite: {stop}; the same command with --resume goes on", file=sys.stderr)
        return 128 + stop.signal_number
    except KeyboardInterrupt:  # outside the generations: what they saved is complete
        number = received[0] if received else signal.SIGINT
        print("evojax-suite: stopped; a run goes on with --resume", file=sys.stderr)
        return 128 + number
    except (ValueError, OSError) as error:
        return _fail(str(error))
    return 0


def run() -> None:
    """The entry point."""
    sys.exit(main())
