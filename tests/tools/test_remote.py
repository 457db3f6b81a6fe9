"""tools/remote.py over a loopback ssh: a stand-in always, and a real sshd where there is one."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

# For what comes before or after the connection, or needs one that does as it is told.
ONLY_STAND_IN = pytest.mark.parametrize("loopback", ["stand-in"], indirect=True)
COPIES = ["tar", "rsync"] if shutil.which("rsync") else ["tar"]
COUNT = "i=0; while [ $i -lt {n} ]; do i=$((i+1)); echo line $i; sleep 0.02; done"
TREE = 'cp -R . "$DSV4_OUT/tree"'


def lines(n: int) -> str:
    return "".join(f"line {i}\n" for i in range(1, n + 1))


def listing(folder: Path) -> dict[str, str | bytes]:
    """Every file under a folder: what it holds, or where it points."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize("status", [0, 3])
def test_the_log_the_results_and_the_exit_status_come_back(loopback, status):
    names = "\"a b\" \"it's\" '\"' '$(touch x)' '-n' 'a\nb' 'sub;dir/ä'"
    write = f'mkdir \'sub;dir\'; for f in {names}; do printf %s "$f" > "$f"; done'
    done = loopback.run("--run", f'cd "$DSV4_OUT"; {write}; echo out; echo err >&2; exit {status}')
    assert done.returncode == status, done.stderr
    assert done.stdout == "out\nerr\n"
    assert (loopback.results / "log").read_text() == done.stdout
    assert json.loads((loopback.results / "status.json").read_text())["status"] == status
    expected = ["a b", "it's", '"', "$(touch x)", "-n", "a\nb", "sub;dir/ä"]
    assert listing(loopback.results / "out") == {name: name.encode() for name in expected}
    assert sorted(path.name for path in loopback.results.iterdir()) == ["log", "out", "status.json"]
    assert [path.name for path in loopback.box.iterdir()] == ["last"]


@pytest.mark.parametrize("means", COPIES)
def test_the_box_gets_the_working_tree_and_nothing_else(loopback, means):
    for edit in ("as it is", "edited"):
        (loopback.checkout / "tools" / "note").write_text(edit)
        done = loopback.run("--copy", means, "--run", f"{TREE}; rm -f tools/note")
        assert done.returncode == 0, done.stderr
        here, there = listing(loopback.checkout), listing(loopback.results / "out" / "tree")
        ignored = (".git/", "build/", "secret.ignored")
        here = {k: v for k, v in here.items() if not k.startswith(ignored)}
        links = {k for k, v in here.items() if isinstance(v, str)}
        assert links == {"#link: to"}
        assert there == {k: v for k, v in here.items() if k not in links}
        assert "'out/tree/#link: to'" in done.stderr, "a link does not come back, and that is said"
        shutil.rmtree(loopback.checkout / "build")
        (loopback.checkout / "tools" / f"only when {edit}").touch()
    assert not list(loopback.checkout.parent.rglob("injected"))
    assert (loopback.box / "last" / "#link: to").readlink() == Path(".gitignore")


def test_a_command_is_one_for_the_shell_and_for_nobody_before_it(loopback):
    command = """printf '%s|' "it's" '"' '$HOME' a\\ b ';' "$(echo x)" '%n' '!' '\n' `echo y`"""
    done = loopback.run("--run", command)
    assert done.stdout == "it's|\"|$HOME|a b|;|x|%n|!|\n|y|", done.stderr


def test_a_command_is_in_no_log_and_no_argument_of_ssh(loopback):
    done = loopback.run("--run", "TOKEN=hunter2 true; echo done")
    assert done.returncode == 0, done.stderr
    kept = [str(v) for v in listing(loopback.checkout / "build").values()]
    for text in (done.stdout, done.stderr, loopback.calls.read_text(), *kept):
        assert "hunter2" not in text


def test_a_dropped_connection_loses_and_repeats_nothing(loopback):
    process = loopback.start("--run", COUNT.format(n=150))
    read, killed = "", 0
    for _ in range(2):
        read += "".join(process.stdout.readline() for _ in range(20))
        killed = loopback.until(lambda old=killed: {loopback.ssh("follow")} - {old}, "ssh").pop()
        loopback.kill(killed)
    read += process.stdout.read()
    said = process.stderr.read()
    assert process.wait() == 0, said
    assert said.count("trying again") == 2
    assert read == lines(150)
    assert (loopback.results / "log").read_text() == lines(150)


def test_the_run_goes_on_without_the_tool_and_another_takes_it_up(loopback):
    process = loopback.start("--run", f"{COUNT.format(n=100)}; echo x > $DSV4_OUT/file; exit 4")
    for _ in range(20):
        process.stdout.readline()
    process.kill()
    process.communicate()
    run = loopback.results.name
    before = (loopback.results / "log").read_text()
    loopback.until((loopback.box / run / "exit").exists, "the run ends by itself")
    done = loopback.run("--attach", run)
    assert done.returncode == 4, done.stderr
    assert before + done.stdout == (loopback.results / "log").read_text() == lines(100)
    assert (loopback.results / "out" / "file").read_text() == "x\n"


