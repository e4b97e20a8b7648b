"""What the documents say about the code must be so."""

import re
from pathlib import Path

import numpy as np
import pytest
from support import diagrams

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def blocks(document: str) -> list[str]:
    """The Python blocks of a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    """Every relative link is that of a file or folder."""
    for link in re.findall(r"\]\(([^)#\s]+)(?: \"[^\"]*\")?\)", path.read_text()):
        if "://" not in link:
            assert (path.parent / link).exists(), link


def test_threat_model_names_tests_that_exist() -> None:
    """Each test named in the table of promises is there."""
    text = (ROOT / "docs" / "threat-model.md").read_text()
    table = text[text.index("| promise |") : text.index("## Not promised")]
    named = re.findall(r"`((?:[a-z]+/)+(?:test_\w+\.py)?)`", table)
    assert len(named) >= 15
    for test in named:
        assert (ROOT / "tests" / test).exists() or (ROOT / test).exists(), test
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for function in re.findall(r"`(test_[a-z_]+)`", table):
        assert f"def {function}(" in code, function


def test_attacks_name_checks_that_exist() -> None:
    """Each attack's docstring names the check that stops it by a name of the code."""
    code = "".join(path.read_text() for path in (ROOT / "secureagg").glob("*.py"))
    for path in (ROOT / "tests" / "attacks").glob("*.py"):
        stopped_by = " ".join(re.findall(r"(?:Stopped|Held) by.*?\"\"\"", path.read_text(), re.DOTALL))
        assert stopped_by, path.name
        for name in re.findall(r"``(?:[A-Z]\w+\.)?(_?[a-z]\w+)``", stopped_by):
            assert re.search(rf"\b{name}\b", code), (path.name, name)


def test_the_diagrams_are_those_of_the_code() -> None:
    """The state diagrams of the protocol are the ones that the machines' transition tables give."""
    assert diagrams.text() in diagrams.DOCUMENT.read_text()


def test_tour(capsys: pytest.CaptureFixture[str]) -> None:
    """The tour's first example prints what its comments say, and its dropouts end as its comments say."""
    first, second = blocks("docs/tour.md")[:2]
    names: dict[str, object] = {}
    exec(first, names)  # noqa: S102  our own document
    expected = re.findall(r"#\s+((?:\(|True|\[).*?)(?:: .*)?$", first, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == expected
    *fine, last = [line for line in second.splitlines() if line]
    for line in fine:
        exec(line, names)  # noqa: S102
    with pytest.raises(Exception, match="answered, expected at least 3") as ended:
        exec(last, names)  # noqa: S102
    assert type(ended.value).__name__ == "ThresholdNotMet"


def test_readme_run_round() -> None:
    """The README's in-process round runs as it stands."""
    (snippet,) = (block for block in blocks("README.md") if "run_round" in block)
    names: dict[str, object] = {f"update_{site}": np.full(3, 0.5) for site in "abcd"}
    exec(snippet, names)  # noqa: S102
    np.testing.assert_allclose(names["outcome"].aggregate, 0.5, atol=1e-4)
