"""Which files are opened: nothing outside the folder, nothing that changes, no pickle."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from dsv4.core.errors import CheckpointError
from dsv4.core.safe_files import open_regular
from dsv4.loader import Checkpoint
from dsv4.testing.mutate import poke, shard_path
from support.checkpoints import assert_same_weights, weights_of


def as_hub_cache(folder: Path, root: Path) -> Path:
    """Lay `folder` out as huggingface_hub does: links in a snapshot, files among the blobs."""
    blobs, snapshot = root / "models--a--b" / "blobs", root / "models--a--b" / "snapshots" / "5f3d"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
    return snapshot


def test_links_of_a_hub_cache_are_followed(sound, tmp_path: Path) -> None:
    snapshot = as_hub_cache(sound("official"), tmp_path)
    assert_same_weights(Checkpoint.open(snapshot).load(), weights_of("official"))
    (tmp_path / "link").symlink_to(snapshot)
    Checkpoint.open(tmp_path / "link").load()


def test_a_hub_cache_link_into_another_repository_is_refused(sound, tmp_path: Path) -> None:
    snapshot = as_hub_cache(sound("official"), tmp_path)
    shard = shard_path(snapshot)
    other = tmp_path / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(shard, other / "blob")
    shard.unlink()
    shard.symlink_to(other / "blob")
    with pytest.raises(CheckpointError, match="outside the folder") as caught:
        Checkpoint.open(snapshot)
    assert caught.value.kind == "path"


def test_blobs_beside_a_plain_folder_are_outside(sound, tmp_path: Path) -> None:
    """Only below `snapshots` is a blobs folder trusted."""
    snapshot = as_hub_cache(sound("official"), tmp_path)
    renamed = snapshot.parent.rename(snapshot.parent.parent / "revisions")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(renamed / snapshot.name)
    assert caught.value.kind == "path"


def test_links_inside_the_folder_are_followed(copy_of) -> None:
    folder = copy_of("official")
    shard = shard_path(folder)
    shard.rename(folder / "moved")
    shard.symlink_to("moved")
    Checkpoint.open(folder).load()


@pytest.mark.parametrize("as_text", [True, False])
def test_paths_as_people_type_them(as_text: bool, sound, monkeypatch) -> None:
    folder = sound("official")
    monkeypatch.chdir(folder.parent)
    path = f"./{folder.name}/../{folder.name}/" if as_text else Path(folder.name)
    assert Checkpoint.open(path).folder == folder


@pytest.mark.parametrize("path", ["absent", "a\0b", "x" * 5000])
def test_no_folder(path: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(f"{tmp_path}/{path}")
    assert caught.value.kind == "folder"
    assert len(str(caught.value)) < 400


def test_a_file_is_no_folder(sound) -> None:
    with pytest.raises(CheckpointError, match="not a folder") as caught:
        Checkpoint.open(shard_path(sound("official")))
    assert "folder that holds config.json" in caught.value.fix


def test_other_files_are_ignored_with_a_notice(copy_of) -> None:
    folder = copy_of("official")
    for name in ("pytorch_model.bin", "optimizer.pt", "adapter.safetensors", "README.md"):
        (folder / name).write_bytes(b"not read")
    (folder / "modeling.py").write_text("raise SystemExit")
    assert Checkpoint.open(folder).notices == [
        "ignored, not safetensors: optimizer.pt, pytorch_model.bin",
        "ignored, not shards of the index: adapter.safetensors",
    ]


def test_only_pickle_files_name_the_way_out(copy_of) -> None:
    folder = copy_of("official")
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "consolidated.00.pth").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert caught.value.kind == "format"
    assert "safetensors" in caught.value.fix


# ---- files that change


def replace_by_copy(path: Path) -> None:
    """Another file of the same bytes under the same name, as a new download would put it."""
    copy = path.with_suffix(".tmp")
    shutil.copy(path, copy)
    copy.replace(path)


def touch_later(path: Path) -> None:
    """Same file, same size, later time of change."""
    info = path.stat()
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1_000_000))


def cut(path: Path) -> None:
    """Shorten the file in place, under the reader's feet."""
    os.truncate(path, path.stat().st_size - 4096)


CHANGES = [replace_by_copy, touch_later, cut, Path.unlink]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("index", [0, -1])
def test_a_change_between_open_and_load_is_an_error(change, index: int, copy_of) -> None:
    folder = copy_of("official")
    ck = Checkpoint.open(folder)
    path = shard_path(folder, index)
    change(path)
    with pytest.raises(CheckpointError) as caught:
        ck.load()
    assert caught.value.kind in ("changed", "missing_file")
    assert {p.file for p in caught.value.problems} == {path.name}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("index", [0, -1])
def test_a_change_while_loading_is_an_error(change, index: int, copy_of) -> None:
    folder = copy_of("official")
    ck = Checkpoint.open(folder)
    path = shard_path(folder, index)
    started = []

    def progress(*call: int) -> None:
        if not started:
            change(path)
        started.append(call)

    with pytest.raises(CheckpointError) as caught:
        ck.load(progress=progress)
    kinds = {p.kind for p in caught.value.problems}
    assert kinds & {"changed", "missing_file", "truncated"}
    assert len(started) > 1 or kinds != {"truncated"}


def test_verify_reports_a_change(copy_of) -> None:
    folder = copy_of("official")
    ck = Checkpoint.open(folder)
    assert ck.verify() == []
    touch_later(shard_path(folder, 2))
    assert [p.kind for p in ck.verify()] == ["changed"]


def test_values_and_changes_are_reported_together(copy_of) -> None:
    folder = copy_of("official")
    poke("layers.1.attn.wq_a.scale", 255)(folder)
    ck = Checkpoint.open(folder)
    last = shard_path(folder, -1)

    def progress(done: int, total: int, *_: int) -> None:
        if done == total:
            touch_later(last)

    with pytest.raises(CheckpointError) as caught:
        ck.load(progress=progress)
    assert [p.kind for p in caught.value.problems] == ["scale", "changed"]


def test_a_file_swapped_for_a_fifo_after_the_check_does_not_block(copy_of) -> None:
    folder = copy_of("official")
    ck = Checkpoint.open(folder)

    def opener(path: str):
        if path.endswith(shard_path(folder).name):
            fifo = folder / "fifo"
            os.mkfifo(fifo)
            return open_regular(str(fifo))
        return open_regular(path)

    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(folder, opener=opener)
    ck.load()
