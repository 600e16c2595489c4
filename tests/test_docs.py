"The site: every page is prepared for Quarto, which is stood in for by a script where it is not installed, and named where it is needed."
import os, shutil, sys
from pathlib import Path
import pytest
from conftest import PROJECT, checked, copy_of_tree, run_command

def test_without_quarto_make_docs_says_how_to_get_it():
    if shutil.which("quarto"): pytest.skip("Quarto is installed")
    done = run_command("make", "-o", ".venv/.installed", "docs")
    assert done.returncode != 0 and "https://quarto.org/docs/get-started/" in done.stderr

@pytest.mark.slow
def test_every_page_is_ready_for_quarto(tmp_path):
    "Preparing a page runs its cells that export or import, each without the cells before it that do neither: so imports have cells of their own."
    tree, quarto = copy_of_tree(tmp_path/"tree"), tmp_path/"bin"/"quarto"
    quarto.parent.mkdir()
    quarto.write_text(f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
[ "$1" = inspect ] && echo '{{"config": {{"project": {{"type": "website"}}}}, "files": {{"input": []}}}}'
[ "$1" = render ] && for folder; do :; done && mkdir -p "$folder" && touch "$folder/index.html"
exit 0
""")
    quarto.chmod(0o755)
    checked("make", "-o", ".venv/.installed", "docs", cwd=tree,
            env={"PATH": os.pathsep.join([str(quarto.parent), str(Path(sys.executable).parent), os.environ["PATH"]])})
    assert "render" in (tmp_path/"calls").read_text() and (tree/"_docs/index.html").exists()
    pages = {p.relative_to(PROJECT/"nbs") for p in (PROJECT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert pages == {p.relative_to(tree/"_proc") for p in (tree/"_proc").rglob("*.ipynb")}
    assert (tree/"_proc/_quarto.yml").read_text() == (PROJECT/"_quarto.yml").read_text()

@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("quarto"), reason="needs Quarto: https://quarto.org/docs/get-started/")
def test_the_site_builds(tmp_path):
    tree = copy_of_tree(tmp_path/"tree")
    checked("make", "-o", ".venv/.installed", "docs", cwd=tree)
    for page in ("index", "jobs/finetune", "runs/job", "training/sft"): assert (tree/"_docs"/f"{page}.html").stat().st_size > 10_000
