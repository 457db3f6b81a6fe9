"""A checkout, a box, and an ssh between them: a real sshd where there is one, a stand-in always."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATH = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
CONNECTIONS = ["stand-in", "sshd"] if SSHD else ["stand-in"]
HELD = ["tools/remote.py", "tools/remote_ssh.py", "tools/remote_box.py", "Makefile"]


@dataclass
class Loopback:
    """`checkout`, where the tool is started, and `box`, the folder of its runs on "the box"."""

    checkout: Path
    box: Path
    calls: Path
    env: dict[str, str]
    host: str = "box"
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @staticmethod
    def until(happened, what: str, seconds: float = 20):
        """Wait for a true value of `happened()`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := happened():
                return value
            time.sleep(0.02)
        raise AssertionError(f"not within {seconds} s: {what}")

    @staticmethod
    def alive(pid: int) -> bool:
        """Whether a process runs; one that waits for its parent to take note does not."""
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    def start(self, *words: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """The tool with these words after the host."""
        command = [sys.executable, "tools/remote.py", self.host, "--folder", str(self.box)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [*command, "--grace", "1", *words],
            cwd=self.checkout,
            env={**self.env, **(env or {})},
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(
        self, *words: str, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The same, to its end."""
        process = self.start(*words, env=env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess([], process.returncode, out, err)

    def interfere(self, verb: str, script: str) -> None:
        """Let a shell script come before ssh when it is called for `verb`; $REAL is ssh itself."""
        ssh = self.calls.with_name("bin") / "ssh"
        log, real = ssh.read_text().splitlines()[1], ssh.read_text().splitlines()[-1]
        case = f"""case "$*" in *"box.py {verb}"*) {script};; esac"""
        start = "REAL='" + real.removeprefix("exec ").removesuffix(' "$@"') + "'"
        ssh.write_text("\n".join(["#!/bin/sh", log, start, case, real, ""]))

    def ssh(self, verb: str) -> int:
        """The process of the last ssh that was called for `verb`, 0 when there was none."""
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return next((int(c.split()[0]) for c in reversed(calls) if f"box.py {verb}" in c), 0)

    @staticmethod
    def kill(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def pids(self, name: str, count: int) -> list[int]:
        """Processes that the command on the box wrote down in its $DSV4_OUT."""

        def written() -> list[int]:
            texts = [path.read_text() for path in self.box.glob(f"*/out/{name}")]
            found = [int(word) for text in texts for word in text.split()]
            return found if len(found) == count else []

        return self.until(written, f"{count} processes in {name}")

    @property
    def results(self) -> Path:
        (folder,) = (self.checkout / "build" / "gpu").iterdir()
        return folder


@pytest.fixture(scope="session")
def ssh_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running sshd of our own that lets this user in; the configuration that leads to it."""
    assert SSHD
    folder = tmp_path_factory.mktemp("sshd")
    for key in ("host", "user"):
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(make, check=True)
    with socket.socket() as free, socket.socket() as nobody:
        free.bind(("127.0.0.1", 0))
        nobody.bind(("127.0.0.1", 0))
        port, closed = free.getsockname()[1], nobody.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/user.pub\nStrictModes no\nUsePAM no\n"
        f"PasswordAuthentication no\nPermitRootLogin prohibit-password\nSetEnv PATH={PATH}\n"
    )
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "config").write_text(
        f"Host box stranger locked\n Port {port}\nHost refusing\n Port {closed}\n"
        f"Host locked\n IdentityFile {folder}/host\nHost !locked *\n IdentityFile {folder}/user\n"
        "Host stranger\n UserKnownHostsFile /dev/null\n"
        f"Host *\n HostName 127.0.0.1\n User {getpass.getuser()}\n IdentitiesOnly yes\n"
        f" IdentityAgent none\n UserKnownHostsFile {folder}/known\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd shuts its unprivileged half in
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", f"{folder}/sshd_config"], stderr=log)
    try:
        Loopback.until(lambda: "listening" in (folder / "log").read_text(), "sshd listens")
        yield folder / "config"
    finally:
        server.terminate()
        server.wait()


def checkout(folder: Path) -> Path:
    """A git repository with the tool, and files of all kinds whose names a shell would misread."""
    for name in HELD:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / ".gitignore").write_text("build/\n*.ignored\n__pycache__/\n")
    (folder / 'it\'s a "file"; $(touch injected)').write_text("tracked\n")
    (folder / "gone").write_text("tracked, deleted\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    (folder / "gone").unlink()
    (folder / "-new\nfile*").write_text("untracked\n")
    (folder / "#link: to").symlink_to(".gitignore")
    (folder / "secret.ignored").write_text("ignored\n")
    return folder


@pytest.fixture(params=CONNECTIONS)
def loopback(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Loopback]:
    """The tool with either connection. What still runs when a test ends, is ended."""
    for name in ("home", "bin", "checkout"):
        (tmp_path / name).mkdir()
    real = f"{sys.executable} {Path(__file__).with_name('ssh_stand_in.py')}"
    if request.param == "sshd":
        real = f"{shutil.which('ssh')} -F {request.getfixturevalue('ssh_config')}"
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\necho "$$ $*" >> {tmp_path}/calls\nexec {real} "$@"\n')
    ssh.chmod(0o755)
    env = dict(os.environ, PATH=f"{tmp_path}/bin:{PATH}")
    env.update(STAND_IN_HOME=f"{tmp_path}/home", STAND_IN_PATH=PATH)
    loop = Loopback(checkout(tmp_path / "checkout"), tmp_path / "runs", tmp_path / "calls", env)
    yield loop
    for process in loop.started:
        process.kill()
        process.communicate()
    for run in loop.box.glob("*/log"):
        run.with_name("stop").touch()
