"Contamination: planted leaks are found in every form, clean texts of the same templates are not, and the ledger's sets are searched once each."
import pickle, random, re

import pytest

from llmops_kit.data.contamination import (THRESHOLD, Index, clean_ids, evaluation_sets, items_of, overlap_table, search_rows, training_sets)
from llmops_kit.data.duplicates import BLOCK
from llmops_kit.runs.artifacts import canonical_json, write_atomic
from llmops_kit.runs.ledger import create_record, run_folder
from llmops_kit.runs.store import store_dir

from planted_duplicates import WORDS, clean, exam, leaks, open_items, prose

@pytest.fixture(scope="module")
def items(): return exam(21) + open_items(22)

@pytest.fixture(scope="module")
def index(items): return Index(items)

def ids(index, text): return {o.id for o in index.search([text])}
def item(id, text, set="quiz"): return {"set": set, "id": id, "text": text}


# -- recall and precision

def test_every_form_of_a_leak_is_found(items, index):
    planted = leaks(items, 23)
    found = {}
    for leak in planted: found.setdefault(leak.kind, []).append(leak.id in ids(index, leak.text))
    recall = {kind: sum(f)/len(f) for kind,f in found.items()}
    half = recall.pop("half of it, inside a document")
    assert len(recall) == 12 and min(recall.values()) >= 0.97, recall
    assert half >= 0.6
    open_half = [l.id in ids(index, l.text) for l in planted + leaks(items, 24) if l.kind.startswith("half") and l.id.startswith("open")]
    assert sum(open_half)/len(open_half) >= 0.92 # the other halves missed hold little but options

def test_a_leak_names_its_own_item_only(items, index):
    whole = [l for l in leaks(items, 25, each=20) if not l.kind.startswith("half")]
    assert all(ids(index, l.text) == {l.id} for l in whole)

def test_clean_texts_are_not_reported(items, index):
    wrong = {}
    for text in clean(items, 26): wrong.setdefault(text.kind, []).append(bool(index.search([text.text])))
    same_options = wrong.pop("another question, same options")
    assert not any(any(w) for w in wrong.values()) and sum(map(len, wrong.values())) == 800
    assert sum(same_options)/len(same_options) <= 0.12

def test_a_plain_search_misses_what_was_wrapped_again(items, index):
    grams = lambda text: set(zip(*(text.split(" ")[k:] for k in range(13))))
    by_id = {i["id"]: i["text"] for i in items}
    wrapped = [l for l in leaks(items, 27) if l.kind in ("re-wrapped", "re-cased")]
    assert not any(grams(l.text) & grams(by_id[l.id]) for l in wrapped)
    assert all(l.id in ids(index, l.text) for l in wrapped)

def test_the_standard_library_has_few_functions_twice():
    from llmops_kit.data.docstrings import conversation, python_functions
    from llmops_kit.data.splits import split_of
    texts = {"train": [], "test": []}
    for f in python_functions()[0]:
        if (s := split_of(f.module)) in texts: texts[s].append("\n".join(m["content"] for m in conversation(f)))
    found = Index(item(str(n), t) for n,t in enumerate(texts["test"])).search(texts["train"])
    assert len(texts["train"]) > 2000 and len({o.row for o in found}) <= 0.003*len(texts["train"])


# -- what must not count

def test_what_many_items_of_a_set_share_does_not_count():
    names,things = WORDS[100:180], [" ".join(WORDS[k:k + 2]) for k in range(200, 360, 2)]
    stories = ["{a} goes to the market in the morning with {n} pieces of {b} and comes home in the evening with {m} of them. How many did {a} sell on that day?",
               "The train from {a} to {b} leaves {n} minutes after noon and needs {m} minutes for its way. At what time does it arrive there, if nothing stops it?"]
    def made(seed, n):
        r = random.Random(seed)
        return [r.choice(stories).format(a=r.choice(names), b=r.choice(things), n=r.randrange(100, 999), m=r.randrange(100, 999)) for _ in range(n)]
    held_out,other = made(2, 100), made(3, 300)
    index = Index(item(str(n), t) for n,t in enumerate(held_out))
    assert len({o.row for o in index.search(other)}) <= 3 # names and numbers are all that is their own, and some are the same
    assert {(o.row, o.id) for o in index.search(held_out)} >= {(n, str(n)) for n in range(100)}

