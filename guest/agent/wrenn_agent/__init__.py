"""The agent inside a sandbox: processes, files and identity over HTTP and Connect RPC.

Only the standard library is used, and as little of it as possible: a guest runs from a restored
snapshot, where every module and page that is touched costs time. `ARCHITECTURE` of the package:

    loop -> connection -> http -> server -> routes (health, files) and connect -> services

Everything runs in one thread on one event loop.
"""
