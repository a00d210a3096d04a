"""The keeper: lists and watches what each client may open, which it cannot open itself, and records what was refused.

It has no capability, no group of a device's, no client's socket, and by Landlock it lists folders and reads nothing.
"""
