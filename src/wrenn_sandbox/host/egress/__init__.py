"""Egress by name: the proxy of a host that takes HTTP and HTTPS to the names of policies.

`proxy.py` is the server's side. All others run in the proxy's process, which has the standard
library, h11 and dnspython, but nothing else of Wrenn.
"""
