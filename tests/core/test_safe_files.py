"""Small files of a folder: read only where they are plain files of that folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dsv4.core.errors import CheckpointError
from dsv4.core.safe_files import read_json, read_small_file


def refusal(folder: Path, max_bytes: int = 1000) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_small_file(folder, "x.json", max_bytes)
    assert caught.value.file == "x.json"
    assert caught.value.fix
    return caught.value.kind


def test_a_plain_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": [1]}')
    assert read_small_file(tmp_path, "x.json", 10) == b'{"a": [1]}'
    assert read_json(tmp_path, "x.json", 10) == {"a": [1]}
    assert refusal(tmp_path, 9) == "too_large"


def test_a_link_inside_the_folder_and_one_to_a_blob_are_read(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "b").write_text("1")
    (snapshot / "x.json").symlink_to("../../blobs/b")
    (snapshot / "y.json").symlink_to("x.json")
    assert [read_json(snapshot, name, 9) for name in ("x.json", "y.json")] == [1, 1]


def test_what_is_no_plain_file_of_the_folder(tmp_path: Path) -> None:
    folder, secret = tmp_path / "m", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("{}")
    path = folder / "x.json"
    assert refusal(folder) == "missing_file"
    for target, kind in ((secret, "path"), ("/dev/zero", "path"), ("absent", "missing_file")):
        path.symlink_to(target)
        assert refusal(folder) == kind
        path.unlink()
    os.mkfifo(path)
    assert refusal(folder) == "file_type"
    path.unlink()
    path.mkdir()
    assert refusal(folder) == "file_type"


@pytest.mark.parametrize(
    ("text", "kind"),
    [("[" * 900, "json"), ('{"a": 1, "a": 2}', "duplicate"), ("NaN", "json"), ("\xff", "json")],
)
def test_json_is_strict(text: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes((text * (60 if text == "[" * 900 else 1)).encode("latin-1"))
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path, "x.json", 100_000)
    assert caught.value.kind == kind
