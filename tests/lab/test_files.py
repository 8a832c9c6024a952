import errno
import os
import resource
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from minipeft.errors import InputError
from minipeft.lab import files


def test_writes_the_bytes_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "file.bin"
    files.write_atomic(path, b"one")
    files.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_the_old_file_is_replaced_never_written_into(tmp_path):
    path, second_name = tmp_path / "file.bin", tmp_path / "held"
    files.write_atomic(path, b"one")
    os.link(path, second_name)
    files.write_atomic(path, b"two")
    assert second_name.read_bytes() == b"one"


def test_a_full_disk_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    files.write_atomic(path, b"old")

    def full(descriptor, data):
        os.write(descriptor, data[:1])  # the disk becomes full halfway
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(InputError, match="No space left on device; free some space"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        files.write_atomic(tmp_path / "taken" / "file.bin", b"")


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(descriptor, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(tmp_path / "file.bin", b"new")
    assert not list(tmp_path.iterdir())


def test_the_umask_and_the_old_permissions_are_kept(tmp_path):
    path = tmp_path / "file.bin"
    before = os.umask(0o027)
    try:
        files.write_atomic(path, b"one")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        files.write_atomic(path, b"two")
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


def test_a_symbolic_link_stays_and_its_file_is_written(tmp_path):
    target, link = tmp_path / "disk" / "file.bin", tmp_path / "link.bin"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to(target)
    files.write_atomic(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_is_never_replaced(tmp_path, make):
    path, link = tmp_path / "pipe", tmp_path / "link"
    make(path)
    link.symlink_to(path)
    before = path.stat()
    for place in (path, link):
        with pytest.raises(InputError, match=f"{place} is no regular file; choose"):
            files.write_atomic(place, b"new")
    assert path.stat().st_mode == before.st_mode
    assert not path.is_file()


def test_a_file_is_claimed_once(tmp_path):
    path, link = tmp_path / "file.bin", tmp_path / "link.bin"
    link.symlink_to(path)
    with files.claimed(path):
        with (
            pytest.raises(InputError, match="another process writes"),
            files.claimed(link),
        ):
            pass
        assert not list(tmp_path.glob("*.lock"))
    with files.claimed(path):
        pass


def test_a_lock_that_cannot_be_taken_is_named(tmp_path, monkeypatch):
    """Such as one that another user left in a folder for all, or on a network disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with files.claimed(tmp_path / "file.bin"):
        (left,) = tmp_path.glob("*.lock")
    left.unlink()
    left.mkdir()
    with (
        pytest.raises(InputError, match=rf"{left} cannot be locked \(Is a dir.*TMPDIR"),
        files.claimed(tmp_path / "file.bin"),
    ):
        pass


def in_a_child(act):
    """Run it in another process; return the message of its refusal."""
    reads, writes = os.pipe()
    if not os.fork():
        try:
            act()
        except InputError as error:
            os.write(writes, str(error).encode())
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as said:
        sentence = said.read()
    os.wait()
    return sentence


def test_a_limit_of_the_system_in_the_middle_of_a_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.bin"
    files.write_atomic(path, b"old")

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        files.write_atomic(path, bytes(5000))

    assert "File too large; free some space" in in_a_child(limited)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_read_only_folder_is_one_sentence_and_keeps_the_old_file():
    folder = Path(tempfile.mkdtemp())
    path = folder / "file.bin"
    files.write_atomic(path, b"old")
    folder.chmod(0o555)

    def unprivileged():
        if os.geteuid() == 0:  # root may write to any folder
            os.seteuid(65534)
        files.write_atomic(path, b"new")

    try:
        assert "cannot write" in in_a_child(unprivileged)
        assert path.read_bytes() == b"old"
        assert list(folder.iterdir()) == [path]
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_two_processes_that_write_leave_one_whole_file(tmp_path):
    path = tmp_path / "file.bin"
    whole = [bytes([i]) * 100_000 for i in range(4)]
    children = []
    for data in whole:
        child = os.fork()
        if not child:
            try:
                for _ in range(20):
                    files.write_atomic(path, data)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
        assert path.read_bytes() in whole
    assert list(tmp_path.iterdir()) == [path]
