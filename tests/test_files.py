"""Files are written whole or not at all, whatever is in them."""

import io
import json

import pytest
from PIL import Image

from timm_structdrop.analysis.figure import new_figure
from timm_structdrop.errors import UserError
from timm_structdrop.files import output_folder, save_csv, save_json, save_png, write_whole


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = output_folder(tmp_path / "a" / "b")
    picture = save_png(new_figure(7.2, 3.25), folder / "p.png", {"Description": "a mark"})
    with Image.open(picture) as image:
        image.load()
        assert image.format == "PNG" and image.width > 600
        assert image.info["Description"] == "a mark"
    assert json.loads(save_json({"a": [1.5]}, folder / "n.json").read_text()) == {"a": [1.5]}
    assert save_csv([{"a": 1, "b": "x y"}], folder / "n.csv").read_text() == "a,b\n1,x y\n"

    class Broken:
        def savefig(self, file: io.BytesIO, **settings) -> None:
            file.write(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        save_png(Broken(), folder / "p.png")
    with Image.open(picture) as image:
        image.load()
    assert sorted(file.name for file in folder.iterdir()) == ["n.csv", "n.json", "p.png"]
    for path in (picture, picture / "below"):
        with pytest.raises(UserError, match=r"must be a folder; .*p.png is a file"):
            output_folder(path)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match="must be a writable folder"):
        output_folder(folder)


def test_other_errors_while_writing_keep_their_traceback(tmp_path):
    def bug(file):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        write_whole(tmp_path / "file", bug)
    assert not list(tmp_path.iterdir())


def test_a_table_has_every_column_that_a_row_has(tmp_path):
    path = tmp_path / "t.csv"
    rows = [{"a": 1}, {"b": 2, "a": 3}]
    assert save_csv(iter(rows), path).read_text() == "a,b\n1,\n3,2\n"
    assert save_csv([], path).read_text() == ""
