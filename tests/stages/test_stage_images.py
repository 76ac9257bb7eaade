"""The stage that says what the images of the data set are: changed images run `prepare` again."""

import json
import os
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from rnp.params.presets import render
from stages.images import images


@pytest.fixture
def write(tmp_path, monkeypatch):
    """What the stage writes for a folder of two images, or for another data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RNP_DATA", str(tmp_path))
    params = yaml.safe_load(render("imagefolder"))
    for name in ("cat", "dog"):
        Path("images", name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(f"images/{name}/0.png")

    def run(data: str = "imagefolder") -> dict:
        params["data"]["name"] = data
        Path("params.yaml").write_text(yaml.safe_dump(params))
        done = CliRunner().invoke(images, ["--out", "images.json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(Path("images.json").read_text())

    return run


def test_the_same_images_give_the_same_file(write):
    assert write() == write() and write()["name"] == "imagefolder"


def test_a_changed_image_gives_another_file(write):
    before = write()
    Image.new("RGB", (8, 8), "red").save("images/cat/0.png")
    os.utime("images/cat/0.png", (1, 1))
    assert write()["fingerprint"] != before["fingerprint"]


def test_a_new_image_gives_another_file(write):
    before = write()
    Image.new("RGB", (8, 8)).save("images/cat/1.png")
    assert write()["fingerprint"] != before["fingerprint"]


def test_generated_images_depend_on_the_parameters_alone(write):
    assert write("shapes") == {"name": "shapes", "fingerprint": ""}
