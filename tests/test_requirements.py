"""requirements.txt and environment.yml ask for the same packages in the same versions."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_pip_and_conda_get_the_same_versions():
    for_pip = (ROOT / "requirements.txt").read_text().split()
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip_part,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert pip_part == for_pip
