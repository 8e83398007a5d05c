"""A simulated full disk, using the operating system's file size limit."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(room=64):
    """Inside, no file of this process grows beyond `room` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
