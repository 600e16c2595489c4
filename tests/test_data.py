"Data: every kind of bad input is refused with its fix, a clean one passes, and splits and digests depend on content alone."
import json, os, shutil, subprocess, sys, sysconfig
from pathlib import Path

import pytest

from llmops_kit.data.assemble import DROPPED
from llmops_kit.data.dataset import Examples
from llmops_kit.data.docstrings import python_functions
from llmops_kit.data.examples import load_examples, origin
from llmops_kit.data.splits import SPLITS, split_of
from llmops_kit.runs.artifacts import sha256_of
from llmops_kit.runs.errors import UserError


def rows(n=60): return [{"prompt": f"How do I reset device {i}?", "completion": f"Hold button {i}."} for i in range(n)]

def jsonl(path, lines):
    path.write_text("".join((l if isinstance(l, str) else json.dumps(l)) + "\n" for l in lines), encoding="utf-8")
    return path

def ids(examples): return {r["id"]: s for s in SPLITS for r in getattr(examples, s)}


# -- clean input

def test_clean_jsonl_csv_and_parquet_are_one_dataset(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    a = jsonl(tmp_path/"a.jsonl", rows())
    b = tmp_path/"b.csv"
    b.write_text("completion,prompt\n" + "".join(f'{r["completion"]},"{r["prompt"]}"\n' for r in rows()))
    pq.write_table(pa.Table.from_pylist(rows()), tmp_path/"c.parquet")
    loaded = [load_examples(str(p)) for p in (a, b, tmp_path/"c.parquet")]
    assert len({e.sha256 for e in loaded}) == 1
    assert sum(loaded[0].counts().values()) == 60 and min(loaded[0].counts().values()) > 0
    assert loaded[0].dropped == {} and loaded[0].warnings == []

def test_messages_rows_and_conversational_prompts(tmp_path):
    plain = load_examples(str(jsonl(tmp_path/"plain.jsonl", rows())))
    as_messages = [{"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]} for r in rows()]
    turns = [{"prompt": [{"role": "user", "content": r["prompt"]}], "completion": [{"role": "assistant", "content": r["completion"]}]} for r in rows()]
    assert load_examples(str(jsonl(tmp_path/"m.jsonl", as_messages))).sha256 == plain.sha256
    assert load_examples(str(jsonl(tmp_path/"t.jsonl", turns))).sha256 == plain.sha256

def test_datasets_folder_keeps_its_splits(tmp_path):
    from datasets import Dataset, DatasetDict
    tables = DatasetDict(train=Dataset.from_list(rows()[:40]), validation=Dataset.from_list(rows()[40:50]), test=Dataset.from_list(rows()[50:]))
    tables.save_to_disk(tmp_path/"disk")
    examples = load_examples(str(tmp_path/"disk"))
    assert examples.counts() == {"train": 40, "validation": 10, "test": 10} and examples.given_splits

def test_folder_of_files_keeps_its_splits(tmp_path):
    for name,part in (("train", rows()[:40]), ("valid", rows()[40:50]), ("test", rows()[50:])): jsonl(tmp_path/f"{name}.jsonl", part)
    assert load_examples(str(tmp_path)).counts() == {"train": 40, "validation": 10, "test": 10}

def test_a_training_row_that_is_also_held_out_is_dropped(tmp_path):
    for name,part in (("train", rows()[:40]), ("valid", rows()[35:50]), ("test", rows()[50:])): jsonl(tmp_path/f"{name}.jsonl", part)
    examples = load_examples(str(tmp_path))
    assert examples.counts() == {"train": 35, "validation": 15, "test": 10} and examples.dropped == {"row: repeated": 5}

def test_byte_order_mark_windows_lines_and_line_separators(tmp_path):
    text = "".join(json.dumps({"prompt": f"Line\u2028{i}", "completion": "a\u0085b"}, ensure_ascii=False) + "\r\n" for i in range(60))
    (tmp_path/"w.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    examples = load_examples(str(tmp_path/"w.jsonl"))
    assert sum(examples.counts().values()) == 60
    examples.save(tmp_path/"saved")
    assert Examples.load(tmp_path/"saved").sha256 == examples.sha256 == sha256_of(tmp_path/"saved")


# -- bad input

def test_missing_file_names_the_nearest(tmp_path):
    jsonl(tmp_path/"support.jsonl", rows())
    with pytest.raises(UserError, match="no file or folder .*suport.jsonl.* Did you mean support.jsonl"): load_examples(str(tmp_path/"suport.jsonl"))
    with pytest.raises(UserError, match=f"Did you mean {tmp_path.name}"): load_examples(str(tmp_path) + "x/support.jsonl")

@pytest.mark.parametrize("name,content", [("e.jsonl", ""), ("blank.jsonl", "\n\n"), ("e.csv", ""), ("header.csv", "prompt,completion\n")])
def test_empty_file(tmp_path, name, content):
    (tmp_path/name).write_text(content)
    with pytest.raises(UserError, match=f"{name} is empty"): load_examples(str(tmp_path/name))

def test_csv_without_the_columns(tmp_path):
    (tmp_path/"faq.csv").write_text("ticket,reply\nWhy?,Because.\n")
    with pytest.raises(UserError, match="has the columns ticket, reply, but `prompt` and `completion`, or `messages`, .*are needed.*columns=\"prompt=ticket,completion=reply\""):
        load_examples(str(tmp_path/"faq.csv"))

def test_malformed_lines_are_refused_and_kept_aside(tmp_path):
    lines = rows() + ['{"prompt": "cut', "[1, 2]", json.dumps({"prompt": "no answer"})]
    path = jsonl(tmp_path/"support.jsonl", lines)
    with pytest.raises(UserError, match=r"3 of 63 rows of support.jsonl are malformed \(4.8%\), more than max_bad=0.01.* line 61: .*Repair them, or raise max_bad"):
        load_examples(str(path), aside=tmp_path/"aside")
    bad = [json.loads(l) for l in (tmp_path/"aside"/DROPPED).read_text().splitlines()]
    assert [(b["file"], b["line"]) for b in bad] == [("support.jsonl", 61), ("support.jsonl", 62), ("support.jsonl", 63)]
    assert bad[0]["text"] == '{"prompt": "cut'

def test_malformed_lines_below_the_share_are_counted(tmp_path):
    path = jsonl(tmp_path/"support.jsonl", rows() + ['{"prompt": "cut'])
    examples = load_examples(str(path), max_bad=0.05, aside=tmp_path/"aside")
    assert sum(examples.counts().values()) == 60 and examples.dropped == {"row: malformed": 1}
    assert "1 malformed row of support.jsonl" in examples.warnings[0]
    assert len((tmp_path/"aside"/DROPPED).read_text().splitlines()) == 1

def test_invalid_utf8(tmp_path):
    good = "".join(json.dumps(r) + "\n" for r in rows()).encode()
    (tmp_path/"l.jsonl").write_bytes(good + b'{"prompt": "Caf\xe9?", "completion": "No."}\n')
    with pytest.raises(UserError, match="line 61: not UTF-8 at byte 16"): load_examples(str(tmp_path/"l.jsonl"))
    (tmp_path/"l.csv").write_bytes(b"prompt,completion\nCaf\xe9?,No.\n")
    with pytest.raises(UserError, match="not UTF-8 .*Save it as UTF-8"): load_examples(str(tmp_path/"l.csv"))

def test_blank_completions_are_counted_not_refused(tmp_path):
    blank = [r | {"completion": c} for r,c in zip(rows(70)[60:], ["", " ", None, "\n"])]
    examples = load_examples(str(jsonl(tmp_path/"b.jsonl", rows() + blank)), aside=tmp_path)
    assert examples.dropped == {"row: blank completion": 4}
    assert len((tmp_path/DROPPED).read_text().splitlines()) == 4

def test_nothing_left_gives_the_counts(tmp_path):
    path = jsonl(tmp_path/"b.jsonl", [r | {"completion": " "} for r in rows(5)])
    with pytest.raises(UserError, match="No example of b.jsonl is left. Left out: row: blank completion 5"): load_examples(str(path))

def test_an_empty_split_is_refused_with_shares_that_work(tmp_path):
    path = jsonl(tmp_path/"few.jsonl", rows(6))
    with pytest.raises(UserError, match="leaves no example for .*set validation=([\\d.]+) and test=") as e: load_examples(str(path))
    share = float(str(e.value).split("validation=")[1].split()[0])
    assert min(load_examples(str(path), validation=share, test=share).counts().values()) > 0

def test_one_group_for_everything(tmp_path):
    path = jsonl(tmp_path/"g.jsonl", [r | {"customer": "acme"} for r in rows()])
    with pytest.raises(UserError, match="in 1 groups"): load_examples(str(path), group="customer")
    with pytest.raises(UserError, match="has no column costumer to group by, only prompt, completion, customer"): load_examples(str(path), group="costumer")

def test_wrong_types_and_roles(tmp_path):
    for row in ({"prompt": 7, "completion": "x"}, {"messages": [{"role": "narrator", "content": "x"}]}, {"messages": "text"},
                {"messages": [{"role": "user", "content": "no answer"}]}):
        with pytest.raises(UserError, match="1 of 1 rows"): load_examples(str(jsonl(tmp_path/"w.jsonl", [row])))

def test_unreadable_files(tmp_path):
    (tmp_path/"x.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="not a readable Parquet file"): load_examples(str(tmp_path/"x.parquet"))
    (tmp_path/"x.json").write_text("[]")
    with pytest.raises(UserError, match="x.json is empty"): load_examples(str(tmp_path/"x.json"))
    (tmp_path/"q.csv").write_text('prompt,completion\n"never closed,x\n')
    with pytest.raises(UserError, match="not valid CSV near line"): load_examples(str(tmp_path/"q.csv"))
    (tmp_path/"empty").mkdir()
    with pytest.raises(UserError, match="holds no .jsonl"): load_examples(str(tmp_path/"empty"))

def test_hub_id_without_network(monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="Hub cannot be reached.*What works without it: `docstrings`"): load_examples("nobody/no-such-set")
    with pytest.raises(UserError, match="Did you mean docstrings"): load_examples("docstring")

def test_damaged_saved_dataset(tmp_path):
    load_examples(str(jsonl(tmp_path/"a.jsonl", rows()))).save(tmp_path/"saved")
    (tmp_path/"saved"/"test.jsonl").unlink()
    with pytest.raises(UserError, match="no complete dataset"): Examples.load(tmp_path/"saved")

def test_run_id_of_no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPS_RUNS", str(tmp_path))
    with pytest.raises(UserError, match="No run 20261120-184503-prepare-7f3a"): load_examples("20261120-184503-prepare-7f3a")


# -- splits and digests

def test_adding_rows_moves_no_old_row(tmp_path):
    before = ids(load_examples(str(jsonl(tmp_path/"a.jsonl", rows(100)))))
    after = ids(load_examples(str(jsonl(tmp_path/"b.jsonl", rows(1100)))))
    assert {i: after[i] for i in before} == before

def test_one_prompt_is_in_one_split(tmp_path):
    path = jsonl(tmp_path/"a.jsonl", [{"prompt": f"Q{i}", "completion": f"A{j}"} for i in range(50) for j in range(3)])
    examples = load_examples(str(path))
    assert sum(examples.counts().values()) == 150
    assert sum(len(set(t["group"])) for t in examples.splits().values()) == 50

def test_shares_that_leave_nothing():
    with pytest.raises(UserError, match="leave nothing to train on"): split_of("a", validation=0.5, test=0.5)

def test_digest_depends_on_content_alone(tmp_path):
    (tmp_path/"one").mkdir(); (tmp_path/"other").mkdir()
    jsonl(tmp_path/"one"/"a.jsonl", rows()[:30]); jsonl(tmp_path/"one"/"b.jsonl", rows()[30:])
    jsonl(tmp_path/"other"/"x.jsonl", rows()[:29:-1]); jsonl(tmp_path/"other"/"y.jsonl", rows()[29::-1])
    one,other = (load_examples(str(tmp_path/f)) for f in ("one", "other"))
    assert one.sha256 == other.sha256 and one.artifact.bytes == other.artifact.bytes
    changed = rows(); changed[17]["completion"] = changed[17]["completion"].replace(".", "!")
    assert load_examples(str(jsonl(tmp_path/"changed.jsonl", changed))).sha256 != one.sha256

def test_ids_used_twice_stay_apart_and_in_order(tmp_path):
    numbered = [r | {"id": i % 30} for i,r in enumerate(rows())]
    a,b = (load_examples(str(jsonl(tmp_path/f"{n}.jsonl", part))) for n,part in (("a", numbered), ("b", numbered[::-1])))
    assert len(ids(a)) == 60 and a.sha256 == b.sha256

def test_limit_is_a_stable_sample(tmp_path):
    path = str(jsonl(tmp_path/"a.jsonl", rows(200)))
    small,large = load_examples(path, limit=20), load_examples(path, limit=50)
    assert set(ids(small)) < set(ids(large)) and sum(small.counts().values()) <= 20
    assert set(ids(load_examples(path, limit=20, seed=1))) != set(ids(small))
    assert small.dropped["over the limit"] == 200 - sum(small.counts().values())


def test_origin_is_what_was_read(tmp_path):
    jsonl(tmp_path/"a.jsonl", rows())
    before = origin(str(tmp_path)).artifact.sha256
    (tmp_path/"notes.txt").write_text("not read")
    assert origin(str(tmp_path)).artifact.sha256 == before
    jsonl(tmp_path/"b.jsonl", rows(61)[60:])
    assert origin(str(tmp_path)).artifact.sha256 != before
    assert origin("docstrings") is None


# -- source code

@pytest.fixture(scope="module")
def code(tmp_path_factory): # two copies of real source at different places
    lib = Path(sysconfig.get_path("stdlib"))
    places = [tmp_path_factory.mktemp(n)/"code" for n in ("here", "there")]
    for p in places:
        for package in ("asyncio", "json", "logging", "importlib", "collections"): shutil.copytree(lib/package, p/package)
    return places

def test_source_tree_digest_does_not_depend_on_its_place(code):
    here,there = (load_examples(str(p)) for p in code)
    assert here.sha256 == there.sha256 and min(here.counts().values()) > 0
    (code[1]/"json"/"extra.py").write_text('def shout(text):\n    "Return the text in capital letters."\n    return text.upper()\n')
    extended = load_examples(str(code[1]))
    before,after = ids(here),ids(extended)
    moved = {i for i in before if after.get(i) not in (before[i], None)}
    assert extended.sha256 != here.sha256 and not moved

def test_no_module_in_two_splits_and_no_copy_across(code):
    examples = load_examples(str(code[0]))
    groups = [set(getattr(examples, s)["group"]) for s in SPLITS]
    assert sum(map(len, groups)) == len(set.union(*groups))
    asked = [m[0]["content"] for s in SPLITS for m in getattr(examples, s)["messages"]]
    assert len(set(asked)) == len(asked)

def test_what_is_no_own_code_is_left_out_and_counted(tmp_path):
    source = 'def shout(text):\n    "Return the text in capital letters."\n    return text.upper()\n'
    for place in ("own.py", "tests/a.py", "test_own.py", "_vendor/b.py", "site-packages/c.py", ".venv/d.py", "env/e.py"):
        (tmp_path/place).parent.mkdir(exist_ok=True)
        (tmp_path/place).write_text(source)
    (tmp_path/"env"/"pyvenv.cfg").touch()
    (tmp_path/"old.py").write_text("print 'hello'")
    (tmp_path/"latin.py").write_bytes(b"# fine so far\n\n\nname = '\xe9'")
    functions,dropped = python_functions(tmp_path)
    assert [f.module for f in functions] == ["own"]
    assert dropped == {"file: tests": 2, "file: vendored": 1, "folder: vendored": 2, "folder: hidden": 1,
                       "file: not valid Python 3": 1, "file: unreadable": 1}

def test_a_docstring_never_stands_in_its_own_prompt(code):
    functions,_ = python_functions(code[0])
    long = [f for f in functions if len(f.summary) > 30]
    assert len(long) > 100 and sum(f.summary in f.source for f in long) == 0

def test_of_two_copies_the_one_in_training_stays(tmp_path):
    source = 'def shout(text):\n    "Return the text in capital letters."\n    return text.upper()\n'
    for name in ("a", "b"): (tmp_path/f"{name}.py").write_text(source)
    for first in ("a", "b"):
        functions,dropped = python_functions(tmp_path, split=lambda m: "train" if m == first else "test")
        assert [f.module for f in functions] == [first] and dropped == {"function: repeated": 1}
