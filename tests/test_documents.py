"""The pages: their examples run, their links lead somewhere, and README.md stays short."""

import doctest
import importlib.util
import re
import socket
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from momentum_ext import _C

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
README, START = ROOT / "README.md", ROOT / "docs" / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAX_README_LINES = 150

# The extra "trainers" in pyproject.toml, which make test-all installs.
TRAINERS = ["import transformers", "import accelerate", "import lightning", "from torchtitan.components"]


def has_package(name):
    return importlib.util.find_spec(name.split(".")[0]) is not None


HAS_GPU = _C.HAS_CUDA_KERNELS and torch.cuda.is_available()
# Blocks that do not run everywhere, by the page and a part of the block: what they need, and whether it is here.
NEEDS = {
    ("docs/cuda.md", "torch.cuda.CUDAGraph()"): ("a GPU", HAS_GPU),
    ("docs/compiled_graphs.md", "trace_autograd_ops"): (
        "torch 2.13, which can trace a backward pass",
        hasattr(torch._dynamo.config, "trace_autograd_ops"),
    ),
    ("docs/checkpoints.md", "torch.distributed.checkpoint"): (
        "a torch with torch.distributed",
        torch.distributed.is_available(),
    ),
    ("docs/distributed.md", "DistributedDataParallel"): (
        "a torch with torch.distributed",
        torch.distributed.is_available(),
    ),
    ("docs/distributed.md", "fully_shard"): ("a torch with torch.distributed", torch.distributed.is_available()),
    ("docs/distributed.md", "group.WORLD"): ("a torch with torch.distributed", torch.distributed.is_available()),
    **{("docs/trainers.md", part): (part.split()[1], has_package(part.split()[1])) for part in TRAINERS},
}


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line before the text, from 0."""

    language: str
    text: str
    line: int


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks_of(page):
    text = page.read_text(encoding="utf-8")
    return [
        Block(found[1], found[2], text.count("\n", 0, found.start(2)))
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


def examples_of(page):
    return [block for block in blocks_of(page) if block.language in ("python", "pycon")]


def missing(page, block):
    """What the block needs that is not here; None where it can run."""
    for (name, part), (what, is_here) in NEEDS.items():
        if name == name_of(page) and part in block.text and not is_here:
            return what
    return None


def run(page, block, names):
    if block.language == "python":
        exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(block.text, {}, name_of(page), str(page), block.line)
    test.globs = names
    result = doctest.DocTestRunner().run(test, clear_globs=False)
    assert result.attempted > 0
    assert result.failed == 0, f"{name_of(page)} from line {block.line + 1}: the difference is in the output above"


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """What a reader has: an empty folder, and the variables that torchrun sets for one process."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    before = torch._dynamo.config.save_config()  # a page may set what it likes
    yield
    torch._dynamo.config.load_config(before)
    torch._dynamo.reset()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in PAGES if examples_of(page)], ids=name_of)
def test_examples(page, reader):
    """In the page's order, after the lines that docs/README.md says all pages start from."""
    names = {"__name__": "__main__"}
    if page != START:
        run(START, examples_of(START)[0], names)
    reasons = []
    for block in examples_of(page):
        if reason := missing(page, block):
            reasons.append(reason)
        else:
            run(page, block, names)
    if reasons:
        pytest.skip(f"{len(reasons)} of {len(examples_of(page))} examples need {', '.join(dict.fromkeys(reasons))}")


def test_what_examples_need():
    """Each entry is of one block, so that none outlives its block or hides another."""
    for name, part in NEEDS:
        assert sum(part in block.text for block in examples_of(ROOT / name)) == 1, (name, part)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_is_named(page):
    """Python in a block without a language would not run."""
    for block in blocks_of(page):
        looks_like_python = re.search(r"^(import |from \w+ import |>>> |optimizer)", block.text, re.MULTILINE)
        assert block.language or not looks_like_python, f"{name_of(page)}, line {block.line}"


@pytest.mark.parametrize("page", [page for page in START.parent.glob("*.md") if page != START], ids=name_of)
def test_page_opens_with_an_example(page):
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert text.index("\n```") < text.index("\n## ")


def test_worked_example_is_there():
    shown = "".join(block.text for block in examples_of(START.with_name("momentum.md")))
    assert re.search(r"^0\.99\n0\.9711$", shown, re.MULTILINE)


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


# ------------------------------------------------------------------------------------------------------------- links


def prose_of(page):
    """The page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links_of(page):
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)) if not re.match(r"https?:", link)]


def anchors_of(page):
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_links(page):
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{name_of(page)}: {link}"
        assert not anchor or anchor in anchors_of(target), f"{name_of(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named(page):
    """`csrc/cpu/`, `examples/digits*.py`: they exist, and so they are named as they are today."""
    folders = "|".join(("csrc", "tests", "examples", "benchmarks", "docs", "momentum_ext", r"\.ci"))
    for path in re.findall(rf"`((?:{folders})/[\w./*-]*)`", prose_of(page)):
        is_placeholder = re.search(r"[A-Z]{4,}", path.replace("README", ""))
        assert is_placeholder or any(ROOT.glob(path.rstrip("/"))), f"{name_of(page)}: {path}"
    for name in re.findall(r"`(\w+\.(?:py|h|cpp|cu|cuh))`", prose_of(page)):  # the prose says in which folder
        assert any((ROOT / folder).rglob(name) for folder in folders.split("|")), f"{name_of(page)}: {name}"


def test_every_page_and_picture_is_shown():
    """From README.md by links; and no picture lies there that no page shows."""
    found, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        found.add(page)
        if page.suffix == ".md":
            targets = {(page.parent / link.partition("#")[0]).resolve() for link in links_of(page)}
            waiting += targets - found
    pictures = set((ROOT / "docs").rglob("*.png"))
    assert found >= {*PAGES, *pictures}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_no_path_of_one_machine(page):
    assert not re.search(r"/(work|root|home|tmp)/", page.read_text(encoding="utf-8"))
