"""Tries to get out of the sandbox of provider-proxy-vtpm.service; prints what came of each way, as JSON.

Arguments: a secret file's handle (type and hex), a folder on the same file system, the secret's path, and
the process id of a process of root's. Run with CAP_DAC_READ_SEARCH and no sandbox it shows that the ways
are there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
CLONE_NEWUSER, CLONE_NEWNS, PTRACE_ATTACH = 0x10000000, 0x00020000, 16
# x86-64: asm/unistd_64.h
NUMBERS = {
    "ptrace": 101,
    "pivot_root": 155,
    "chroot": 161,
    "settimeofday": 164,
    "mount": 165,
    "swapon": 167,
    "reboot": 169,
    "sethostname": 170,
    "iopl": 172,
    "init_module": 175,
    "kexec_load": 246,
    "add_key": 248,
    "keyctl": 250,
    "unshare": 272,
    "perf_event_open": 298,
    "open_by_handle_at": 304,
    "setns": 308,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "bpf": 321,
    "userfaultfd": 323,
    "io_uring_setup": 425,
    "open_tree": 428,
    "pidfd_open": 434,
    "pidfd_getfd": 438,
}


class Handle(ctypes.Structure):
    """struct file_handle."""

    _fields_ = (("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("data", ctypes.c_ubyte * 128))


def call(name: str, *args: object) -> int:
    result = int(libc.syscall(NUMBERS[name], *args))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def read(path: str) -> str:
    with open(path, "rb") as file:
        return f"read {len(file.read(64))} bytes"


def listed(path: str) -> str:
    found = os.listdir(path)
    if not found:
        raise OSError(errno.ENOENT, "it is empty")
    return f"{len(found)} names"


def by_handle(kind: str, data: str, folder: str) -> str:
    handle = Handle(len(data) // 2, int(kind))
    ctypes.memmove(handle.data, bytes.fromhex(data), len(data) // 2)
    mount = os.open(folder, os.O_RDONLY)
    fd = call("open_by_handle_at", mount, ctypes.byref(handle), os.O_RDONLY)
    return f"read {len(os.read(fd, 64))} bytes"


def memory(pid: int, name: str) -> int:
    class Iovec(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))

    here = ctypes.create_string_buffer(8)
    with open(f"/proc/{pid}/maps") as maps:
        start = int(maps.readline().split("-")[0], 16)
    ours, theirs = Iovec(ctypes.addressof(here), 8), Iovec(start, 8)
    return call(name, pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)


def write(path: str) -> str:
    with open(path, "w") as file:
        file.write("x")
    os.unlink(path)
    return "written"


def connect(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
    return "connected"


def raise_rights() -> None:
    # capset(2), version 3: all permitted and effective.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)(*([0xFFFFFFFF] * 6))
    code = libc.syscall(126, header, data)
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main(kind: str, data: str, folder: str, secret: str, process: str) -> None:
    pid = int(process)
    zero = ctypes.c_char_p(b"")

    def pidfd() -> int:
        return call("pidfd_open", pid, 0)

    ways: dict[str, Callable[[], object]] = {
        "the secret by its path": lambda: read(secret),
        "the secret by its handle": lambda: by_handle(kind, data, folder),
        "the secret by another's root": lambda: read(f"/proc/{pid}/root{secret}"),
        "/etc/shadow": lambda: read("/etc/shadow"),
        "libvirt's secrets": lambda: listed("/etc/libvirt"),
        "the daemon's state": lambda: listed("/var/lib/provider-proxy"),
        "the daemon's configuration": lambda: listed("/etc/provider-proxy"),
        "root's home": lambda: listed("/root"),
        "another's environment": lambda: read(f"/proc/{pid}/environ"),
        "another's memory": lambda: read(f"/proc/{pid}/mem"),
        "reading another's memory": lambda: memory(pid, "process_vm_readv"),
        "writing another's memory": lambda: memory(pid, "process_vm_writev"),
        "tracing another": lambda: call("ptrace", PTRACE_ATTACH, pid, 0, 0),
        "another's descriptor": lambda: call("pidfd_getfd", pidfd(), 0, 0),
        "a signal to another": lambda: os.kill(pid, 18),
        "another's mounts": lambda: call("setns", os.open(f"/proc/{pid}/ns/mnt", 0), 0),
        "a mount": lambda: call("mount", b"tmpfs", b"/tmp", b"tmpfs", 0, zero),
        "a tree of mounts": lambda: call("open_tree", -100, b"/", 1),
        "another root": lambda: call("chroot", b"/tmp"),
        "a namespace of users": lambda: call("unshare", CLONE_NEWUSER),
        "a namespace of mounts": lambda: call("unshare", CLONE_NEWNS),
        "IPv4": lambda: socket.socket(socket.AF_INET).close(),
        "IPv6": lambda: socket.socket(socket.AF_INET6).close(),
        "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close(),
        "packets": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
        "the system's bus": lambda: connect("/run/dbus/system_bus_socket"),
        "systemd": lambda: connect("/run/systemd/private"),
        "libvirt": lambda: connect("/run/libvirt/libvirt-sock"),
        "the hooks' socket of the daemon": lambda: connect("/run/provider-proxy/vtpm.sock"),
        "the TPM": lambda: os.open("/dev/tpmrm0", os.O_RDWR),
        "the kernel's memory": lambda: os.open("/dev/mem", os.O_RDONLY),
        "a device": lambda: os.mknod("/tmp/device", 0o20666, os.makedev(1, 1)),
        "root": lambda: os.setuid(0),
        "all rights": raise_rights,
        "the programs": lambda: write("/usr/bin/x"),
        "the root": lambda: write("/x"),
        "/etc": lambda: write("/etc/x"),
        "a status file": lambda: write(f"{folder}/x.xml"),
        "a mark": lambda: write("/run/provider-proxy-hooks/x"),
        "a state": lambda: write("/var/lib/libvirt/swtpm/x"),
        "the kernel's settings": lambda: write("/proc/sys/kernel/core_pattern"),
        "control groups": lambda: write("/sys/fs/cgroup/x"),
        "memory to write and run": lambda: mmap.mmap(
            -1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        ),
        "io_uring": lambda: call("io_uring_setup", 8, (ctypes.c_uint8 * 256)()),
        "bpf": lambda: call("bpf", 5, (ctypes.c_uint8 * 128)(), 128),
        "perf": lambda: call("perf_event_open", (ctypes.c_uint8 * 128)(), 0, -1, -1, 0),
        "page faults": lambda: call("userfaultfd", 0),
        "a key": lambda: call("add_key", b"user", b"x", b"y", 1, -3),
        "a module": lambda: call("init_module", 0, 0, b""),
        "another kernel": lambda: call("kexec_load", 0, 0, 0, 0),
        "ports": lambda: call("iopl", 3),
        "swap": lambda: call("swapon", b"/x", 0),
        "the clock": lambda: call("settimeofday", 0, (ctypes.c_int * 2)()),
        "the host's name": lambda: call("sethostname", b"x", 1),
        "a restart": lambda: call("reboot", 0, 0, 0, 0),
    }
    with contextlib.suppress(OSError):
        Path(
            "/run/escaped"
        ).touch()  # where the sandbox has a /run of its own, the scene finds nothing
    found = {}
    for name, way in ways.items():
        try:
            found[name] = f"OPEN: {way()}"
        except (OSError, ValueError) as exc:
            found[name] = errno.errorcode.get(getattr(exc, "errno", 0) or 0, str(exc))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
