"""Find a device node and judge it, without opening it: the opener opens what it found, lists are made of it."""
