"""The picture of the toy problem."""

import analyze


def test_toy_is_drawn_and_small(tmp_path, capsys):
    assert analyze.main(["--toy", "--output-dir", str(tmp_path)]) == 0
    assert "AT: 4 of 5 vulnerable points lose margin; DyART: 1 of 5" in capsys.readouterr().out
    assert 10_000 < (tmp_path / "toy.png").stat().st_size < 200_000
