"""`ssh` without a network: the command runs here, as sshd would run it.

As OpenSSH does: the words after the host are joined by blanks and given to the user's shell, which
starts in the home folder and in a session of its own; killed, it takes its pipes with it and leaves
the command alone; 255 when there is no connection.
"""

import os
import subprocess
import sys
import threading

WITH_VALUE = {"-o", "-l", "-p", "-i", "-F", "-e", "-E"}
REFUSALS = {
    "refusing": "ssh: connect to host refusing port 22: Connection refused",
    "stranger": "Host key verification failed.",
    "locked": "me@locked: Permission denied (publickey,keyboard-interactive).",
}


def relay(source: int, sink: int) -> None:
    """Bytes from one pipe to another as they come, then the end of it."""
    try:
        while piece := os.read(source, 1 << 16):
            while piece:
                piece = piece[os.write(sink, piece) :]
    except OSError:
        pass
    os.close(sink)


def main() -> int:
    words = iter(sys.argv[1:])
    for word in words:
        if word in WITH_VALUE:
            next(words)
        elif not word.startswith("-"):
            break
        elif word == "--":
            word = next(words)
            break
    if word in REFUSALS:
        print(REFUSALS[word], file=sys.stderr)
        return 255
    process = subprocess.Popen(
        ["sh", "-c", " ".join(words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=os.environ["STAND_IN_HOME"],
        env=dict(os.environ, PATH=os.environ["STAND_IN_PATH"], HOME=os.environ["STAND_IN_HOME"]),
        start_new_session=True,
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    pipes = [(process.stdout, 1), (process.stderr, 2)]
    out = [threading.Thread(target=relay, args=(pipe.fileno(), fd)) for pipe, fd in pipes]
    feed = threading.Thread(target=relay, args=(0, os.dup(process.stdin.fileno())), daemon=True)
    process.stdin.close()
    for thread in (feed, *out):
        thread.start()
    for thread in out:
        thread.join()
    code = process.wait()
    sys.stderr = None  # its descriptor is closed
    return code if code >= 0 else 255


if __name__ == "__main__":
    os._exit(main())
