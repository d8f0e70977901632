"""Enables huge pages for training on CPU, a setting that glibc reads when a program starts."""

import multiprocessing
import os
import sys
from pathlib import Path

VARIABLE, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Starts this program again, as the same process, with huge pages for its large arrays.

    XLA on CPU allocates the arrays of a step anew each time, and the kernel clears each page: with
    pages of 4 KiB that takes about a tenth of the step. Numbers do not change. Nothing happens if
    GLIBC_TUNABLES is set, before glibc 2.35, where Linux does not let programs ask, or in a worker
    process, which could not be started again.
    """
    is_worker = multiprocessing.parent_process() is not None
    if VARIABLE not in os.environ and not is_worker and _can_ask():
        os.environ[VARIABLE] = HUGE_PAGES
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _can_ask() -> bool:
    """Returns True if the kernel's policy is `madvise` and glibc supports huge pages."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "none 0.0").split()
        numbers = tuple(map(int, version.split(".")[:2]))
        return name == "glibc" and numbers >= (2, 35) and "[madvise]" in POLICY.read_text()
    except (OSError, ValueError, AttributeError):  # not Linux, another C library
        return False
