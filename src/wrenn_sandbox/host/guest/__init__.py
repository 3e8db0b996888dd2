"""The client of the agent inside a guest. Whatever a guest answers is hostile until parsed."""

from .client import GuestClient, Initialisation, encoded_entropy
from .connection import GuestGone

__all__ = ["GuestClient", "GuestGone", "Initialisation", "encoded_entropy"]
