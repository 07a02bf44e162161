"""The folder of photographs for the example: what is in it, and what is refused."""

import zipfile

import pytest
from runs import refusal

from data.image_folder import ImageFolder
from scripts import make_photos
from tests.test_data_tiny_imagenet import MINI


@pytest.mark.skipif(not MINI.exists(), reason="no ../shared/data/tiny-imagenet-mini.zip")
def test_it_has_400_real_pictures_in_5_folders(tmp_path, capsys):
    assert make_photos.main([str(MINI), str(tmp_path / "new" / "photos")]) == 0
    found = ImageFolder(tmp_path / "new" / "photos")
    assert found.classes == ("dogs", "fruit", "insects", "landscapes", "vehicles") and not found.notes
    for part, each in (("train", 64), ("test", 16)):
        assert [sum(found.labels[part] == label) for label in range(5)] == [each] * 5
    with zipfile.ZipFile(MINI) as archive:
        for part, number in (("train", 15), ("test", 16)):
            name = f"n07747607_{number}.JPEG"  # an orange
            content = archive.read(f"tiny-imagenet-200/train/n07747607/images/{name}")
            assert (tmp_path / "new" / "photos" / part / "fruit" / name).read_bytes() == content
    assert "80 of dogs" in capsys.readouterr().out
    said = refusal(capsys, str(MINI), str(tmp_path / "new" / "photos"), main=make_photos.main)
    assert "photos is there already: name another, or remove it" in said


def test_another_archive_is_refused_and_nothing_is_left(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("tiny-imagenet-200/train/n02085620/images/n02085620_0.JPEG", b"")
    (tmp_path / "text.zip").write_text("text")
    for name in ("other", "text"):
        said = refusal(capsys, str(tmp_path / f"{name}.zip"), str(tmp_path / "photos"), main=make_photos.main)
        assert f"{name}.zip: not the archive of Tiny-ImageNet-200" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.zip", "text.zip"]
