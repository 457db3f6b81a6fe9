"""The far half of `tools/remote.py`: what happens on the box, in the folder of one run.

`python3 box.py VERB [ARGUMENT ...]`, a copy of this file in that folder, beside

    command      what to run                       log    what it says, both streams
    tree/        the sources, where it runs        exit   JSON, once it has ended
    out/         $DSV4_OUT, what to bring back     stop   there once somebody wants it to end
                                                   lock   held while its supervisor lives

Python 3.8 and the standard library, for the box may have no other.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

RUN = Path(__file__).resolve().parent
REFUSED = 91
SIGNALS = {"interrupted": signal.SIGINT, "time limit": signal.SIGTERM}
STATUS = {"interrupted": 130, "time limit": 124}
LOST = (
    "the run's supervisor died before it could record an exit status. A full disk, the memory "
    "killer and a reboot do that, and so does a login manager that ends the processes of users who "
    "leave (`loginctl enable-linger` forbids it). What is left lies in "
)


class Refused(Exception):
    """What the box will not or cannot do; the message is for the user."""


def prepare(need: str) -> None:
    """Folders for the run, when the disk has `need` bytes; says whether there is an rsync."""
    free = shutil.disk_usage(RUN).free
    if free < int(need):
        raise Refused(f"No space left on device: {RUN} needs {need} bytes and has {free}")
    for name in ("tree", "out"):
        (RUN / name).mkdir(exist_ok=True)
    print(json.dumps({"rsync": shutil.which("rsync") is not None}))


def unpack() -> None:
    """Sources from a tar stream on stdin."""
    safe: Any = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
        archive.extractall(RUN / "tree", **safe)


def start(limit: str, grace: str, size: str) -> None:
    """Start the command on stdin under a supervisor of its own session; done once however often."""
    command = sys.stdin.buffer.read()
    if len(command) != int(size):
        raise Refused("the command came incomplete; run again")
    with (RUN / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if (RUN / "command").exists():
            return
        (RUN / "command").write_bytes(command)
        with (RUN / "log").open("ab") as log:
            subprocess.Popen(
                [sys.executable, __file__, "supervise", limit, grace],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )


def supervise(limit: str, grace: str) -> None:
    """Run the command as a process group, end the group when it is time, record how it went."""
    began = time.monotonic()
    env = dict(os.environ, DSV4_OUT=str(RUN / "out"), PYTHONUNBUFFERED="1")
    shell = ["sh", str(RUN / "command")]  # a file: arguments are for every user of the box to see
    child = subprocess.Popen(shell, cwd=RUN / "tree", env=env, start_new_session=True)
    why = ""
    while child.poll() is None and not why:
        if (RUN / "stop").exists():
            why = "interrupted"
        elif time.monotonic() - began > float(limit):
            why = "time limit"
        else:
            time.sleep(0.1)
    end_group(child, SIGNALS.get(why, signal.SIGKILL), float(grace) if why else 0)
    code = child.wait()
    status = STATUS.get(why, code if code >= 0 else 128 - code)
    seconds = round(time.monotonic() - began, 1)
    size = (RUN / "log").stat().st_size
    how = {"status": status, "why": why, "seconds": seconds, "log": size}
    (RUN / "exit.part").write_text(json.dumps(how))
    (RUN / "exit.part").rename(RUN / "exit")


def end_group(child: subprocess.Popen[bytes], first: int, grace: float) -> None:
    """Send `first` to the group of `child`, and SIGKILL to what is left of it `grace` s later."""
    deadline = time.monotonic() + grace
    try:
        os.killpg(child.pid, first)
        while time.monotonic() < deadline:
            child.poll()
            os.killpg(child.pid, 0)
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all gone


def ended() -> dict[str, Any] | None:
    """How the run went, or None as long as it goes on."""
    try:
        return json.loads((RUN / "exit").read_text())
    except FileNotFoundError:
        return None


def running() -> bool:
    """Whether the supervisor lives."""
    with (RUN / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def follow(offset: str) -> None:
    """The log from byte `offset` on, until the run has ended."""
    with (RUN / "log").open("rb") as log:
        log.seek(int(offset))
        while True:
            alive, how = running(), ended()  # in this order, and both before the read
            room = how["log"] - log.tell() if how else 1 << 16
            chunk = log.read(min(room, 1 << 16))
            if chunk:
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
            elif how:
                return
            elif not alive:
                raise Refused(LOST + str(RUN))
            else:
                time.sleep(0.1)


def stop() -> None:
    """Ask the supervisor to end the run."""
    (RUN / "stop").touch()


def results() -> None:
    """A tar stream of out/, its files and folders, and of status.json, which names what is not."""
    how, left_out = ended(), []
    if how is None:
        raise Refused("the run has not ended")
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as archive:
        for path in sorted((RUN / "out").rglob("*")):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                left_out.append(str(path.relative_to(RUN)))
            else:
                archive.add(path, str(path.relative_to(RUN)), recursive=False)
        (RUN / "status.json").write_text(json.dumps(dict(how, left_out=left_out)))
        archive.add(RUN / "status.json", "status.json")


def remove() -> None:
    """Delete the run, unless it goes on; its sources stay, for the next rsync to start from."""
    if (RUN / "lock").exists() and running():
        raise Refused("the run goes on")
    last = RUN.parent / "last"
    shutil.rmtree(last, ignore_errors=True)
    if (RUN / "tree").exists() and not last.exists():
        (RUN / "tree").rename(last)
    shutil.rmtree(RUN)


def main() -> int:
    verbs = (prepare, unpack, start, supervise, follow, stop, results, remove)
    try:
        {verb.__name__: verb for verb in verbs}[sys.argv[1]](*sys.argv[2:])
    except Refused as refused:
        print(refused, file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
