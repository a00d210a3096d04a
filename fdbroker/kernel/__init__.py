"""One small wrapper for each fact about the kernel; the only place with ctypes.

Every function raises OSError with the call's errno, and says who owns each descriptor.
"""
