"""Where code that a model wrote is run: a process group of its own, with nothing to reach and little to use up.

It has no network, no environment and no other process in sight, a file system of which only an empty /tmp can be
written, and limits of time, memory, processes, files and output. The walls are the kernel's namespaces, put up by
bubblewrap, or by util-linux's unshare where that is not installed. Where neither works nothing is run at all: limits
alone would keep no code from reading the caller's files.

What the limits do not hold is the sum: so many processes may have so much memory each.
"""

import contextlib
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import IO, Literal, Self

from leanseek.config import BadInput

SCRATCH_BYTES = 1 << 25  # of /tmp inside
UIDS = range(40_000, 60_000)  # inside, where the caller is root: each call one that nobody else has, so none is counted
STARTING = 10.0  # seconds that putting the walls up may take on a busy machine, beside the time of the code

# Runs inside, before the code and with its rights: reads what to do, gives up what it holds, then does it. The limits
# are hard ones, and without capabilities nobody raises them again.
#
# The filter of system calls closes one way around the limits: in a namespace of its own the code could mount memory.
PRELUDE = """
import ctypes, json, os, platform, resource, struct, sys
told = json.loads(sys.stdin.buffer.read())
limits = told["limits"]
if told["uid"] is not None:
    os.setgroups([])
    os.setresgid(told["uid"], told["uid"], told["uid"])
    os.setresuid(told["uid"], told["uid"], told["uid"])
resource.setrlimit(resource.RLIMIT_CPU, (int(limits["seconds"]) + 1, int(limits["seconds"]) + 2))
for name, value in (
    ("AS", limits["memory_bytes"]),
    ("FSIZE", limits["file_bytes"]),
    ("NOFILE", limits["files"]),
    ("NPROC", limits["processes"]),
    ("CORE", 0),
):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
machine, clone, unshare, setns = {
    "x86_64": (0xC000003E, 56, 272, 308), "aarch64": (0xC00000B7, 220, 97, 268)
}[platform.machine()]
load, equal, at_least, has, answer = 0x20, 0x15, 0x35, 0x45, 0x06
refused, unknown, allowed, clone3, new_user = 0x50001, 0x50026, 0x7FFF0000, 435, 0x10000000
steps = [
    (load, 0, 0, 4), (equal, 0, 9, machine),
    (load, 0, 0, 0), (at_least, 7, 0, 0x40000000), (equal, 6, 0, unshare), (equal, 5, 0, setns),
    (equal, 5, 0, clone3), (equal, 0, 2, clone),
    (load, 0, 0, 16), (has, 1, 0, new_user),
    (answer, 0, 0, allowed), (answer, 0, 0, refused), (answer, 0, 0, unknown),
]
kept = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
rules = ctypes.create_string_buffer(struct.pack("HL", len(steps), ctypes.addressof(kept)))
prctl = ctypes.CDLL(None).prctl
if prctl(38, 1, 0, 0, 0) or prctl(22, 2, rules, 0, 0):
    sys.exit("the filter of system calls cannot be set")
sys.stdin = open(os.devnull)
os.dup2(sys.stdin.fileno(), 0)
os.write(1, b"+")
del ctypes, json, platform, resource, struct, limits, name, value, kept, rules, prctl, steps
exec(compile(told["code"], "<code>", "exec"), {"__name__": "__main__"})
"""

# The walls without bubblewrap, put up by a process that is alone in new namespaces: $1 becomes the root, and what is
# bound into it is named behind. The last step gives every capability away for good.
WALLS = """
set -e
root=$1; scratch=$2; shift 2
mount --make-rprivate /
mount -t tmpfs -o mode=755,size=1m walls "$root"
cd "$root"
mkdir proc dev tmp old
while [ "$1" != -- ]; do
    mkdir -p ".$1"
    mount --rbind "$1" ".$1"
    mount -o remount,bind,ro,nosuid ".$1"
    shift
done
shift
for name in bin lib lib64; do
    [ ! -L "/$name" ] || ln -s "$(readlink "/$name")" "$name"
done
mount -t proc -o nosuid,nodev,noexec proc proc
for name in null zero urandom; do
    : > "dev/$name"
    mount --bind "/dev/$name" "dev/$name"
done
mount -t tmpfs -o "mode=1777,nosuid,nodev,size=$scratch" scratch tmp
pivot_root . old
umount -l old
mount -o remount,bind,ro /
cd /tmp
exec "$@"
"""


@dataclass(frozen=True)
class Limits:
    """seconds: by the clock, and of each process's CPU. memory_bytes: of addresses, each process. files: open ones."""

    seconds: float = 5.0
    memory_bytes: int = 1 << 29
    file_bytes: int = 1 << 23
    files: int = 64
    processes: int = 16
    output_bytes: int = 1 << 16


LIMITS = Limits()


@dataclass(frozen=True)
class Ran:
    """What came of it. `exit_code` is negative for a signal, as of a process; None where it had to be ended."""

    ended: Literal["itself", "time", "output"]
    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True)
