"""What the README shows as a session of Python comes out as it stands there."""

import doctest
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def sessions():
    """The README's blocks of Python with prompts, each with its line number."""
    text = README.read_text(encoding="utf-8")
    for found in re.finditer(r"^```pycon\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield found[1], text.count("\n", 0, found.start(1))


def test_sessions_give_what_they_show():
    examples = 0
    for source, line in sessions():
        test = doctest.DocTestParser().get_doctest(source, {}, "README.md", str(README), line)
        result = doctest.DocTestRunner().run(test)
        assert result.failed == 0, f"README.md from line {line + 1}; the difference stands in the output above"
        examples += result.attempted
    assert examples > 0, "the README has no session of Python any more"


def test_worked_example_is_there():
    shown = "".join(source for source, _ in sessions())
    assert re.search(r"^0\.99$", shown, re.MULTILINE)
    assert re.search(r"^0\.9711$", shown, re.MULTILINE)