@ONLY_STAND_IN
def test_no_connection_for_too_long_leaves_the_run_to_be_taken_up(loopback):
    down = loopback.calls.with_name("down")
    loopback.interfere("follow", f"if [ -e {down} ]; then echo down >&2; exit 255; fi")
    process = loopback.start("--patience", "1", "--run", COUNT.format(n=50))
    process.stdout.readline()
    down.touch()
    loopback.kill(loopback.ssh("follow"))
    process.stdout.read()
    said = process.stderr.read()
    assert process.wait() == 125
    run = loopback.results.name
    assert "box cannot be reached" in said
    assert f"--attach {run}" in said
    down.unlink()
    assert loopback.run("--attach", run).returncode == 0
    assert (loopback.results / "log").read_text() == lines(50)


@ONLY_STAND_IN
def test_a_command_whose_start_was_not_confirmed_is_started_once(loopback):
    once = loopback.calls.with_name("once")
    loopback.interfere("start", f'if mkdir {once}; then $REAL "$@"; exit 255; fi')
    done = loopback.run("--run", "echo ran; sleep 3")
    assert done.returncode == 0, done.stderr
    assert loopback.calls.read_text().count("box.py start") == 2
    assert done.stdout == "ran\n"


@ONLY_STAND_IN
def test_ctrl_c_while_the_sources_are_copied_leaves_nothing_there(loopback):
    loopback.interfere("unpack", "exec sleep 60")
    process = loopback.start("--copy", "tar", "--run", "true")
    loopback.until(lambda: loopback.ssh("unpack"), "the copy begins")
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert [path.name for path in loopback.box.iterdir()] == ["last"]
    assert loopback.ssh("start") == 0


# Three processes: a shell, its child and a grandchild.
FAMILY = """cd "$DSV4_OUT"; sleep 300 & echo $! >> pids; (sleep 300 & echo $! >> pids; wait) &
echo $$ >> pids; echo ready; """


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_every_process_of_the_run(loopback, number):
    process = loopback.start("--run", f"{FAMILY} wait")
    assert process.stdout.readline() == "ready\n"
    pids = loopback.pids("pids", 3)
    assert all(map(loopback.alive, pids))
    if number == signal.SIGINT:  # a terminal sends it to ssh as well
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert not any(map(loopback.alive, pids))
    assert (loopback.results / "out" / "pids").exists(), "the results so far come back"


def test_a_run_is_stopped_from_elsewhere(loopback):
    process = loopback.start("--run", f"{FAMILY} wait")
    pids = loopback.pids("pids", 3)
    process.kill()
    done = loopback.run("--attach", loopback.results.name, "--stop")
    assert done.returncode == 130, done.stderr
    assert not any(map(loopback.alive, pids))


def test_the_limit_ends_a_process_that_ignores_sigterm(loopback):
    hung = f"trap '' TERM INT; {FAMILY} while true; do sleep 1; done"
    began = time.monotonic()
    process = loopback.start("--limit", "2", "--run", hung)
    pids = loopback.pids("pids", 3)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 124, said
    assert "time limit" in said
    assert not any(map(loopback.alive, pids))
    assert 3 <= time.monotonic() - began < 15, "2 s, and 1 s for the signal that may be ignored"


def test_what_a_finished_command_leaves_running_is_ended(loopback):
    process = loopback.start("--run", f"{FAMILY} sleep 1; exit 7")
    pids = loopback.pids("pids", 3)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 7, said
    assert not any(map(loopback.alive, pids))


# In the foreground, for a shell lets what runs in the background ignore SIGINT.
POLITE = """python3 -c 'import pathlib, time
print("ready")
try: time.sleep(300)
except KeyboardInterrupt: pathlib.Path("last words").touch()'"""


@ONLY_STAND_IN
def test_ctrl_c_reaches_more_than_the_shell_and_leaves_time_to_end_well(loopback):
    process = loopback.start("--run", f'cd "$DSV4_OUT"; {POLITE}')
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert (loopback.results / "out" / "last words").exists()


def test_no_hangup_of_the_connection_reaches_the_run(loopback):
    done = loopback.run("--run", "cut -d' ' -f1,6 /proc/$PPID/stat; cut -d' ' -f1,6 /proc/$$/stat")
    (supervisor, its), (shell, own) = (line.split() for line in done.stdout.splitlines())
    assert (supervisor, shell) == (its, own), "each leads a session"


@ONLY_STAND_IN
def test_a_command_killed_by_a_signal(loopback):
    assert loopback.run("--run", "kill -9 $$").returncode == 137


