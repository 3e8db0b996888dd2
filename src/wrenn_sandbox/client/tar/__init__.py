"""Trees of files as tar archives, without the standard library's trust in what an archive says.

The client and the guest agent share this package: a link in the agent's package leads here. It
therefore uses the standard library alone, little of it, and imports nothing from outside.
"""
