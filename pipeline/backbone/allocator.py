"""How glibc treats freed memory; with another C library nothing is changed."""

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_AS_MUCH_AS_THERE_IS = 2**31 - 1
_OLD_LIMIT = 2**25
"""The largest threshold that older releases of glibc accept."""
_SMALL_MODEL = 2**29
_LARGE_TENSOR = 2**20
_PIECE_OF_A_MATRIX = 2**17


def configure_allocator(held_bytes: int) -> None:
    """Choose between speed and memory by what a rank holds of the model.

    By default every large tensor comes as fresh pages, which the system clears one by one. On a CPU with a small model
    that takes a tenth of a step, so freed memory is used again. Beside a large model, layers that are gathered and
    freed leave holes in which nothing fits: a third of a gigabyte and more. There, freed memory goes back to the system
    at once.
    """
    if held_bytes < _SMALL_MODEL:
        _set_thresholds(_AS_MUCH_AS_THERE_IS)
    else:
        _give_back(_LARGE_TENSOR)


def configure_allocator_for_loading() -> None:
    """Give free memory back to the system, and from now on every piece of a matrix as it is freed.

    Otherwise the little that is kept of each matrix would hold the memory around it: 10 to 30 MB beside an 80 MB model.
    """
    _give_back(_PIECE_OF_A_MATRIX)


def _give_back(size: int) -> None:
    _set_thresholds(size)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _set_thresholds(size: int) -> None:
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        if not set_option(_M_MMAP_THRESHOLD, size):
            set_option(_M_MMAP_THRESHOLD, _OLD_LIMIT)
        set_option(_M_TRIM_THRESHOLD, size)
