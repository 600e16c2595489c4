"Preparing a dataset: every row that is left out can be found, nothing depends on how the work was cut, and an interrupted preparation goes on."
import json, os, random, signal, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

from llmops_kit.data import parts as parts_module
from llmops_kit.data.assemble import DROPPED
from llmops_kit.data.examples import load_examples, make_steps
from llmops_kit.data.lines import Item
from llmops_kit.data.parts import make_parts
from llmops_kit.data.separation import check_separation
from llmops_kit.data.sources import shards_of
from llmops_kit.runs.errors import UserError
from llmops_kit.runs.ledger import run_folder
from llmops_kit.runs.store import diff_rows, find_content, keep_content

WORDS = [a + b for a in ("ba", "co", "di", "fu", "ge", "ha", "ju", "ko", "li", "mo") for b in ("la", "mer", "nin", "tor", "sa", "vel", "ran", "kus")]

def sentence(draw, n=30): return " ".join(draw.choices(WORDS, k=n))

def tickets(n, seed=0):
    draw = random.Random(seed)
    return [{"id": f"{seed}-{i:05}", "prompt": sentence(draw), "completion": sentence(draw, 12)} for i in range(n)]

def jsonl(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path

def listed(folder): return [json.loads(l) for l in (folder/DROPPED).read_text().splitlines()]


def test_every_row_left_out_can_be_found_with_its_step_and_reason(tmp_path):
    rows = tickets(200)
    planted = [(201, "read", "malformed", '{"prompt": "cut'),
               (202, "form", "blank completion", {"prompt": "What now?", "completion": " "}),
               (203, "length", "too short", {"prompt": "Short?", "completion": "No"}),
               (204, "quality", None, {"prompt": "What is this?", "completion": "lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore"}),
               (205, "private data", "email", {"prompt": "Who answers?", "completion": "Write to jane.roe@acme-mail.com for all of that."}),
               (206, "repeated", "repeated", dict(rows[7], id="copy")),
               (207, "near-duplicates", "near-duplicate", {"id": "wrapped", "prompt": rows[8]["prompt"].upper().replace(" ", "\n"), "completion": rows[8]["completion"]})]
    path = jsonl(tmp_path/"t.jsonl", rows + [p[3] for p in planted])
    examples = load_examples(str(path), clean=["unicode", "controls", "quality"], shortest=3, privacy="refuse", max_bad=0.05, aside=tmp_path/"aside")
    found = {(d["line"], d["step"]): d for d in listed(tmp_path/"aside")}
    for line,step,reason,_ in planted[:5]: assert reason in (found[line, step]["reason"], None), line
    # of two alike one stays, whichever: both lines are known
    for step,line,own in (("repeated", 206, 8), ("near-duplicates", 207, 9)):
        gone = next(d for d in found.values() if d["step"] == step)
        assert gone["line"] in (line, own) and gone["like"] in (rows[own - 1]["id"], "copy", "wrapped")
    assert len(found) == 7 and sum(examples.counts().values()) == 200
    assert sum(s["dropped"] for s in examples.flow) == 7 and examples.facts["read"] == 207
    assert "jane.roe" not in (tmp_path/"aside"/DROPPED).read_text()  # the list of what was refused holds no personal data

def test_clean_rows_pass_every_step_unchanged(tmp_path):
    examples = load_examples(str(jsonl(tmp_path/"t.jsonl", tickets(300))), clean=["unicode", "controls", "boilerplate", "quality", "toxicity"], privacy="refuse", shortest=3)
    assert sum(examples.counts().values()) == 300 and not any(s["dropped"] or s["changed"] for s in examples.flow)

def test_the_dataset_does_not_depend_on_how_the_work_is_cut(tmp_path, monkeypatch):
    path = jsonl(tmp_path/"t.jsonl", tickets(400) + tickets(100))
    whole = load_examples(str(path))
    for size,processes in ((7_000, 1), (30_000, 2)):
        monkeypatch.setattr("llmops_kit.data.examples.shards_of", lambda p, size=size: shards_of(p, size))
        cut = load_examples(str(path), processes=processes, work=tmp_path/f"work-{size}")
        assert cut.sha256 == whole.sha256 and cut.flow == whole.flow and cut.dropped == whole.dropped

def test_an_interrupted_preparation_goes_on(tmp_path):
    path = jsonl(tmp_path/"t.jsonl", tickets(2000))
    script = f"""
import os, signal
from llmops_kit.data import examples, parts
from llmops_kit.data.sources import shards_of
examples.shards_of = lambda p: shards_of(p, 50_000)
made, make = [], parts.make_part
def killed_at_the_fourth(*a, **k):
    if len(made) == 3: os.kill(os.getpid(), signal.SIGKILL)
    made.append(make(*a, **k))
parts.make_part = killed_at_the_fourth
examples.load_examples({str(path)!r}, work={str(tmp_path/'work')!r}, processes=1)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert len(list((tmp_path/"work").rglob("*.names.json"))) == 3
    made,make = [],parts_module.make_part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmops_kit.data.examples.shards_of", lambda p: shards_of(p, 50_000))
        patch.setattr(parts_module, "make_part", lambda *a, **k: made.append(a[2]) or make(*a, **k))
        again = load_examples(str(path), work=tmp_path/"work", processes=1)
    shards = len(shards_of(path, 50_000))
    assert len(made) == shards - 3 and again.sha256 == load_examples(str(path)).sha256

def test_other_parameters_or_other_content_use_no_old_part(tmp_path):
    path = jsonl(tmp_path/"t.jsonl", tickets(100))
    first = load_examples(str(path), work=tmp_path/"work")
    assert load_examples(str(path), work=tmp_path/"work", shortest=sorted(len(r["completion"]) for r in tickets(100))[50]).sha256 != first.sha256
    jsonl(path, tickets(100, seed=1))
    assert load_examples(str(path), work=tmp_path/"work").sha256 != first.sha256


# -- splits

def test_a_thousand_rows_more_move_none(tmp_path):
    place = lambda e: {r["id"]: s for s,t in e.splits().items() for r in t}
    before = place(load_examples(str(jsonl(tmp_path/"a.jsonl", tickets(500)))))
    after = place(load_examples(str(jsonl(tmp_path/"b.jsonl", tickets(500) + tickets(1000, seed=1)))))
    assert {i: after[i] for i in before} == before and len(after) == 1500

def test_stratified_splits_share_out_every_label_and_stay(tmp_path):
    draw = random.Random(3)
    rows = [{"id": str(i), "text": sentence(draw), "label": "rare" if i % 12 == 0 else "common"} for i in range(600)]
    examples = load_examples(str(jsonl(tmp_path/"l.jsonl", rows)), stratify="label")
    shares = {s: c["rare"] / sum(c.values()) for s,c in examples.facts["labels"].items()}
    assert all(abs(v - 1/12) < 0.05 for v in shares.values()), shares
    place = lambda e: {r["id"]: s for s,t in e.splits().items() for r in t}
    more = load_examples(str(jsonl(tmp_path/"m.jsonl", rows + [dict(r, id=f"n{r['id']}", text=sentence(draw)) for r in rows])), stratify="label", salt=examples.facts["salt"])
    assert {i: place(more)[i] for i in place(examples)} == place(examples)
    with pytest.raises(UserError, match="too many for shares"): load_examples(str(tmp_path/"l.jsonl"), stratify="id")

def test_one_class_only_is_said(tmp_path):
    draw = random.Random(3)
    path = jsonl(tmp_path/"one.jsonl", [{"text": sentence(draw), "label": "spam"} for _ in range(100)])
    with pytest.raises(UserError, match="only the label spam"): load_examples(str(path))

def test_leaks_across_given_splits_are_dropped_and_a_planted_one_fails_the_check(tmp_path):
    rows = tickets(120)
    leak = dict(rows[3], id="leak", prompt=rows[3]["prompt"].title().replace(" ", "  "))
    for name,part in (("train", rows[:100]), ("validation", rows[100:110]), ("test", rows[110:] + [leak])): jsonl(tmp_path/f"{name}.jsonl", part)
    examples = load_examples(str(tmp_path))
    assert examples.dropped == {"row: near-duplicate": 1} and examples.counts() == {"train": 99, "validation": 10, "test": 11}
    assert check_separation(examples).passed
    leaky = load_examples(str(tmp_path), similar=0)
    found = check_separation(leaky)
    assert not found.passed and [p[:4] for p in found.pairs] == [("test", "leak", "train", rows[3]["id"])]

def test_redaction_makes_equal_prompts_one_group(tmp_path):
    rows = tickets(60) + [{"prompt": f"Please send the invoice of May to customer{i}@example.org again.", "completion": sentence(random.Random(i))} for i in range(20)]
    examples = load_examples(str(jsonl(tmp_path/"t.jsonl", rows)), privacy="redact", similar=0)
    asked = {r["group"]: s for s,t in examples.splits().items() for r in t if "invoice" in r["messages"][0]["content"]}
    assert len(asked) == 1 and examples.facts["private"]["email"] == 20
    assert not any("example.org" in str(r) for t in examples.splits().values() for r in t)

def test_neither_the_list_nor_the_cases_shown_hold_what_was_redacted(tmp_path):
    bad = ['{"prompt": "Who is mary.poe@acme-mail.com', json.dumps({"prompt": "Write\u200b to mary.poe@acme-mail.com today", "completion": "Done."}), json.dumps({"prompt": "mary.poe@acme-mail.com?", "completion": " "})]
    path = jsonl(tmp_path/"t.jsonl", tickets(200) + bad)
    for privacy,found in (("redact", False), ("report", True)):
        examples = load_examples(str(path), privacy=privacy, max_bad=0.05, aside=tmp_path/privacy)
        seen = (tmp_path/privacy/DROPPED).read_text() + json.dumps(examples.flow)
        assert ("mary.poe" in seen) == found and ("controls" in [s["step"] for s in examples.flow if s["changed"]])

def test_a_hundred_thousand_identical_rows(tmp_path):
    path = tmp_path/"same.jsonl"
    path.write_text('{"prompt": "Is it on?", "completion": "It is."}\n' * 100_000)
    with pytest.raises(UserError, match=r"leaves no example for .*row: repeated 99999"): load_examples(str(path))


# -- versions

def test_older_versions_come_back_by_digest(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPS_RUNS", str(tmp_path/"runs"))
    path = jsonl(tmp_path/"t.jsonl", tickets(200))
    first = load_examples(str(path))
    place = keep_content(first)
    changed = tickets(200)[5:] + tickets(3, seed=9)
    changed[0]["completion"] += " more"
    jsonl(path, changed)
    second = load_examples(str(path))
    assert second.sha256 != first.sha256
    back = load_examples(f"sha256:{first.sha256[:16]}")
    assert back.sha256 == first.sha256
    for s,t in back.splits().items(): assert list(t.lines()) == list(getattr(first, s).lines())  # byte for byte
    found = diff_rows(place, keep_content(second))
    assert {k: found[k]["count"] for k in ("added", "removed", "changed")} == {"added": 3, "removed": 5, "changed": 1}
    with pytest.raises(UserError, match="No run made a dataset sha256:00000000"): load_examples("sha256:00000000")
    (place/"train.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="has changed since it was saved"): find_content(f"sha256:{first.sha256}", "dataset")
