"""examples/gallery.py: the page and the pictures in docs/gallery/ are what it computes."""

import re
import sys

import pytest
from harness import ROOT, run_program

PAGE = ROOT / "docs" / "gallery" / "README.md"


def draw(directory, *arguments):
    command = [sys.executable, ROOT / "examples" / "gallery.py", f"--directory={directory}", *arguments]
    result = run_program(*command, env={"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_page_is_up_to_date(tmp_path):
    draw(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8"), "run make gallery"

    shown = set(re.findall(r"\]\((\w+\.png)\)", PAGE.read_text(encoding="utf-8")))
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert shown == drawn == {path.name for path in PAGE.parent.glob("*.png")}


@pytest.mark.slow
def test_same_files_again(tmp_path):
    for name in ("one", "other"):
        draw(tmp_path / name, "--only=limits")
    for file in ("limits.png", "README.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_a_part_without_its_place_is_an_error(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    gallery_page = pytest.importorskip("gallery_page")
    page = "a\n<!-- generated: one -->\nold\n<!-- end -->\nb\n"
    assert gallery_page.fill(page, {"one": "new"}) == page.replace("old", "new")
    assert gallery_page.fill(page, {}) == page
    with pytest.raises(ValueError, match="two"):
        gallery_page.fill(page, {"two": "new"})
