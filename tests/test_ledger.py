"The ledger at scale: an index that is never stale and never in the way, pruning that keeps what is needed, archives that replay elsewhere."
import io, json, os, random, shutil, subprocess, sys, tarfile
from datetime import datetime, timezone
from pathlib import Path
import pytest
from nbformat import write
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from conftest import checked, llmops, run_command
from llmops_kit.runs.archive import import_run
from llmops_kit.runs.errors import UserError
from llmops_kit.runs.ledger import ask_index, create_record, list_runs, read_record, run_folder, update_record
from llmops_kit.runs.lineage import all_links, reached
from llmops_kit.runs.prune import plan_pruning, prune

@pytest.fixture
def ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPS_RUNS", str(tmp_path/"runs"))
    return tmp_path/"runs"

def add(n, job="finetune", needs=(), status="finished", day=1):
    id = f"202601{day:02d}-{n // 3600:02d}{n // 60 % 60:02d}{n % 60:02d}-{job}-{n:04x}"
    create_record({"id": id, "job": job, "status": status, "started": datetime(2026, 1, day, tzinfo=timezone.utc).isoformat(), "parameters": {}, "given": [], "metrics": {},
                   "inputs": [{"name": f"input {k}", "run": o, "sha256": "ab"} for k, o in enumerate(needs)], "outputs": []})
    return id

def of_folders(): # what the index has to say
    return sorted((o.parent.name, json.loads(o.read_text())["status"]) for o in Path(os.environ["LLMOPS_RUNS"]).glob("*/run.json"))

def of_index(): return sorted(ask_index("select id, status from runs"))

def test_two_runs_that_drew_the_same_id(ledger):
    first = add(7)
    other = {"id": first, "job": "finetune", "status": "failed", "outputs": []}
    folder = create_record(other)
    assert other["id"] != first and folder == run_folder(other["id"]) and read_record(other["id"])["status"] == "failed"
    assert read_record(first)["status"] == "finished" and len(list_runs()) == 2

# -- the index

def test_no_change_of_the_folders_is_missed(ledger):
    rng, ids = random.Random(0), [add(n) for n in range(30)]
    for n in range(30, 150):
        act = rng.choice(["add", "update", "delete", "same size and time", "copy back", "rename"])
        id = rng.choice(ids)
        path = run_folder(id)/"run.json"
        if act == "add": ids.append(add(n))
        elif act == "update": update_record(id, status=rng.choice(["failed", "finished", "killed"]))
        elif act == "delete": shutil.rmtree(run_folder(id)); ids.remove(id)
        elif act == "same size and time": # by hand, in place, and dated back
            before = path.stat()
            path.write_text(path.read_text().replace('"status": "failed"', '"status": "killed"').replace('"status": "finished"', '"status": "finishef"'))
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert path.stat().st_size == before.st_size
        elif act == "copy back": shutil.copy2(path, path.with_name("old")); update_record(id, status="failed"); os.replace(path.with_name("old"), path)
        else: # another run's record comes to this place
            other = rng.choice(ids)
            shutil.copytree(run_folder(other), run_folder(new := f"{other[:-4]}{n + 0x1000:04x}"))
            ids.append(new)
        if rng.random() < 0.5: assert of_index() == of_folders(), act
    assert of_index() == of_folders()

