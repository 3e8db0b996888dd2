"""The client of the agent inside a guest. Whatever a guest answers is hostile until parsed."""

from .client import GuestClient, Initialisation, Limits, encoded_entropy
from .connection import GuestGone, GuestUnreachable

__all__ = [
    "GuestClient",
    "GuestGone",
    "GuestUnreachable",
    "Initialisation",
    "Limits",
    "encoded_entropy",
]
