"""Bridges between topics and what is no client: D-Bus, input devices. Ordinary clients in processes of their own.

Runs in: `fdbroker bridge`. No heavy library comes into the service for them, and the policy judges them as anybody.
"""
