"""The Wrenn sandbox platform: real virtual machines on demand, on one machine."""

__version__ = "0.1.0"