def test_a_set_with_its_own_template_keeps_it_beside_larger_sets(items):
    small = [item(str(n), f"Read the passage and give the one word that the author would least like to hear. {t}", "small")
             for n,t in enumerate(["Rain again.", "A letter came.", "No bread was left.", "The dog slept."])]
    index = Index(items + small)
    assert not index.search(["Read the passage and give the one word that the author would least like to hear. The house was sold to strangers in March."])
    assert ids(index, small[2]["text"]) == {"2"}

def test_short_items_need_the_whole_text():
    index = Index([item("a", "2+2 4"), item("b", "Paris"), item("c", "What is the capital of France? Paris"), item("d", "!!!")])
    assert not index.search(["2+2 is what one learns first, and 4 is the answer", "Choose a city:\nA) Paris\nB) Rome", "Paris is a city on the Seine", "What is the capital of Peru? Lima", "!!!", ""])
    assert ids(index, "paris!") == {"b"} and ids(index, "2 + 2 = 4") == {"a"}
    assert ids(index, "He asked: what is the capital of France?\nParis, she said.") == {"c"}
    assert index.unsearchable == [("quiz", "d")]

def test_equal_items_of_two_sets_are_both_reported(items):
    twice = Index(items + [i | {"set": "copy"} for i in items])
    assert {(o.set, o.id) for o in twice.search([items[5]["text"]])} == {("exam", "exam-5"), ("copy", "exam-5")}


# -- the same result however it is run

def test_neither_chunks_nor_pickling_change_the_result(items, index):
    texts = [l.text for l in leaks(items, 28, each=10)] + ["", "half \ud800 a pair", prose(random.Random(1), 30_000)]
    whole = index.search(texts)
    sent = pickle.loads(pickle.dumps(index))
    assert sent.sha256 == index.sha256 == Index(items).sha256 != Index(items[1:]).sha256 and len(whole) > 100
    assert [o._replace(row=o.row + n) for n,t in enumerate(texts) for o in sent.search([t])] == whole
    rows = [{"id": str(n), "text": t} for n,t in enumerate(texts*6)]
    assert search_rows(index, rows) == [o._replace(row=o.row + k*len(texts)) for k in range(6) for o in whole]

