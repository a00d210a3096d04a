"""The keeper: what each client may open now, listed and watched, by a process that can open none of it.

It has no capability, no group of a device's, no client's socket, and by Landlock it lists folders and reads nothing.
"""
