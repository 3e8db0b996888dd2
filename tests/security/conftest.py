"""The database server of the API's tests, for tests of the whole server here."""

from api.conftest import postgres

__all__ = ["postgres"]
