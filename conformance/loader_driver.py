"""Runs an embedded loader, shut off: this file is a program for `python -I -B`, started by isolate.py and never imported.

    loader_driver.py PIPE LOADER REPO LIMITS

It gives up network, sockets, other processes, capabilities and the right to write; limits memory and time; says on the
pipe what it has given up; waits for a byte on its standard input (with torch imported, as loaders need it); and only then
loads LOADER and writes each weight of REPO to the pipe: a line of JSON, then the raw bytes.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import resource
import signal
import socket
import struct
import sys

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_REC, MS_PRIVATE = 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
# of a processor: AUDIT_ARCH (linux/audit.h), and the number of the system call `socket` (asm/unistd.h); that of
# io_uring_setup is the same everywhere
SOCKET = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
IO_URING_SETUP, X32 = 425, 0x40000000
CHUNK = 2**24

NAMES = {
    **{
        f"torch.{kind}{bits}": f"{short}{bits}"
        for kind, short in (("int", "I"), ("uint", "U"), ("float", "F"))
        for bits in (8, 16, 32, 64)
    },
    "torch.bool": "BOOL",
    "torch.bfloat16": "BF16",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e4m3fn": "F8_E4M3",
}


def give_up_namespaces() -> set[str]:
    """Leaves what can be left of the host, and names it."""
    libc = ctypes.CDLL(None, use_errno=True)
    others = CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID
    for flags in (
        CLONE_NEWUSER | CLONE_NEWNET | others,
        CLONE_NEWNET | others,
        CLONE_NEWUSER | CLONE_NEWNET,
        CLONE_NEWNET,
    ):
        if libc.unshare(flags) == 0:
            break
    else:
        return set()
    given_up = {"network"} if [name for _, name in socket.if_nameindex()] in ([], ["lo"]) else set()
    if flags & CLONE_NEWNS:
        # the whole tree of mounts, read-only: struct mount_attr {attr_set, attr_clr, propagation, userns_fd}
        attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
        private = libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None) == 0
        if private and libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(attributes), 32) == 0:
            given_up.add("writing")
    if flags & CLONE_NEWPID:
        # the next child is the first process of the new namespace: when it ends, so does everything it started
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            os._exit(os.waitstatus_to_exitcode(status) & 0x7F if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        given_up.add("processes")
    return given_up


def give_up_capabilities() -> None:
    """Without these, what was given up cannot be taken back."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capset(ctypes.byref(header), ctypes.byref(none))


def give_up_sockets() -> bool:
    """Makes no socket from now on: those of other programs, such as the session bus, are files, and in no namespace."""
    if os.uname().machine not in SOCKET:
        return False
    machine, number = SOCKET[os.uname().machine]
    load, equal, least, answer = 0x20, 0x15, 0x35, 0x06  # BPF's ld [k], jeq, jge and ret
    refuse, allow = 0x00050001, 0x7FFF0000  # with EPERM
    program = [
        *((load, 0, 0, 4), (equal, 0, 5, machine)),  # seccomp_data.arch: no other's numbers
        *((load, 0, 0, 0), (least, 3, 0, X32), (equal, 2, 0, number), (equal, 1, 0, IO_URING_SETUP)),
        *((answer, 0, 0, allow), (answer, 0, 0, refuse)),
    ]
    text = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.c_void_p))

    filter = Program(len(program), ctypes.addressof(text))
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(filter), 0, 0) == 0)


def set_limits(limits: dict[str, int]) -> None:
    wanted = {
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_CPU: limits["seconds"] * (os.cpu_count() or 1),
        resource.RLIMIT_FSIZE: 2**20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 4096,
    }
    for name, value in wanted.items():
        hard = resource.getrlimit(name)[1]
        most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
        later = 1 if name == resource.RLIMIT_CPU else 0  # or SIGKILL would come in the place of SIGXCPU, which says why
        resource.setrlimit(name, (min(value, most), min(value + later, most)))


def main() -> None:
    pipe, loader, repository, limits = int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
    given_up = give_up_namespaces()
    set_limits(limits)
    give_up_capabilities()
    if not give_up_sockets():
        given_up.discard("network")
    with os.fdopen(pipe, "wb", buffering=0) as out:

        def write(data: memoryview) -> None:
            while data:
                data = data[out.write(data[:CHUNK]) or 0 :]

        def say(**event: object) -> None:
            write(memoryview(json.dumps(event).encode() + b"\n"))

        say(event="isolated", given_up=sorted(given_up))
        if "network" not in given_up and not limits["allow_network"]:
            return
        with contextlib.suppress(ImportError):
            importlib.import_module("torch")
        if not sys.stdin.buffer.read(1):
            return
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        try:
            specification = importlib.util.spec_from_file_location("load_quantized", loader)
            assert specification and specification.loader
            module = importlib.util.module_from_spec(specification)
            sys.modules["load_quantized"] = module  # dataclasses look their module up
            specification.loader.exec_module(module)
            with module.open_repo(repository) as repo:
                for name in repo.names():
                    tensor = repo.dequantize(name).detach().cpu().contiguous()
                    data = memoryview(tensor.reshape(-1).view(sys.modules["torch"].uint8).numpy())
                    dtype = NAMES.get(str(tensor.dtype), str(tensor.dtype))
                    say(event="tensor", name=name, dtype=dtype, shape=list(tensor.shape), size=len(data))
                    write(data)
                    del tensor, data
            say(event="end")
        except BaseException as error:
            say(event="error", type=type(error).__name__, message=str(error)[:2000])


if __name__ == "__main__":
    main()
