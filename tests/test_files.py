import json
import threading

import pytest

from gqa import files


@pytest.mark.parametrize("shared", [False, True])
def test_it_takes_its_place_when_it_is_complete(tmp_path, shared):
    path = tmp_path / "table.csv"
    path.write_text("before")
    with files.whole(path, shared=shared) as unfinished:
        unfinished.write_text("after")
        assert path.read_text() == "before"
        assert (unfinished.parent, unfinished.suffix) == (tmp_path, ".csv")
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("shared", [False, True])
def test_an_error_leaves_what_was_there(tmp_path, shared):
    path = tmp_path / "table.csv"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), files.whole(path, shared=shared) as unfinished:
        unfinished.write_text("half")
        1 / 0  # noqa: B018
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_is_overwritten(tmp_path):
    path = tmp_path / "table.csv"
    with files.whole(path) as unfinished:
        unfinished.write_text("after")
        left = unfinished
    left.write_text("half, and longer than what follows")
    files.write_text(path, "again")
    assert path.read_text() == "again" and list(tmp_path.iterdir()) == [path]


def test_of_several_at_once_one_stays_whole(tmp_path):
    path = tmp_path / "numbers.json"
    contents = [[number] * 10_000 for number in range(4)]
    threads = [
        threading.Thread(target=lambda content=content: [files.write_json(path, content, shared=True) for _ in "12345"])
        for content in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(path.read_text()) in contents and list(tmp_path.iterdir()) == [path]


def test_text_is_written_as_it_is(tmp_path):
    files.write_text(tmp_path / "text", "a\r\nb\n\ud800é")
    assert (tmp_path / "text").read_bytes() == "a\r\nb\n?é".encode()
