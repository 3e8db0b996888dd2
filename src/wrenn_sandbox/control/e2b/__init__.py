"""The API that clients of E2B speak: a translation of its calls into those of the services.

It has no rules of its own. What this server cannot do is refused by name, never left out.
"""
