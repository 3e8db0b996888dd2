"""The client of the agent inside a guest. Whatever a guest answers is hostile until parsed."""

from .client import GuestClient, Initialisation, Limits, encoded_entropy
from .connection import GuestGone, GuestUnreachable
from .running import RunningGuest

__all__ = [
    "GuestClient",
    "GuestGone",
    "GuestUnreachable",
    "Initialisation",
    "Limits",
    "RunningGuest",
    "encoded_entropy",
]
