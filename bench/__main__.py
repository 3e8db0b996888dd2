"""`./dev bench [FIGURE...]`: measure, print tables, keep the samples; fails beyond a limit.

Sides that are compared are measured turn by turn in one run, so that a busy machine slows both.
"""

import argparse
import logging
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Final

import structlog
import uvloop

from wrenn_sandbox.settings import Settings

from . import (
    clients,
    disk,
    edge,
    faults,
    files,
    fork,
    interactive,
    kvm,
    memory,
    overhead,
    pause,
    start,
    steps,
)
from .machine import describe
from .report import Report, save
from .rig import TEMPLATE

RESULTS: Final = Path(__file__).parent / "results"
Figure = Callable[[Settings, argparse.Namespace], Coroutine[None, None, Report]]

FIGURES: Final[dict[str, Figure]] = {
    "start": lambda settings, options: start.measure(settings, options.rounds, options.cold),
    "pause": lambda settings, options: pause.measure(settings, options.rounds, options.cycles),
    "faults": lambda settings, options: faults.measure(settings, options.faults, options.copies),
    "fork": lambda settings, options: fork.measure(settings, options.forks),
    "memory": lambda settings, _: memory.measure(settings),
    "interactive": lambda settings, _: interactive.measure(settings),
    "exec": lambda settings, options: overhead.measure(settings, options.commands),
    "files": lambda settings, options: files.measure(settings, options.copies),
    "edge": lambda settings, options: edge.measure(settings, options.copies),
    "clients": lambda settings, options: clients.measure(settings, options.rounds),
    "disk": lambda settings, options: disk.measure(settings, options.copies),
    "steps": lambda settings, options: steps.measure(settings, options.rounds),
    "kvm": lambda settings, options: kvm.measure(settings, options.rounds, options.firecracker),
}
USUAL: Final = tuple(name for name in FIGURES if name != "kvm")
"""Its limits are for hosts that have it."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="./dev bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument("--rounds", type=int, default=15, help="of most figures")
    parser.add_argument("--cold", type=int, default=5, help="cold boots")
    parser.add_argument("--cycles", type=int, default=5, help="sandboxes paused ten times")
    parser.add_argument("--forks", type=int, default=3, help="sandboxes that are forked")
    parser.add_argument("--commands", type=int, default=50, help="commands of the exec figure")
    parser.add_argument(
        "--copies", type=int, default=3, help="of the faults, files, edge and disk figures"
    )
    parser.add_argument("--faults", type=int, default=10_000, help="single ones of each side")
    parser.add_argument(
        "--firecracker", type=Path, metavar="BINARY", help="of the kvm figure, beside QEMU"
    )
    parser.add_argument("--as-built", action="store_true", help="do not build the template first")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if unknown := set(options.figures) - FIGURES.keys():
        parser.error(f"no such figure: {', '.join(sorted(unknown))}")
    if not options.as_built and set(options.figures) != {"faults"}:
        _build_template()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    settings = Settings()
    machine = describe()
    print(machine)
    ok = True
    for name in options.figures or USUAL:
        report = uvloop.run(FIGURES[name](settings, options))
        print(f"{report.text()}\n  samples: {save(options.results, name, report, machine)}")
        ok = ok and all(check.ok for check in report.checks)
    return 0 if ok else 1


def _build_template() -> None:
    argv = [sys.executable, "-m", "wrenn_sandbox", "template", "build", TEMPLATE]
    subprocess.run(argv, check=True)


if __name__ == "__main__":
    sys.exit(main())
