"""What glibc does with freed memory; elsewhere nothing is changed."""

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_AS_MUCH_AS_THERE_IS = 2**31 - 1


def keep_freed_memory() -> None:
    """Use freed memory again instead of giving it back at once.

    By default every large tensor comes as fresh pages, which the system clears one by one: a tenth of a step on a CPU.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _AS_MUCH_AS_THERE_IS)
        set_option(_M_TRIM_THRESHOLD, _AS_MUCH_AS_THERE_IS)