class Sandbox:
    """`isolation` says which walls stand: "bubblewrap" or "namespaces"."""

    isolation: Literal["bubblewrap", "namespaces"]

    @classmethod
    def find(cls) -> Self:
        """The best walls that hold here, tried out. Raises BadInput where none do."""
        tried = []
        for isolation in ("bubblewrap", "namespaces"):
            sandbox = cls(isolation)
            try:
                ran = sandbox.run("print(6 * 7)")
                said = ran.stderr.strip().splitlines()
            except OSError as error:
                tried.append(f"{isolation}: {error.strerror or error}")
                continue
            if ran.exit_code == 0 and ran.stdout == "42\n":
                return sandbox
            tried.append(f"{isolation}: {said[-1] if said else ran.ended}")
        raise BadInput(
            "code can only be run behind real walls, and there are none here: install bubblewrap, or allow user "
            f"namespaces ({'; '.join(tried)})"
        )

    def run(self, code: str, limits: Limits = LIMITS) -> Ran:
        """Runs Python source to its end, or to a limit. Raises OSError where the walls cannot be put up."""
        # Root has no limit of processes, whoever it claims to be inside; so it turns into somebody else there.
        uid = secrets.choice(UIDS) if os.geteuid() == 0 else None
        python = [_python(), "-I", "-S", "-B", "-c", PRELUDE]
        with tempfile.TemporaryDirectory(prefix="walls-") as folder:
            task = Path(folder) / "task"
            task.write_text(dumps({"limits": asdict(limits), "uid": uid, "code": code}), encoding="utf-8")
            walls = _bubblewrap(uid) if self.isolation == "bubblewrap" else _namespaces(Path(folder), uid)
            with task.open("rb") as stdin:  # for reading only: it is the one thing of ours that is within reach
                return _watched([*walls, *python], stdin, limits)


def _python() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(sys.executable)


def _shown() -> list[str]:
    """What can be read inside: the system's programs, and this Python where it lives elsewhere."""
    home = str(Path(sys.base_prefix).resolve())
    real = [name for name in ("/bin", "/lib", "/lib64") if Path(name).is_dir() and not Path(name).is_symlink()]
    return ["/usr", *real, *([] if home.startswith("/usr") else [home])]


def _bubblewrap(uid: int | None) -> list[str]:
    binary = shutil.which("bwrap")
    if binary is None:
        raise FileNotFoundError(2, "bwrap is not installed")
    command = [binary, "--die-with-parent", "--new-session", "--clearenv", "--hostname", "walls"]
    command += ["--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if uid is None:
        command += ["--unshare-user", "--uid", "1000", "--gid", "1000", "--cap-drop", "ALL"]
    else:
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    for place in _shown():
        for folder in reversed(Path(place).parents[:-1]):  # bubblewrap would close them to all but root
            command += ["--perms", "0755", "--dir", str(folder)]
        command += ["--ro-bind", place, place]
    for name in ("bin", "lib", "lib64"):
        if Path("/", name).is_symlink():
            command += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
    command += ["--proc", "/proc", "--dev", "/dev", "--size", str(SCRATCH_BYTES), "--perms", "1777", "--tmpfs", "/tmp"]
    # bubblewrap's own /dev and root are memory too, and could be filled.
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--"]


def _namespaces(folder: Path, uid: int | None) -> list[str]:
    binary, setpriv = shutil.which("unshare"), shutil.which("setpriv")
    if binary is None or setpriv is None:
        raise FileNotFoundError(2, "unshare and setpriv are not installed")
    command = [binary, "--net", "--pid", "--ipc", "--uts", "--mount", "--fork", "--kill-child"]
    command += [] if uid is not None else ["--user", "--map-root-user"]
    root = folder / "root"
    root.mkdir()
    command += ["/bin/sh", "-c", WALLS, "walls", str(root), str(SCRATCH_BYTES), *_shown(), "--"]
    # Becoming somebody else needs two capabilities once more; they go when it is done, and cannot come back.
    keep = "-all,+setuid,+setgid" if uid is not None else "-all"
    return [*command, "/usr/bin/env", "-i", setpriv, "--no-new-privs", "--inh-caps=-all", f"--bounding-set={keep}"]


def _watched(command: list[str], stdin: IO[bytes], limits: Limits) -> Ran:
    """Runs the command until it ends or goes too far; then its whole group is ended, and with it all inside."""
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    said: dict[IO[bytes], bytearray] = {process.stdout: bytearray(), process.stderr: bytearray()}
    ended: Literal["itself", "time", "output"] = "itself"
    ends, started = began + STARTING, False
    try:
        with selectors.DefaultSelector() as waiting:
            for pipe in said:
                waiting.register(pipe, selectors.EVENT_READ)
            while waiting.get_map() and ended == "itself":
                for key, _ in waiting.select(max(0.0, min(ends - time.monotonic(), 0.5))):
                    pipe = key.fileobj  # type: ignore[assignment]
                    piece = os.read(key.fd, 1 << 16)
                    said[pipe] += piece
                    if not piece:
                        waiting.unregister(pipe)
                if not started and said[process.stdout]:  # the prelude's sign: from now on it is the code's time
                    started, began = True, time.monotonic()
                    ends = began + limits.seconds
                if sum(map(len, said.values())) > limits.output_bytes + 1:
                    ended = "output"
                elif time.monotonic() > ends and process.poll() is None:
                    ended = "time"
                elif process.poll() is not None and not waiting.select(0):
                    break
    finally:
        _end(process)
    out, err = (_text(bytes(said[pipe][: limits.output_bytes + 1])) for pipe in (process.stdout, process.stderr))
    if not started:
        raise OSError(0, err.strip().splitlines()[-1] if err.strip() else "the walls did not stand in time")
    code = process.returncode if ended == "itself" else None
    return Ran(ended, _signal_or_code(code), out.removeprefix("+"), err, time.monotonic() - began)


def _end(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _signal_or_code(code: int | None) -> int | None:
    """Both wallmakers report a signal inside as 128 and its number, as a shell does."""
    return code if code is None or code <= 128 else 128 - code


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")
