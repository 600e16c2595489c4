"`llmops verify-notebooks` finds a false number, a changed picture and a missing output, and lets a clean notebook pass."
import base64, io, json
import nbformat, pytest
from nbformat.v4 import new_code_cell, new_notebook
from conftest import PROJECT, run_command

CELLS = ["#| export\nimport matplotlib.pyplot as plt, time, tempfile, sys, os", "print(f'loss {1 / 7:.4f} after {time.time():.1f} s in {tempfile.mkdtemp()}')", "{'accuracy': 2 / 3, 'n': 1200, 'made': object()}",
         "figure, axes = plt.subplots(figsize=(3, 2)); axes.plot([1, 2, 4]); plt.show()", "{'took': time.perf_counter_ns()}", "#| slow\n1 / 0"]

@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    "A notebook as it was run."
    from nbclient import NotebookClient
    folder = tmp_path_factory.mktemp("verify")
    (folder/"pyproject.toml").write_text("[tool.nbdev]\ntst_flags = 'slow gpu net'\n")
    notebook = new_notebook(cells=[new_code_cell(o) for o in CELLS[:-1]], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    NotebookClient(notebook).execute()
    notebook.cells.append(new_code_cell(CELLS[-1]))
    notebook.cells[4].metadata["tags"] = ["volatile"]
    return folder, notebook

def a_false_number(cells): cells[1].outputs[0].text = cells[1].outputs[0].text.replace("0.1429", "0.1449")
def a_false_count(cells): cells[2].outputs[0].data["text/plain"] = cells[2].outputs[0].data["text/plain"].replace("1200", "1201")
def a_word(cells): cells[1].outputs[0].text = cells[1].outputs[0].text.replace("loss", "gain")
def a_missing_output(cells): cells[2].outputs = []
def a_missing_volatile_output(cells): cells[4].outputs = []
def an_output_too_many(cells): cells[0].outputs = [nbformat.v4.new_output("stream", text="imported\n")]

def a_changed_picture(cells):
    import numpy as np
    from PIL import Image
    data = next(o for o in cells[3].outputs if "image/png" in o.get("data", {})).data
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB"))
    pixels[60:68, 100:112] = 0 # as a marker that is not in the data
    Image.fromarray(pixels).save(file := io.BytesIO(), "png")
    data["image/png"] = base64.b64encode(file.getvalue()).decode()

PLANTED = {a_false_number: [2], a_false_count: [3], a_word: [2], a_missing_output: [3], a_missing_volatile_output: [5], an_output_too_many: [1], a_changed_picture: [4]}

def test_each_planted_falsehood_is_found_where_it_is(clean):
    folder, notebook = clean
    for plant in [lambda cells: None, *PLANTED]:
        copy = nbformat.from_dict(json.loads(json.dumps(notebook)))
        plant(copy.cells)
        name = plant.__name__.strip("<>")
        nbformat.write(copy, folder/f"{name}.ipynb")
    done = run_command("llmops", "verify-notebooks", "--json", "--workers", "2", folder)
    found = {o["path"].split("/")[-1].removesuffix(".ipynb"): [d["cell"] for d in o["differences"]] for o in json.loads(done.stdout)}
    assert done.returncode == 1 and found == {"lambda": []} | {o.__name__: cells for o, cells in PLANTED.items()}, done.stderr
    done = run_command("llmops", "verify-notebooks", folder/"lambda.ipynb")
    assert (done.returncode, done.stdout) == (0, "") and "1 of 1 notebooks show what they store" in done.stderr
    done = run_command("llmops", "verify-notebooks", "--flags", "slow", folder/"lambda.ipynb")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr.split("0 of 1 notebooks show what they store")[1] # the end of a long log says what failed

def test_the_tag_is_kept_by_nbdev():
    import tomllib
    assert "tags" in tomllib.loads((PROJECT/"pyproject.toml").read_text())["tool"]["nbdev"]["allowed_cell_metadata_keys"]

def test_a_wrong_path_is_named(tmp_path):
    (tmp_path/"no.ipynb").write_text("no notebook")
    for path, message in ((tmp_path/"gone.ipynb", "There is no"), (tmp_path/"no.ipynb", "is no notebook")):
        done = run_command("llmops", "verify-notebooks", path)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
