"""Bytes to messages and back, for clients, for the links between our processes, and for the journal.

Pure: no socket, no clock, no file but the package's own *.varlink. An attacker controls the bytes that frame.py and
varlink.py read; a taken-over inbox controls those that link.py reads in the opener.
"""
