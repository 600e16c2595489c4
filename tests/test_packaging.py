"The package as a user gets it: built from the source archive, installed away from the checkout."
import ast, json, re, subprocess, sys, sysconfig, zipfile
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from conftest import PROJECT, checked, copy_of_tree

settings = ConfigParser()
settings.read(PROJECT/"settings.ini")
CORE = [Requirement(line) for line in settings["requirements"]["install"].split("\n") if line]
EXTRAS = {name: [Requirement(line) for line in lines.split("\n") if line] for name, lines in settings["extras"].items()}

PINS = [Requirement(line) for line in (PROJECT/"constraints.txt").read_text().splitlines() if not line.startswith("#")]

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from the source archive, so that a file missing from either is missing here."
    folder = tmp_path_factory.mktemp("packaging")
    checked(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder/"dist", cwd=copy_of_tree(folder/"tree"))
    return next((folder/"dist").glob("*.whl"))

def test_the_wheel_has_the_jobs_the_model_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive: names = archive.namelist()
    ours = [n for n in names if ".dist-info/" not in n]
    assert {n.split("/")[0] for n in ours} == {"llmops_kit"}
    jobs = {p.name for p in (PROJECT/"nbs/jobs").glob("*.ipynb")}
    assert jobs and {n for n in ours if n.endswith(".ipynb")} == {f"llmops_kit/jobs/{name}" for name in jobs}
    for folder in ("tiny", "tiny_run"):
        assert {f"llmops_kit/models/{folder}/{p.name}" for p in (PROJECT/"llmops_kit/models"/folder).iterdir()} <= set(ours)
    for data in ("data/templates/*.md", "evaluation/probes/*.jsonl"):
        found = {str(p.relative_to(PROJECT)) for p in (PROJECT/"llmops_kit").glob(data)}
        assert found and found <= set(ours), data
    assert {str(p.relative_to(PROJECT)) for p in (PROJECT/"llmops_kit").rglob("*.py")} <= set(ours)
    assert not [n for n in ours if n.startswith(("nbs/", "tests/")) or "__pycache__" in n]
    assert wheel.stat().st_size < 12e6

def test_the_wheel_names_its_requirements_and_extras(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(info).decode().partition("\n\n")[0]
        entries = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
        assert [n for n in archive.namelist() if n.endswith("licenses/LICENSE")]
    found = lambda field: re.findall(rf"^{field}: (.+)$", metadata, re.M)
    assert set(found("Provides-Extra")) == set(EXTRAS)
    assert len(found("Requires-Dist")) == len(CORE) + sum(map(len, EXTRAS.values()))
    version = re.search(r'__version__ = "(.+)"', (PROJECT/"llmops_kit/__init__.py").read_text()).group(1)
    assert found("Version") == [version] and found("License-Expression") == ["Apache-2.0"] and found("Requires-Python") == [">=3.11"]
    assert "llmops = llmops_kit.runs.cli:main" in entries

def test_it_works_installed_away_from_the_checkout(wheel, tmp_path):
    checked(sys.executable, "-m", "venv", "--without-pip", tmp_path/"venv", cwd=tmp_path)
    python = tmp_path/"venv/bin/python"
    checked(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    ours = Path(checked(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (ours/"dependencies.pth").write_text(sysconfig.get_path("purelib"))  # what is installed here, but not this checkout
    env = {"LLMOPS_RUNS": str(tmp_path/"runs"), "HOME": str(tmp_path), "PATH": f"{python.parent}:/usr/bin:/bin"}
    def llmops(*args):
        done = subprocess.run([tmp_path/"venv/bin/llmops", *args], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    where = checked(python, "-c", "import llmops_kit; print(llmops_kit.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)
    jobs = llmops("jobs")
    assert all(p.stem in jobs for p in (PROJECT/"nbs/jobs").glob("*.ipynb"))
    record = json.loads(llmops("run", "prepare", "-p", "limit", "60", "--json"))
    assert record["status"] == "finished" and (tmp_path/"runs"/record["id"]/"notebook.ipynb").exists()

def test_every_requirement_has_a_lower_bound_and_a_pin_that_meets_it():
    for pin in PINS: assert re.fullmatch(r"==[\w.]+", str(pin.specifier)) and not pin.url, f"{pin}: one exact version, no address"
    pins = {canonicalize_name(pin.name): str(pin.specifier).lstrip("=") for pin in PINS}
    assert pins["torch"] == "2.13.0"
    for requirement in [*CORE, *(r for rs in EXTRAS.values() for r in rs)]:
        assert ">=" in str(requirement.specifier), f"{requirement}: without a lower bound pip may fall back to an ancient version"
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement

def test_the_environment_is_the_pinned_one_and_fits_any_python_3_11():
    "A distribution's Python is often an early patch release, which some packages refuse: pip then ends in a conflict without a reason."
    different = []
    for pin in PINS:
        try: here = distribution(pin.name)
        except PackageNotFoundError: continue  # an extra that is not installed, or another platform's
        if not pin.specifier.contains(here.version.partition("+")[0]): different.append(f"{pin} is {here.version} here")
        else: assert SpecifierSet(here.metadata.get("Requires-Python") or "").contains("3.11.0"), pin
    if different: pytest.skip("not installed with constraints.txt: " + ", ".join(different))

def test_every_import_is_a_requirement():
    "A package that comes along with another one may stop doing so."
    provides = packages_distributions()
    declared = {canonicalize_name(r.name) for r in [*CORE, *(r for rs in EXTRAS.values() for r in rs)]}
    imported = {}
    sources = {p: p.read_text() for p in (PROJECT/"llmops_kit").rglob("*.py")}
    for path in (PROJECT/"nbs/jobs").glob("*.ipynb"):
        code = [c["source"] for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        sources[path] = "\n".join(re.sub(r"^[%!].*$", "", "".join(source), flags=re.M) for source in code)
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names: imported.setdefault(name.split(".")[0], path.name)
    outside = {name: path for name, path in imported.items() if name not in sys.stdlib_module_names and name != "llmops_kit"}
    undeclared = {name: path for name, path in outside.items()
                  if not declared & {canonicalize_name(d) for d in provides.get(name, [name])}}
    assert not undeclared, f"add to settings.ini: {undeclared}"
