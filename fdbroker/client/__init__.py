"""The client library: `calls` is the protocol without any I/O; `sync` and `aio` are thin shells over it.

Runs in: any program. The broker is trusted to be the broker that the socket's owner and mode say it is.
"""
