"""`wrenn unit`."""

import sys
from typing import Final

import typer

_UNIT: Final = """\
[Unit]
Description=Wrenn sandbox server
Wants=network-online.target
After=network-online.target nftables.service postgresql.service

[Service]
Type=notify
ExecStart=%s -m wrenn_sandbox serve
# Settings, one NAME=VALUE a line.
EnvironmentFile=-/etc/wrenn/environment
StateDirectory=wrenn
StateDirectoryMode=0711
# VMs outlive the server, and its next life adopts them.
KillMode=process
OOMPolicy=continue
Restart=on-failure
RestartSec=1
# A server that does not respond for this long is aborted, logs where it was, and is restarted.
WatchdogSec=60
TimeoutAbortSec=10
TimeoutStartSec=600
# With WRENN_ON_STOP=pause, a stop takes as long as it takes to store all sandboxes.
TimeoutStopSec=600

[Install]
WantedBy=multi-user.target
"""


def command() -> None:
    """Print a systemd unit that runs `wrenn serve` of this installation."""
    program = sys.executable.replace("%", "%%")
    typer.echo(_UNIT % (f'"{program}"' if " " in program else program), nl=False)
