"Every command that README.md and CONTRIBUTING.md show is one that exists, with parameters that exist; every link leads somewhere."
import ast, re, shlex
import pytest, yaml
from conftest import PROJECT, checked
from llmops_kit.runs.catalog import load_job
from llmops_kit.runs.cli import parser
from llmops_kit.runs.parameters import parse_value

README, CONTRIBUTING = (PROJECT/name for name in ("README.md", "CONTRIBUTING.md"))

def commands(path):
    "The lines of shell blocks, what notebook cells send to a shell, and code in a sentence that begins with one of our commands."
    text = path.read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    for language, block in blocks:
        for line in block.splitlines():
            if language in ("sh", "bash"): yield line
            elif line.startswith("!"): yield line[1:]
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        if re.match(r"(make|llmops|papermill|pytest|nbdev-\w+)\b(?! is| works)", code) and not code.startswith("llmops_kit"): yield code

def check_parameters(job, pairs):
    known = load_job(job).parameters
    for name, value in pairs:
        assert name in known, f"{job} has no parameter {name}"
        parse_value(known[name], value)
        if value.startswith("latest:"): load_job(value.removeprefix("latest:"))

def check_llmops(words):
    if "--help" in words:
        with pytest.raises(SystemExit) as left: parser().parse_args(words)
        assert left.value.code == 0
    elif words:
        arguments = parser().parse_args(words)
        if arguments.command in ("run", "jobs", "sweep", "tune") and arguments.job and not arguments.job.endswith(".yaml"): check_parameters(arguments.job, getattr(arguments, "parameter", []))

def check_make(words):
    for target in words: checked("make", "-n", "-o", ".venv/.installed", target)

def check_papermill(words):
    notebook, _, *rest = words
    assert (PROJECT/notebook).exists() and len(rest) % 3 == 0 and set(rest[::3]) <= {"-p"}
    check_parameters(str(PROJECT/notebook), zip(rest[1::3], rest[2::3]))

def check_files(words): assert all((PROJECT/o).exists() for o in words if "/" in o or "." in o)

def check_activate(words): assert words == [".venv/bin/activate"]

CHECKS = {"echo": lambda words: yaml.safe_load(words[0]), "llmops": check_llmops, "make": check_make, "papermill": check_papermill, "source": check_activate,
          "python": lambda words: ast.parse(words[1]), "pip": check_files, "pytest": check_files, "nbdev-test": check_files, "nbdev-bump-version": check_files}

@pytest.mark.parametrize("path, command", [pytest.param(p, c, id=f"{p.stem}: {c[:60]}") for p in (README, CONTRIBUTING) for c in commands(p)])
def test_a_command_that_is_shown_exists(path, command):
    name, *words = shlex.split(re.sub(r"(<name>|JOB)$", "finetune", re.sub(r"\s2?>\s*\S+", "", command)))
    CHECKS[name](words)

def test_links_lead_somewhere():
    text = README.read_text()
    anchors = {"#" + re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    lost = [o for o in links if not (o in anchors if o.startswith("#") else re.match("https?://|data:", o) or (PROJECT/o).exists())]
    assert not lost

def test_make_lists_every_target():
    "A target is there to be found: each has its line in what plain `make` prints."
    makefile = (PROJECT/"Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.M).group(1).split()
    listed = re.findall(r"^make (\S+)", checked("make"), re.M)
    assert sorted(phony) == sorted(listed)