def test_a_leak_in_a_very_long_text_is_found_wherever_it_stands(items, index):
    filler = prose(random.Random(2), 3*BLOCK//5).replace("\n", " ")
    for place in range(BLOCK - 400, BLOCK + 1, 50):
        assert ids(index, f"{filler[:place]} {items[3]['text']} {filler[place:]}") == {"exam-3"}

def test_nothing_to_look_for_or_in(index):
    assert index.search([]) == [] and Index([]).search(["a text"]) == [] and not Index([]) and Index([]).unsearchable == []


# -- the page

def test_the_table_marks_what_is_shared_and_escapes_the_rest(items, index):
    text = f"<script>alert(1)</script> {prose(random.Random(3), 300)} {items[0]['text'].upper()} {prose(random.Random(4), 300)}"
    table = overlap_table(index.search([text]), [text], {(i["set"], i["id"]): i["text"] for i in items})
    left,right = re.findall(r"width:50%'>(.*?)</td>", table, re.S)
    plain = lambda cell: re.sub(r"\s+", " ", re.sub("</?mark>", "", cell)).lower()
    assert "<script>" not in table and items[0]["question"][:40].lower() in plain(right)
    assert "".join(re.findall("<mark>(.*?)</mark>", right, re.S)).lower().startswith(items[0]["text"][:30].lower())
    assert len(right) < 2500 and overlap_table([], [], {}) == ""

def test_clean_ids_keeps_the_order(items, index):
    overlaps = index.search([items[2]["text"], items[0]["text"]])
    assert clean_ids([i["id"] for i in items[:4]], overlaps) == ["exam-1", "exam-3"]


# -- the ledger

@pytest.fixture
def ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPS_RUNS", str(tmp_path))
    def rows(seed, n): return [{"id": i["id"], "group": i["id"], "messages": [{"role": "user", "content": i["text"]}, {"role": "assistant", "content": "A"}]} for i in exam(seed, n, f"s{seed}")]
    def write(folder, train, validation, test):
        for s,part in (("train", train), ("validation", validation), ("test", test)): write_atomic(folder/f"{s}.jsonl", "".join(canonical_json(r) + "\n" for r in part))
    count = iter(range(100, 200))
    def record(job, inputs=(), outputs=()):
        id = f"20261120-100{next(count)}-{job}-7f3a"
        create_record({"id": id, "job": job, "status": "finished", "parameters": {}, "inputs": list(inputs), "outputs": list(outputs)})
        return id
    return rows, write, record

def dataset(n, **more): return {"name": "data", "kind": "dataset", "sha256": str(n)*64, "path": "artifacts/dataset"} | more

def test_the_ledger_gives_each_held_out_split_once_and_no_training_split(ledger):
    rows,write,record = ledger
    a = record("prepare", outputs=[dataset(1)])
    write(run_folder(a)/"artifacts/dataset", rows(1, 9), rows(2, 5), rows(3, 5))
    b = record("prepare", outputs=[dataset(2)])         # a newer version: more training rows, the same test split, no validation split
    write(run_folder(b)/"artifacts/dataset", rows(1, 12), [], rows(3, 5))
    write(store_dir()/("3"*64), rows(4, 9), rows(5, 5), rows(6, 5))
    record("evaluate", [dataset(1, run=a), dataset(3, source="docstrings")])
    record("evaluate", [dataset(9, source="/gone/faq.jsonl")])
    sets = evaluation_sets()
    known = [s for s in sets if s.path]
    assert sorted((s.split, next(s.rows())["id"]) for s in known) == [("test", "s3-0"), ("test", "s6-0"), ("validation", "s2-0"), ("validation", "s5-0")]
    assert [s.name for s in sets if not s.path] == ["faq.jsonl/test@99999999", "faq.jsonl/validation@99999999"]

    leaked = rows(3, 5)[4] # a test row of the older version in new training rows
    index = Index(i for s in known for i in items_of(s.rows(), s.name))
    assert search_rows(index, rows(1, 12)) == []
    assert [(o.row, o.id, o.share) for o in search_rows(index, rows(1, 12) + [leaked | {"id": "new"}])] == [(12, "s3-4", 1.0)]

def test_training_sets_follow_what_the_model_began_with(ledger):
    rows,write,record = ledger
    a,b,c = (record("prepare", outputs=[dataset(n)]) for n in (1, 2, 3))
    for n,run in enumerate((a, b, c)): write(run_folder(run)/"artifacts/dataset", rows(10*n, 6), rows(10*n + 1, 2), rows(10*n + 2, 2))
    base = record("pretrain", [dataset(1, run=a)], [{"name": "model", "kind": "model", "sha256": "a"*64, "path": "artifacts/model"}])
    tuned = record("finetune", [{"name": "model", "kind": "model", "sha256": "a"*64, "run": base}, dataset(2, run=b)], [{"name": "adapter", "kind": "adapter", "sha256": "b"*64, "path": "artifacts/adapter"}])
    record("finetune", [dataset(3, run=c)], [{"name": "adapter", "kind": "adapter", "sha256": "c"*64, "path": "artifacts/adapter"}])
    record("evaluate", [dataset(3, run=c)])
    first = lambda sets: sorted(next(s.rows())["id"] for s in sets)
    assert first(training_sets(tuned)) == ["s0-0", "s10-0"] and first(training_sets(base)) == ["s0-0"] and first(training_sets()) == ["s0-0", "s10-0", "s20-0"]
