"""Run All in a real JupyterLab, started by `make lab` and driven through a headless browser.
Screenshots go to the folder that $LLMOPS_SCREENSHOTS names, else to pytest's temporary one."""
import json, os, re, shutil, signal, subprocess, sys, threading
from pathlib import Path
import nbformat, pytest
from conftest import copy_of_tree

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
PICTURE = ".jp-RenderedImage img, .jp-RenderedSVG img"
pytestmark = pytest.mark.skipif(not BROWSER, reason="needs Chromium: apt-get install chromium")

class Lab:
    "A JupyterLab that `make lab` serves from a copy of the tree, with settings of its own."
    def __init__(self, tree, runs, home):
        self.tree, self.runs, self.log = tree, runs, []
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "LLMOPS_RUNS": str(runs),
               **{f"JUPYTER_{kind}_DIR": str(home/kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}}
        options = "--no-browser --ip=127.0.0.1 --port=0 --IdentityProvider.token=lab --LabApp.expose_app_in_browser=True" + (" --allow-root" if os.geteuid() == 0 else "")
        self.process = subprocess.Popen(["make", "-s", "-o", ".venv/.installed", "lab", f"LAB={options}"], cwd=tree, env=env, text=True,
                                        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for line in self.process.stdout:
            self.log.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/lab", line): break
        else: pytest.fail("JupyterLab did not start:\n" + "".join(self.log))
        self.url = f"http://127.0.0.1:{found.group(1)}/lab/tree"
        threading.Thread(target=lambda: self.log.extend(self.process.stdout), daemon=True).start()

    def stop(self):
        os.killpg(self.process.pid, signal.SIGTERM)
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: os.killpg(self.process.pid, signal.SIGKILL)

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    lab = Lab(copy_of_tree(folder/"tree"), folder/"runs", folder/"home")
    yield lab
    lab.stop()

@pytest.fixture
def page():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser.new_page(viewport=dict(width=1400, height=1000))
        browser.close()

@pytest.fixture
def shots(tmp_path):
    folder = Path(os.environ.get("LLMOPS_SCREENSHOTS", tmp_path/"screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder

def with_parameters(path, **values):
    "Write other values into the parameters cell, as a user would by typing; without stored outputs, what is seen later is new."
    notebook = nbformat.read(path, 4)
    cell, = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    for name, value in values.items():
        cell.source, found = re.subn(rf"^({name}: [^=]+= )[^#\n]+?(\s*(#.*)?)$", lambda m: f"{m[1]}{value!r}{m[2]}", cell.source, flags=re.M)
        assert found == 1, f"{path.name} has no parameter {name}"
    for cell in notebook.cells:
        if cell.cell_type == "code": cell.outputs = []
    nbformat.write(notebook, path)

def open_and_run(page, lab, path):
    "Open a notebook, Run > Run All Cells."
    page.goto(f"{lab.url}/{path.relative_to(lab.tree)}?token=lab&reset")  # without the tabs of an earlier test
    # the page says idle before there is a kernel, and drops a Run All that comes then: ask its session
    page.wait_for_function("""() => {const kernel = window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel;
        return kernel && kernel.connectionStatus == "connected" && kernel.status == "idle"}""", timeout=120_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

def run_all(page, lab, path, shots, minutes):
    "Run a notebook, see a picture while cells still run, wait for the last one, save; the notebook as it was saved."
    open_and_run(page, lab, path)
    indicator, counting = ".jp-Notebook-ExecutionIndicator", re.compile(r"Executed \d+/\d+ cells")
    # idle also shows between two cells, so what the indicator counts decides: "Executed 3/12 cells" becomes "Executed 12 cells";
    # after an error it never does
    page.locator(indicator, has_text=counting).wait_for(timeout=60_000, state="attached")
    failed = page.locator("[data-mime-type='application/vnd.jupyter.stderr']", has_text="Traceback (most recent call last)")
    pictures = page.locator(PICTURE)
    pictures.or_(failed).first.wait_for(timeout=minutes*60_000, state="attached")
    if pictures.count(): pictures.first.scroll_into_view_if_needed()
    page.screenshot(path=shots/f"{path.stem}-running.png")
    live = page.locator(indicator, has_text=counting).count() == 1
    done = page.locator(f"{indicator}[data-status=idle]", has_text=re.compile(r"Executed \d+ cells"))
    try: done.or_(failed).first.wait_for(timeout=minutes*60_000, state="attached")
    finally: page.screenshot(path=shots/f"{path.stem}-end.png")
    page.keyboard.press("Control+s")
    page.locator(".jp-mod-current.jp-mod-dirty").wait_for(state="detached")
    return nbformat.read(path, 4), live

def check_finetune(page, lab, path, shots, minutes):
    before = set(lab.runs.glob("*/run.json"))
    notebook, live = run_all(page, lab, path, shots, minutes)
    errors = ["\n".join(o.traceback) for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert not errors, errors[0]
    assert not [c.execution_count for c in notebook.cells if c.get("execution_count")], "saving cleans what changes with every run"
    assert [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])], "and keeps the tag"
    new = set(lab.runs.glob("*/run.json")) - before
    assert len(new) == 1, f"one run, one record: {new}"
    record = json.loads(new.pop().read_text())
    assert (record["job"], record["status"]) == ("finetune", "finished")
    assert any(name.startswith("validation/") for name in record["metrics"])
    training, = [c for c in notebook.cells if c.cell_type == "code" and "tuned = in_workers(" in c.source]
    assert live and any("image/png" in o.get("data", {}) for o in training.outputs), "the loss plot is there while the training runs, and after"
    pictures = page.locator(PICTURE)
    for i in range(pictures.count()):
        pictures.nth(i).scroll_into_view_if_needed()
        page.screenshot(path=shots/f"{path.stem}-picture-{i}.png")
        assert pictures.nth(i).is_visible() and pictures.nth(i).evaluate("image => image.naturalWidth") > 200
    return record

def test_run_all_of_a_small_finetune(page, lab, shots):
    path = lab.tree/"nbs/jobs/finetune-small.ipynb"
    shutil.copy(lab.tree/"nbs/jobs/finetune.ipynb", path)
    with_parameters(path, max_steps=6, eval_every=3, max_new_tokens=8, validation_examples=40, certify="off")
    check_finetune(page, lab, path, shots, minutes=4)

def written(path):
    "The lines of a JSONL file, which may not be there yet."
    return [json.loads(o) for o in path.read_text().splitlines()] if path.exists() else []

def test_a_person_labels_with_clicks_and_keys(page, lab, shots):
    "Every answer is on the disk when the next pair is shown; nothing on the page names a model; the cells below report and save."
    from llmops_kit.evaluation.answers import choose_pairs, left_model, load_predictions, pair_up, right_model
    answers = lab.tree/"predictions.jsonl"
    answers.write_text("".join(json.dumps({"id": f"f{n}", "prompt": f"Describe <i>{n}</i>.", "reference": f"Return {n}.", "base": f"It has number {n}", "tuned": f"Return {n}."}) + "\n" for n in range(12)))
    pairs = choose_pairs(pair_up(load_predictions(str(answers))), 8, 0)
    path = lab.tree/"nbs/jobs/label-here.ipynb"
    shutil.copy(lab.tree/"nbs/jobs/label.ipynb", path)
    with_parameters(path, predictions=str(answers), pairs=8, rater="ada", wandb="off")
    before = set(lab.runs.glob("*/run.json"))
    open_and_run(page, lab, path)
    box = page.locator(".llmops-labelling")
    box.wait_for(timeout=120_000)
    box.scroll_into_view_if_needed()
    shown = lambda n: box.get_by_text(f"{n} of 8, ada").wait_for(timeout=30_000)
    shown(0)
    page.screenshot(path=shots/"label-first.png")
    run, = set(lab.runs.glob("*/run.json")) - before
    labels = run.parent/"artifacts/labels.jsonl"
    sides = [left_model(pairs, row["id"], "ada", 0) for row in pairs.rows]
    first = pairs.rows[0]
    assert box.locator(".llmops-prompt").inner_text() == first["prompt"], "as text, not as HTML"
    assert box.locator(".llmops-left").inner_text() == first["answers"][sides[0]] and box.locator(".llmops-right").inner_text() == first["answers"][right_model(pairs, sides[0])]
    assert not re.search("base|tuned", box.inner_text()), "blind"
    box.get_by_role("button", name="Left is better (l)").click()
    shown(1)
    assert [o["label"] for o in written(labels)] == ["left"], "on the disk before the next pair is shown"
    page.wait_for_function("document.activeElement.placeholder?.startsWith('click here and type')")  # the field has the focus again
    page.keyboard.press("t")
    shown(2)
    page.keyboard.type("rrs")  # faster than the kernel answers
    shown(5)
    page.screenshot(path=shots/"label-middle.png")
    box.get_by_role("button", name="Undo (u)").click()
    shown(4)
    box.get_by_role("button", name="Right is better (r)").click()
    shown(5)
    page.wait_for_function("document.activeElement.placeholder?.startsWith('click here and type')")
    page.keyboard.type("u")
    shown(4)
    page.keyboard.type("lllx")  # x means nothing
    shown(7)
    page.keyboard.type("l")
    box.get_by_text("All pairs have an answer. Run the cells below.").wait_for(timeout=30_000)
    lines = written(labels)
    assert [o["label"] for o in lines] == ["left", "tie", "right", "right", "skip", "undo", "right", "undo", "left", "left", "left", "left"]
    assert [o["pair"] for o in lines] == [pairs.rows[n]["id"] for n in (0, 1, 2, 3, 4, 4, 4, 4, 4, 5, 6, 7)]
    for o in lines:
        if o["label"] in ("left", "right"):
            n = [row["id"] for row in pairs.rows].index(o["pair"])
            assert o["left"] == sides[n] and o["winner"] == (sides[n] if o["label"] == "left" else right_model(pairs, sides[n]))
    assert len(set(sides)) == 2 and {o["rater"] for o in lines} == {"ada"}
    page.locator(".jp-CodeCell", has_text="report = label_report(").click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run Selected Cell and All Below", exact=True).click()
    page.get_by_text("Again, to the same numbers").wait_for(timeout=60_000)
    page.screenshot(path=shots/"label-end.png")
    record = json.loads(run.read_text())
    assert (record["job"], record["status"], record["runner"]) == ("label", "finished", "jupyter")
    assert {o["name"] for o in record["outputs"]} == {"labels.jsonl", "preferences"} and record["metrics"]["people/labels"] == 8
    assert record["metrics"]["preferences"] == record["metrics"]["people/wins"] + record["metrics"]["people/losses"] == 7
    assert box.get_by_role("button", name="Undo (u)").is_disabled(), "what was saved does not change any more"

@pytest.mark.slow
def test_run_all_of_finetune_as_it_is(page, lab, shots):
    check_finetune(page, lab, lab.tree/"nbs/jobs/finetune.ipynb", shots, minutes=10)
