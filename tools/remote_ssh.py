"""The connection of `tools/remote.py`: calls over ssh, and what their failures mean."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

NO_PYTHON = 90
SSH = "ssh -T -a -x -o BatchMode=yes -o ConnectTimeout=15 -o RemoteCommand=none".split()
SSH += "-o ServerAliveInterval=5 -o ServerAliveCountMax=3".split()
# What ssh, rsync and the box say when they fail: what it means, and the way out.
TROUBLES = {
    "No space left|[Qq]uota exceeded": (
        "the disk of {host} is full",
        "free some of it, or name a folder on another disk with --folder (make: FOLDER=)",
    ),
    "Could not resolve|not known": (
        "{host} has no address",
        "check the spelling and ~/.ssh/config",
    ),
    "[Hh]ost key|HOST IDENTIFICATION": (
        "ssh does not know {host}'s key",
        "connect once by hand, `ssh {host}`, and check the fingerprint",
    ),
    r"Permission denied \(|authentication failures": (
        "{host} refuses the login",
        "install a key, `ssh-copy-id {host}`: nobody is asked for a password here",
    ),
    "": ("{host} cannot be reached", "see whether it is up and `ssh {host} true` works"),
}
INSTALL = {"ssh": "the OpenSSH client (Debian: apt-get install openssh-client)"}

Feed = Callable[[IO[bytes]], object] | None
Sink = Callable[[bytes], object] | None


class Problem(Exception):
    """What stops the tool; the message says the way out."""


class Unreachable(Problem):
    """No connection, or it broke: worth another try when a run is going on."""


@dataclass(frozen=True)
class Box:
    """The machine `host`, and the folder `path` of the run on it; no shell reads either."""

    host: str
    path: str

    def prepare(self, need: int) -> bytes:
        """A folder for the run with the far half in it, on a disk that has `need` bytes."""
        test = 'python3 -c "import sys; sys.exit(sys.version_info < (3, 8))"'
        script = f"{test} || exit {NO_PYTHON}; umask 077; mkdir -p {self.path} && "
        script += f"cat > {self.path}/box.py && exec python3 {self.path}/box.py prepare {need}"
        far_half = Path(__file__).with_name("remote_box.py").read_bytes()
        return self.shell(script, lambda pipe: pipe.write(far_half))

    def verb(self, *words: str, feed: Feed = None, sink: Sink = None) -> bytes:
        """A verb of remote_box.py: what it prints, when there is no `sink` for it."""
        script = f"umask 077; exec python3 {self.path}/box.py {' '.join(words)}"
        return self.shell(script, feed, sink)

    def shell(self, script: str, feed: Feed = None, sink: Sink = None) -> bytes:
        """A script without single quotes, whatever the user's own shell there is."""
        return self.call([*SSH, "--", self.host, f"sh -c '{script}'"], feed, sink)

    def call(self, words: list[str], feed: Feed = None, sink: Sink = None) -> bytes:
        """Run ssh or rsync: `feed` writes its input, `sink` takes its output piece by piece."""
        source = subprocess.PIPE if feed else subprocess.DEVNULL
        kept: list[bytes] = []
        with tempfile.TemporaryFile() as errors:
            try:
                process = subprocess.Popen(
                    words, stdin=source, stdout=subprocess.PIPE, stderr=errors
                )
            except FileNotFoundError:
                way = INSTALL.get(words[0], f"{words[0]}, or copy without it: --copy tar")
                raise Problem(f"{words[0]} is not on PATH; install {way}") from None
            try:
                if feed and process.stdin:
                    with suppress(BrokenPipeError):  # its exit status and stderr tell why
                        feed(process.stdin)
                    with suppress(BrokenPipeError):
                        process.stdin.close()
                while process.stdout and (piece := os.read(process.stdout.fileno(), 1 << 16)):
                    (sink or kept.append)(piece)
                code = process.wait()
            except BaseException:
                process.kill()
                process.wait()
                raise
            errors.seek(0)
            self.check(words[0], code, errors.read().decode(errors="replace").strip())
        return b"".join(kept)

    def check(self, program: str, code: int, said: str) -> None:
        """Raise what the exit status and stderr of a program mean, unless they mean success."""
        if code == 0:
            return
        if code == NO_PYTHON:
            way = "install one, or put it on the PATH of `ssh HOST COMMAND`"
            raise Problem(f"{self.host} has no python3 of version 3.8 or newer; {way}")
        pattern = next(p for p in TROUBLES if re.search(p, said))
        lost = code < 0 or code > 128  # 255 says ssh, 128 + n a shell whose child a signal ended
        said = said[-2000:] or f"exit status {code} and no message"
        if not pattern and not lost:
            way = "; `--copy tar` does without rsync (make: COPY=tar)" if program == "rsync" else ""
            raise Problem(f"{self.host}: {said}{way}")
        what, way = (text.format(host=self.host) for text in TROUBLES[pattern])
        raise (Unreachable if lost else Problem)(f"{what}; {way}\n{said}")
