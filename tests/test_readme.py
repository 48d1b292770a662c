"""What the README says about the code is so."""
import re
import subprocess
import sys

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_equations_stand_where_the_readme_says():
    links = re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 10
    for code, file, line in links:
        text = (ROOT / file).read_text().splitlines()
        found = [i for i, row in enumerate(text, 1) if code in row]
        assert found == [int(line)], f"README: {code} is in line {found} of {file}, not {line}"


def test_every_flag_and_file_that_it_names_exists():
    for script in ("train.py", "eval.py", "predict.py", "-m paper.tables", "-m paper.figures", "app.py"):
        usage = subprocess.run([sys.executable, "-W", "ignore", *script.split(), "--help"], cwd=ROOT, text=True, check=True,
                               capture_output=True).stdout
        for command in re.findall(rf"{script}( --.*)", README):
            for flag in re.findall(r"--[a-z-]+", command.split(" -- ")[0]):  # what follows goes to another script
                assert flag in usage, f"README: {script} has no {flag}"
    for link in re.findall(r"\]\(((?!http)[\w./]+)", README):
        assert (ROOT / link).exists(), f"README: {link} does not exist"


def test_the_repository_names_no_machine():
    """Paths of a developer's machine do not belong into the repository."""
    for file in [*ROOT.glob("*.py"), *(f for room in ("ops", "readers", "paper") for f in ROOT.glob(f"{room}/*")),
                 *ROOT.glob("docs/*.md"), ROOT / "README.md"]:
        if file.is_file():
            assert not re.search(r"/(work|root|home)/", file.read_text()), file
