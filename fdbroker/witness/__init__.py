"""The witness: tells the launcher whether an administrator asks from our own user namespace.

A process of its own, for it must be of root's uid and outside Landlock. It holds no capability, and sees no client.
"""