@ONLY_STAND_IN
def test_a_supervisor_that_is_killed_is_noticed(loopback):
    done = loopback.run("--run", "echo before; kill -9 $PPID")
    assert done.returncode == 125
    assert done.stdout == "before\n"
    assert "supervisor died" in done.stderr


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("refusing", ["Connection refused", "`ssh refusing true`"]),
        ("stranger", ["Host key verification failed", "`ssh stranger`"]),
        ("locked", ["Permission denied (publickey", "`ssh-copy-id locked`"]),
        ("-oProxyCommand=touch injected", ["host '-oProxy", "expected [USER@]NAME"]),
        ("box; touch injected", ["host", "expected [USER@]NAME"]),
        ("box:22", ["~/.ssh/config"]),
        ("", ["host ''", "expected"]),
    ],
)
def test_a_host_that_is_none(loopback, host, expected):
    loopback.host = host
    began = time.monotonic()
    done = loopback.run("--run", "true")
    assert done.returncode in (2, 125)
    for part in expected:
        assert part in done.stderr
    assert time.monotonic() - began < 10, "no second try before anything has begun"
    assert not list(loopback.checkout.parent.rglob("injected"))


@ONLY_STAND_IN
@pytest.mark.parametrize(
    "words",
    [
        ("--limit", "0"),
        ("--limit", "nan"),
        ("--limit", ""),
        ("--folder", "a b"),
        ("--folder", "$HOME"),
        ("--attach", "../x"),
        ("--grace", "-1"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_anything_is_called(loopback, words):
    done = loopback.run(*words)
    assert done.returncode == 2
    assert f"{words[0][2:]} {words[1]!r}: expected" in done.stderr or "grace" in done.stderr
    assert not loopback.calls.exists()


@ONLY_STAND_IN
@pytest.mark.parametrize(
    ("said", "code", "expected"),
    [
        ("cat: write error: No space left on device", 1, ["disk of box is full", "FOLDER="]),
        ("Permission denied (publickey,password).", 255, ["refuses the login", "ssh-copy-id"]),
        ("Host key verification failed.", 255, ["does not know", "by hand"]),
        ("ssh: Could not resolve hostname box: Name or service not known", 255, ["no address"]),
        ("ssh: connect to host box port 22: Connection timed out", 255, ["cannot be reached"]),
        ("mkdir: cannot create directory: Permission denied", 1, ["box: mkdir"]),
    ],
)
def test_what_ssh_says_is_explained(loopback, said, code, expected):
    ssh = loopback.calls.with_name("bin") / "ssh"
    ssh.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit {code}\n")
    done = loopback.run("--run", "true")
    assert done.returncode == 125
    for part in (*expected, said):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


@ONLY_STAND_IN
def test_a_disk_too_small_for_the_sources(loopback):
    with (loopback.checkout / "sparse").open("wb") as file:
        file.truncate(1 << 42)
    done = loopback.run("--run", "true")
    assert done.returncode == 125
    assert "disk of box is full" in done.stderr
    assert list(loopback.box.iterdir()) == []


@ONLY_STAND_IN
def test_no_ssh_here_and_no_python_there(loopback):
    bare = loopback.calls.with_name("bare")
    bare.mkdir()
    for name in ("sh", "cat", "mkdir", "git"):
        (bare / name).symlink_to(shutil.which(name))
    done = loopback.run("--run", "true", env={"PATH": str(bare)})
    assert done.returncode == 125
    assert "ssh is not on PATH; install the OpenSSH client" in done.stderr
    done = loopback.run("--run", "true", env={"STAND_IN_PATH": str(bare)})
    assert done.returncode == 125
    assert "box has no python3 of version 3.8 or newer; install one" in done.stderr
    assert not loopback.box.exists()


def make(loopback, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", "-s", "gpu", *words]
    return subprocess.run(
        command, cwd=loopback.checkout, env=loopback.env, capture_output=True, text=True, timeout=60
    )


def test_make_gpu_hands_the_command_over_as_it_is(loopback):
    run = """RUN=printf '%s|' "it's" "$DSV4_OUT" '$$' '$(shell touch injected)'; exit 3"""
    done = make(loopback, "HOST=box", f"FOLDER={loopback.box}", run, "LIMIT=30")
    run = loopback.results.name
    assert done.stdout == f"it's|{loopback.box}/{run}/out|$$|$(shell touch injected)|", done.stderr
    assert "exit status 3" in done.stderr
    assert "Error 3" in done.stderr
    assert not list(loopback.checkout.parent.rglob("injected"))


@ONLY_STAND_IN
def test_make_gpu_without_a_host_is_local_and_with_an_empty_one_an_error(loopback):
    loopback.env["HOST"] = "what some shells export"
    done = make(loopback, "PYTHON=echo")
    assert done.stdout == "-m pytest -m gpu tests\n"
    done = make(loopback, "HOST=")
    assert done.returncode != 0
    assert "host ''" in done.stderr
