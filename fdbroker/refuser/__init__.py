"""The refuser: answers everybody while no policy can be used. It holds no capability and reads no client."""
