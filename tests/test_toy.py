"""The picture of the toy problem."""

import pytest
from runs import refusal

import analyze
from analysis.figures import plt, save_figure
from storage.files import FileError


def test_toy_is_drawn_and_small(tmp_path, capsys):
    assert analyze.main(["--toy", "--output-dir", str(tmp_path)]) == 0
    assert "AT: 4 of 5 vulnerable points lose margin; DyART: 1 of 5" in capsys.readouterr().out
    assert 10_000 < (tmp_path / "toy.png").stat().st_size < 200_000


def test_a_place_that_cannot_be_written_is_told_before_anything_is_drawn(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(analyze, "draw_toy", lambda folder: 1 / 0)
    error = refusal(capsys, "--toy", "--output-dir", str(tmp_path / "file"), main=analyze.main)
    assert f"--output-dir {tmp_path / 'file'}: cannot write to" in error


def test_a_figure_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(FileError, match=r"cannot write .*/a\.png: No space left on device"):
        save_figure(plt.figure(), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