def test_an_old_record_that_changes_is_read_again(ledger):
    "Without the two seconds in which a record counts as fresh, only its stamp can tell."
    import time
    ids = [add(n) for n in range(3)]
    time.sleep(max(0, max((run_folder(o)/"run.json").stat().st_ctime for o in ids) + 2.1 - time.time()))
    assert of_index() == of_folders() and all(o for o, in ask_index("select stamp from runs"))
    before = (run_folder(ids[0])/"run.json").stat()
    path = run_folder(ids[0])/"run.json"
    path.write_text(path.read_text().replace('"status": "finished"', '"status": "finishef"'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert of_index() == of_folders()

CHANGING = """
import os, random, shutil, sys
sys.path.insert(0, {tests!r}); n = int(sys.argv[1]); rng = random.Random(n)
from test_ledger import add, list_runs, run_folder, update_record
mine = []
for k in range(40):
    mine.append(add(1000 * n + k))
    update_record(rng.choice(mine), metrics={{"n": k}})
    if k % 5 == 4: shutil.rmtree(run_folder(mine.pop(0)))
    if k % 7 == 6: (run_folder("x").parent/".index.sqlite").write_bytes(b"rubbish" * 500)
    found = [o["id"] for o in list_runs()]
    assert set(mine) <= set(found), (set(mine) - set(found))
"""

def test_several_processes_at_once(ledger):
    code = CHANGING.format(tests=str(Path(__file__).parent))
    workers = [subprocess.Popen([sys.executable, "-c", code, str(n)], stderr=subprocess.PIPE, text=True) for n in range(3)]
    told = [o.communicate()[1] for o in workers]
    assert [o.returncode for o in workers] == [0, 0, 0], told
    assert of_index() == of_folders() and len(of_index()) == 3 * 32

@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_ledger_of_somebody_else_is_read_without_writing(tmp_path, monkeypatch):
    import tempfile
    with tempfile.TemporaryDirectory() as folder: # pytest's own folders are closed to others
        os.chmod(folder, 0o755)
        monkeypatch.setenv("LLMOPS_RUNS", folder)
        ids = [add(n) for n in range(5)]
        read = "import os; from llmops_kit.runs import ledger; import json, psutil, difflib; os.setuid(65534); print(json.dumps([o['id'] for o in ledger.list_runs()]), ledger.resolve_run('latest:finetune'))"
        expected = f"{json.dumps(ids[::-1])} {ids[-1]}\n"
        assert checked(sys.executable, "-c", read) == expected and not (Path(folder)/".index.sqlite").exists()
        list_runs()
        update_record(ids[0], status="failed")
        before = (Path(folder)/".index.sqlite").read_bytes()
        assert checked(sys.executable, "-c", read) == expected and (Path(folder)/".index.sqlite").read_bytes() == before

def test_one_broken_record_is_named(ledger):
    good, bad = add(1, "prepare"), add(2)
    (run_folder(bad)/"run.json").write_text("{")
    assert [o["id"] for o in list_runs("prepare")] == [good]
    with pytest.raises(UserError, match="is not JSON any more"): list_runs()
    with pytest.raises(UserError, match="is not JSON any more"): plan_pruning(older_than=0)

# -- pruning

@pytest.mark.parametrize("seed", range(5))
def test_pruning_keeps_what_is_needed(seed, ledger):
    rng, ids = random.Random(seed), []
    for n in range(40): ids.append(add(n, rng.choice(["prepare", "finetune"]), rng.sample(ids, min(len(ids), rng.choice([0, 1, 1, 2]))), rng.choice(["finished", "failed", "killed"]), rng.choice([1, 20])))
    links, _ = all_links()
    asked = {o["id"] for o in list_runs("finetune") if o["started"] < "2026-01-10"}
    plan = plan_pruning(job="finetune", older_than=(datetime.now(timezone.utc) - datetime(2026, 1, 10, tzinfo=timezone.utc)).days)
    gone = set(prune(plan))
    assert gone and gone | set(plan.needed) == asked
    kept = {o["id"] for o in list_runs()}
    assert kept == set(ids) - gone and set(reached(kept, links)) == kept                 # nothing that is left lacks anything
    assert all(set(reached([o], {k: v for k, v in users(links).items()})) - gone for o in plan.needed)  # and nothing stays without a reason

def users(links):
    found = {}
    for id, needed in links.items():
        for o in needed: found.setdefault(o, []).append(id)
    return found

def test_pruning_says_what_it_would_do_first(ledger):
    old, now = add(1, status="failed"), add(2)
    assert run_command("llmops", "runs", "prune").returncode == 2
    assert "With --yes 1 runs would go" in llmops("runs", "prune", "--status", "failed") and run_folder(old).exists()
    assert json.loads(llmops("runs", "--job", "prepare", "prune", "--older-than", "0", "--yes", "--json"))["deleted"] == []  # what stands before `prune` holds
    assert json.loads(llmops("runs", "prune", "--status", "failed", "--yes", "--json"))["deleted"] == [old]
    assert [o["id"] for o in list_runs()] == [now]

# -- archives

def job(path, parameters, *cells):
    code = [new_code_cell(f'{parameters}\nseed: int = 0\nwandb: str = "off"', metadata={"tags": ["parameters"]}),
            new_code_cell(f'from llmops_kit.runs.job import Run\nfrom llmops_kit.runs.ledger import find_output\nfrom pathlib import Path\nimport numpy as np\nrun = Run.start("{path.stem}")'), *map(new_code_cell, cells)]
    write(new_notebook(cells=[new_markdown_cell(f"# {path.stem}\n\n> a job"), *code], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), path)
    return path

def test_another_machine_replays_from_an_archive(ledger, tmp_path, monkeypatch, warm):
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"rows.txt").write_text("3 1 2")
    first = job(tmp_path/"sort.ipynb", f'rows: str = ""', 'text = run.use("rows", Path(rows)) and Path(rows).read_text()\n(run.folder/"s.txt").write_text(" ".join(sorted(text.split())))\n'
                'run.save("sorted.txt", run.folder/"s.txt"); (run.folder/"o.bin").write_text("other"); run.save("other.bin", run.folder/"o.bin"); run.finish({"count": len(text.split())})')
    second = job(tmp_path/"noise.ipynb", 'source: str = ""', 'from types import SimpleNamespace\nfound = find_output(source, "file", "sorted.txt")\nrun.use("source", SimpleNamespace(artifact=found))',
                 'x = float(Path(found.path).read_text().split()[0]) + np.random.normal()\nrun.log({"x": x}, 1)\nrun.finish({"x": x})')
    made = json.loads(llmops("run", first, "-p", "rows", tmp_path/"mine"/"rows.txt", "--json", env=warm))["id"]
    run = json.loads(llmops("run", second, "-p", "source", made, "--json", env=warm))["id"]
    archives = [json.loads(llmops("export", o, "--output", tmp_path/f"{o}.tar.gz", "--json")) for o in (run, made)]
    assert archives[0]["runs"] == [run, made] and archives[0]["missing"] == []
    with tarfile.open(archives[0]["file"]) as tar: assert not [o for o in tar.getnames() if "other.bin" in o]  # nobody needs it

    for o in (first, second): o.unlink()
    shutil.rmtree(ledger); shutil.rmtree(tmp_path/"mine")
    monkeypatch.setenv("LLMOPS_RUNS", str(tmp_path/"elsewhere"))
    assert json.loads(llmops("import", archives[0]["file"], "--json")) == {"run": run, "new": [run, made], "already": []}
    assert json.loads(llmops("replay", run, "--json", env=warm))["agrees"] is True
    assert json.loads(llmops("import", archives[1]["file"], "--json"))["already"] == [made]  # and brings what was left out before
    assert json.loads(llmops("replay", made, "--json", env=warm))["agrees"] is True                     # with rows.txt out of the archive

def rewritten(archive, target, change):
    with tarfile.open(archive) as old, tarfile.open(target, "w:gz") as new:
        for o in old: change(new, o, old.extractfile(o).read())
    return target

def put(tar, name, content, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, "/etc/passwd"
    tar.addfile(info, io.BytesIO(content))

def planted(at): # one false thing each
    import hashlib
    def manifest_too(tar, o, content): # the manifest agrees, the sealed record does not
        if o.name == "manifest.json": content = content.replace(hashlib.sha256(b"weights").hexdigest().encode(), hashlib.sha256(b"weighty").hexdigest().encode())
        put(tar, o.name, b"weighty" if o.name.endswith("adapter") else content)
    return {"a byte": lambda tar, o, content: put(tar, o.name, b"weighty" if o.name.endswith("adapter") else content),
            "a byte, and the manifest": manifest_too,
            "a member less": lambda tar, o, content: o.name.endswith("adapter") or put(tar, o.name, content),
            "a member more": lambda tar, o, content: (put(tar, o.name, content), put(tar, o.name + ".more", b"")),
            "a name that leads out": lambda tar, o, content: (put(tar, o.name, content), put(tar, "../../out", b"")),
            "a name that leads out of the run": lambda tar, o, content: (put(tar, o.name, content), put(tar, o.name.split("/")[0] + "/../../out", b"")),
            "an absolute name": lambda tar, o, content: (put(tar, o.name, content), put(tar, "/tmp/out", b"")),
            "a link": lambda tar, o, content: put(tar, o.name, b"" if o.name.endswith("adapter") else content, tarfile.SYMTYPE if o.name.endswith("adapter") else tarfile.REGTYPE),
            "no manifest": lambda tar, o, content: o.name == "manifest.json" or put(tar, o.name, content)}[at]

@pytest.mark.parametrize("at", ["a byte", "a byte, and the manifest", "a member less", "a member more", "a name that leads out", "a name that leads out of the run", "an absolute name", "a link", "no manifest"])
def test_a_false_archive_is_refused_whole(at, ledger, tmp_path, monkeypatch):
    from llmops_kit.runs.archive import export_run
    from llmops_kit.runs.artifacts import sha256_of
    id = add(1)
    (run_folder(id)/"artifacts"/"adapter").write_bytes(b"weights")
    update_record(id, outputs=[{"name": "adapter", "kind": "adapter", "sha256": sha256_of(run_folder(id)/"artifacts"/"adapter"), "path": "artifacts/adapter"}])
    good = export_run(id, tmp_path/"good.tar.gz")["file"]
    monkeypatch.setenv("LLMOPS_RUNS", str(tmp_path/"deep"/"er"/"elsewhere"))
    with pytest.raises(UserError, match="export"): import_run(rewritten(good, tmp_path/"false.tar.gz", planted(at)))
    assert list_runs() == [] and not [o for o in (tmp_path/"deep").rglob("*") if "out" in o.name or "adapter" in o.name]
    assert import_run(rewritten(good, tmp_path/"same.tar.gz", lambda tar, o, content: put(tar, o.name, content)))["new"] == [id]
    half = tmp_path/"half.tar.gz"
    half.write_bytes(Path(good).read_bytes()[:-60])
    with pytest.raises(UserError): import_run(half)
