"""Run the GPU tests, or any command, on another machine: the sources there, log and results back.

`python tools/remote.py HOST [--run COMMAND] [--limit SECONDS]`, or `make gpu HOST=...`

The run goes on when the connection drops; this end reconnects and streams on from where it was.
Ctrl-C and the limit end every process of the run's group. Into build/gpu/<run> come `log`,
`status.json` and `out/`, all that the command wrote under $DSV4_OUT. The exit status is the
command's, 124 at the limit, 130 after Ctrl-C, 125 when this tool itself fails.
The connection is in `remote_ssh.py`, the far half in `remote_box.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from remote_ssh import SSH, Box, Problem, Unreachable

FAILED = 125
# No character that a shell reads, and no option: these go into commands as they are.
CHECKED = {
    "host": (r"\w[\w.+%-]*(@\w[\w.%-]*)?", "[USER@]NAME; a port belongs into ~/.ssh/config"),
    "folder": (r"[\w./][\w./-]*", "letters, digits and ./_- only"),
    "attach": (r"\w[\w-]*", "the name of a run, as printed when it began"),
    "limit": (r"[1-9]\d{0,7}", "seconds, a whole number above 0"),
    "grace": (r"\d{1,4}", "seconds, a whole number"),
}


def later(run: str) -> str:
    """What the user can do who ends this end."""
    return f"\nIf the run had begun, it goes on up to its limit: --attach {run}"


def say(text: str) -> None:
    print(f"remote: {text}", file=sys.stderr, flush=True)


def sources() -> list[str]:
    """What git tracks here, and what it neither tracks nor ignores."""
    command = "git ls-files -z --cached --others --exclude-standard".split()
    listed = subprocess.run(command, capture_output=True)
    if listed.returncode:
        said = listed.stderr.decode(errors="replace").strip()
        raise Problem(f"{said}; run this in a git checkout: git says what to copy")
    names = sorted({os.fsdecode(name) for name in listed.stdout.split(b"\0") if name})
    return [name for name in names if os.path.islink(name) or os.path.isfile(name)]


def copy(box: Box, means: str) -> None:
    """The sources into a new folder on the box, with rsync when both ends have it."""
    names = sources()
    there = json.loads(box.prepare(2 * sum(os.lstat(name).st_size for name in names)))
    if means == "auto":
        means = "rsync" if there["rsync"] and shutil.which("rsync") else "tar"
    say(f"copying {len(names)} files to {box.host} with {means}")
    if means == "tar":
        box.verb("unpack", feed=partial(pack, names))
        return
    rsync = "rsync -lptcz --files-from=- --from0 --copy-dest=../../last -e".split()
    paths = b"".join(b"./" + os.fsencode(name) + b"\0" for name in names)
    words = [*rsync, " ".join(SSH), ".", f"{box.host}:{box.path}/tree/"]
    box.call(words, lambda pipe: pipe.write(paths))


def pack(names: list[str], pipe: IO[bytes]) -> None:
    """A tar stream of the files."""
    with tarfile.open(fileobj=pipe, mode="w|") as archive:
        for name in names:
            archive.add(name, recursive=False)


def persist(box: Box, patience: float, action: Callable[[], bytes]) -> None:
    """`action`, again when the connection drops, until there has been none for `patience` s."""
    lost_since, pause = None, 0.5
    while True:
        began = time.monotonic()
        try:
            action()
            return
        except Unreachable as lost:
            now = time.monotonic()
            if lost_since is None or now - began > 20:  # longer than a failing connection takes
                lost_since, pause = now, 0.5
            if now - lost_since > patience:
                raise Problem(f"{lost}{later(Path(box.path).name)}") from lost
            say(f"lost {box.host} ({str(lost).splitlines()[-1]}), the run goes on; trying again")
            time.sleep(pause)
            pause = min(2 * pause, 30)


def launch(box: Box, options: argparse.Namespace) -> None:
    """Copy the sources and start the command; nothing stays on the box when that fails."""
    command = os.fsencode(options.run or "python3 -m pytest -m gpu tests")
    try:
        copy(box, options.copy)
        words = ("start", options.limit, options.grace, str(len(command)))
        begin = partial(box.verb, *words, feed=lambda pipe: pipe.write(command))
        persist(box, options.patience, begin)
    except Unreachable:
        raise
    except BaseException:
        with suppress(Problem):
            box.verb("stop")
            box.verb("remove")
        raise


def watch(box: Box, into: Path, patience: float) -> None:
    """Stream the log to the terminal and to a file, whose size says where to go on."""
    with (into / "log").open("ab") as log:

        def sink(piece: bytes) -> None:
            for file in (log, sys.stdout.buffer):
                file.write(piece)
                file.flush()

        persist(box, patience, lambda: box.verb("follow", str(log.tell()), sink=sink))


def fetch(box: Box, into: Path, patience: float) -> dict[str, Any]:
    """Bring the results of an ended run; how it went."""
    part = into / "results.part"

    def receive() -> bytes:
        with part.open("wb") as file:
            return box.verb("results", sink=file.write)

    persist(box, patience, receive)
    with tarfile.open(part) as archive:
        archive.extractall(into, filter="data")
    part.unlink()
    how = json.loads((into / "status.json").read_text())
    if (into / "log").stat().st_size != how["log"]:
        raise Problem(f"{into}/log is not the run's; delete it and run again with --attach")
    return how


def drive(box: Box, into: Path, options: argparse.Namespace) -> int:
    """The whole run; its exit status."""
    into.mkdir(parents=True, exist_ok=True)
    if not options.attach:
        launch(box, options)
    say(f"run {into.name} on {box.host}; should this end die: --attach {into.name}")
    try:
        if options.stop:
            raise KeyboardInterrupt
        watch(box, into, options.patience)
    except KeyboardInterrupt:
        say(f"ending the run on {box.host}; Ctrl-C again leaves it to its limit")
        persist(box, options.patience, partial(box.verb, "stop"))
        watch(box, into, options.patience)
    how = fetch(box, into, options.patience)
    with suppress(Unreachable):
        box.verb("remove")
    for name in how["left_out"]:
        say(f"left on the box, for it is neither a file nor a folder: {name!r}")
    why = f" ({how['why']})" if how["why"] else ""
    say(f"exit status {how['status']}{why} after {how['seconds']} s; results in {into}")
    return how["status"]


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, each checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("host", help="[USER@]NAME, as ssh takes it")
    parser.add_argument("--run", default="", help="shell command; default: the GPU tests")
    parser.add_argument("--limit", default="3600", help="seconds until the run is ended")
    parser.add_argument("--grace", default="10", help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("--folder", default=".cache/dsv4-gpu", help="where runs live on the box")
    parser.add_argument("--copy", choices=["auto", "rsync", "tar"], default="auto")
    parser.add_argument("--patience", type=float, default=600, help="seconds without connection")
    parser.add_argument("--attach", metavar="RUN", help="go on with a run that was started before")
    parser.add_argument("--stop", action="store_true", help="end that run")
    options = parser.parse_args(argv)
    for name, (pattern, expected) in CHECKED.items():
        value = getattr(options, name) or ("" if name in ("host", "limit") else None)
        if value is not None and not re.fullmatch(pattern, value, re.ASCII):
            parser.error(f"{name} {value!r}: expected {expected}")
    if not hasattr(tarfile, "data_filter"):
        parser.error("this Python unpacks without care; take 3.11.4 or newer (make: PYTHON=...)")
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    run = options.attach or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        box = Box(options.host, f"{options.folder}/{run}")
        return drive(box, Path("build/gpu") / run, options)
    except Problem as problem:
        say(str(problem))
    except (OSError, tarfile.TarError) as error:
        say(f"on this end: {error}{later(run)}")
    except KeyboardInterrupt:
        say(f"interrupted{later(run)}")
        return 130
    return FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
