"""Prints the type and the bytes of a file's handle: name_to_handle_at(2)."""

from __future__ import annotations

import ctypes
import os
import sys

libc = ctypes.CDLL(None, use_errno=True)


class Handle(ctypes.Structure):
    """struct file_handle."""

    _fields_ = (("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("data", ctypes.c_ubyte * 128))


handle, mount = Handle(128), ctypes.c_int()
path = os.fsencode(sys.argv[1])
if libc.name_to_handle_at(-100, path, ctypes.byref(handle), ctypes.byref(mount), 0):
    sys.exit(os.strerror(ctypes.get_errno()))
print(handle.type, bytes(handle.data[: handle.bytes]).hex())
