import pytest

from adq_search.errors import StorageError
from adq_search.files import read_json, write_atomic, write_json


def test_a_failed_write_leaves_the_old_file_and_no_scrap(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"n": 1})

    def half(path):
        path.write_text('{"n":')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(file, half)
    assert read_json(file, StorageError, what="trial") == {"n": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"n": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_damage_is_named_with_its_place(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"n": 1,\n "m"')
    with pytest.raises(StorageError, match="trial file .* is damaged: line 2"):
        read_json(file, StorageError, what="trial")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StorageError, match="cannot be read"):
        read_json(file, StorageError, what="trial")
