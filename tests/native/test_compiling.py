"""What tests compile is kept, and never taken for something else."""

import shutil
import subprocess

import compiling
import pytest

CXX = shutil.which("g++") or shutil.which("clang++") or "g++"


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "ROOT", tmp_path / "tree")
    monkeypatch.setattr(compiling, "CACHE", tmp_path / "cache")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/value.h").write_text("#define VALUE 1\n")
    (tmp_path / "tree/source.cpp").write_text('#include "value.h"\nextern "C" int value() { return VALUE; }\n')
    return tmp_path / "tree/source.cpp"


def test_the_same_again_is_not_compiled(source):
    made = compiling.compiled(CXX, ["-O0"], source)
    time = made.stat().st_mtime_ns
    assert compiling.compiled(CXX, ["-O0"], source) == made
    assert made.stat().st_mtime_ns == time


def test_other_flags_and_an_edited_header_are(source):
    made = compiling.compiled(CXX, ["-O0"], source)
    assert compiling.compiled(CXX, ["-O0", "-DOTHER"], source) != made
    text = source.with_name("value.h").read_text()
    source.with_name("value.h").write_text("#define VALUE 2\n")
    edited = compiling.compiled(CXX, ["-O0"], source)
    assert edited != made and edited.read_bytes() != made.read_bytes()
    source.with_name("value.h").write_text(text)
    assert compiling.compiled(CXX, ["-O0"], source) == made


def test_what_does_not_compile_leaves_nothing(source):
    text = source.read_text()
    source.write_text("this is no C++")
    with pytest.raises(subprocess.CalledProcessError, match="returned non-zero"):
        compiling.compiled(CXX, ["-O0"], source)
    source.write_text(text)
    assert compiling.compiled(CXX, ["-O0"], source).exists()


def test_so_many_versions_are_kept(source):
    made = []
    for value in range(compiling.KEPT + 2):
        source.with_name("value.h").write_text(f"#define VALUE {value}\n")
        made.append(compiling.compiled(CXX, ["-O0"], source))
    assert [path.exists() for path in made] == [False] * 2 + [True] * compiling.KEPT
