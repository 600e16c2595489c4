"The prepare job on every kind of source and of rows, as a user runs it: the dataset, the card, and the way on from there."
import json, random
from pathlib import Path

import nbformat, pytest
from conftest import llmops, run_command

from llmops_kit.data.dataset import Examples

WORDS = "valve pump boiler meter filter sensor cable switch panel fuse relay motor gauge pipe tank heater".split()

def sentence(draw, n=14): return " ".join(draw.choices(WORDS, k=n)).capitalize() + "."

def made(n=90):
    draw = random.Random(5)
    return [(sentence(draw), sentence(draw, 8), sentence(draw, 8)) for _ in range(n)]

def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path

def conversations_with_tools(folder):
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"part": {"type": "string"}}}}}
    call = lambda a: [{"type": "function", "function": {"name": "look_up", "arguments": json.dumps({"part": a.split()[0]})}}]
    return jsonl(folder/"calls.jsonl", [{"tools": [tool], "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": a}, {"role": "assistant", "tool_calls": call(a)},
                                                                      {"role": "tool", "content": b}, {"role": "assistant", "content": c}]} for a,b,c in made()])

def prompts_in_csv_under_other_names(folder):
    import pandas as pd
    pd.DataFrame([{"ticket": a, "reply": b} for a,b,_ in made()]).to_csv(folder/"tickets.csv", index=False, encoding="utf-16")
    return folder/"tickets.csv"

def prompts_in_parquet(folder):
    import pandas as pd
    pd.DataFrame([{"prompt": a, "completion": b} for a,b,_ in made()]).to_parquet(folder/"p.parquet")
    return folder/"p.parquet"

def preferences_in_json(folder):
    (folder/"liked.json").write_text(json.dumps([{"prompt": a, "chosen": b, "rejected": c} for a,b,c in made()]))
    return folder/"liked.json"

def labels_in_arrow(folder):
    import pyarrow as pa
    rows = [{"text": a, "label": "hot" if "boiler" in a or "heater" in a else "cold"} for a,_,_ in made(200)]
    with pa.ipc.new_file(folder/"labels.arrow", (table := pa.Table.from_pylist(rows)).schema) as out: out.write_table(table)
    return folder/"labels.arrow"

def a_tree_of_markdown(folder):
    for n,(a,b,c) in enumerate(made()):
        (folder/"docs"/f"part{n % 3}").mkdir(parents=True, exist_ok=True)
        (folder/"docs"/f"part{n % 3}"/f"{n}.md").write_text(f"# {a}\n\n{b} {c}\n")
    return folder/"docs"

def a_tree_of_python(folder):
    (folder/"code").mkdir()
    for n,(a,b,_) in enumerate(made(60)):
        (folder/"code"/f"module_{n}.py").write_text(f'def {a.split()[0].lower()}_{n}(value):\n    "Return the {" ".join(a.lower().split()[1:6])} of a value."\n    return value + {n}\n')
    return folder/"code"

def a_datasets_folder(folder):
    from datasets import Dataset
    Dataset.from_list([{"prompt": a, "completion": b} for a,b,_ in made()]).save_to_disk(str(folder/"disk"))
    return folder/"disk"

def an_address(folder): return f"file://{prompts_in_parquet(folder)}"

SOURCES = {conversations_with_tools: ("conversation", {}), prompts_in_csv_under_other_names: ("conversation", {"columns": "prompt=ticket,completion=reply"}),
           prompts_in_parquet: ("conversation", {}), preferences_in_json: ("preference", {}), labels_in_arrow: ("classification", {"stratify": "label"}),
           a_tree_of_markdown: ("text", {}), a_tree_of_python: ("conversation", {}), a_datasets_folder: ("conversation", {}), an_address: ("conversation", {})}

SHORT = conversations_with_tools, labels_in_arrow, a_tree_of_markdown

@pytest.mark.parametrize("source", [o if o in SHORT else pytest.param(o, marks=pytest.mark.slow) for o in SOURCES], ids=lambda f: f.__name__)
def test_every_kind_of_source(source, tmp_path, warm):
    schema,options = SOURCES[source]
    env = warm | {"LLMOPS_RUNS": str(tmp_path/"runs")}
    (tmp_path/"data").mkdir()
    record = json.loads(llmops("run", "prepare", "-p", "data", source(tmp_path/"data"), "-p", "wandb", "off", "-p", "license", "CC0-1.0",
                               *[o for k,v in options.items() for o in ("-p", k, v)], "--json", env=env))
    assert record["status"] == "finished" and record["certificates"]["separation"]["passed"], record
    examples = Examples.load(tmp_path/"runs"/record["id"]/"artifacts"/"dataset")
    assert examples.facts["schema"] == schema and sum(examples.counts().values()) >= 50
    card = (tmp_path/"runs"/record["id"]/"artifacts"/"card.md").read_text()
    assert examples.sha256 in card and "CC0-1.0" in card and f"| kind of rows | {schema} |" in card
    notebook = nbformat.read(tmp_path/"runs"/record["id"]/"notebook.ipynb", 4)
    assert sum("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", ())) >= 3  # flow, lengths, splits

def test_versions_go_back_and_are_compared_and_evaluation_sets_are_found(tmp_path, warm):
    env = warm | {"LLMOPS_RUNS": str(tmp_path/"runs")}
    prepare = lambda *more: json.loads(llmops("run", "prepare", "-p", "wandb", "off", *more, "--json", env=env))
    digest = lambda record: next(o["sha256"] for o in record["outputs"] if o["kind"] == "dataset")
    rows = [{"prompt": a, "completion": b} for a,b,_ in made(150)]
    first = prepare("-p", "data", jsonl(tmp_path/"v1.jsonl", rows))
    second = prepare("-p", "data", jsonl(tmp_path/"v2.jsonl", rows[4:] + [{"prompt": c, "completion": a} for a,_,c in made(7)]))
    told = llmops("diff", first["id"], second["id"], env=env)
    assert "rows         added: - | 7" in told and "rows         removed: - | 4" in told
    back = prepare("-p", "data", f"sha256:{digest(first)[:16]}")
    assert digest(back) == digest(first) != digest(second)
    again = json.loads(llmops("replay", back["id"], "--json", env=env))
    assert again["differences"] == []

    # test questions of the first dataset, as training rows of another one, with other capitals and line breaks
    held = Examples.load(tmp_path/"runs"/first["id"]/"artifacts"/"dataset").test
    draw = random.Random(11)
    other = [{"prompt": sentence(draw), "completion": sentence(draw)} for _ in range(150)]
    leaks = [{"prompt": r["messages"][0]["content"].upper().replace(" ", "\n"), "completion": r["messages"][1]["content"]} for r in held]
    for name,part in (("train", other[:120] + leaks), ("validation", other[120:135]), ("test", other[135:])):
        (tmp_path/"mixed").mkdir(exist_ok=True)
        jsonl(tmp_path/"mixed"/f"{name}.jsonl", part)
    reported = prepare("-p", "data", tmp_path/"mixed")
    assert reported["metrics"]["overlaps"] == len(leaks) and reported["metrics"]["train/examples"] == 120 + len(leaks)
    dropped = prepare("-p", "data", tmp_path/"mixed", "-p", "contaminated", "drop")
    assert dropped["metrics"]["train/examples"] == 120
    listed = [json.loads(l) for l in (tmp_path/"runs"/dropped["id"]/"artifacts"/"dropped.jsonl").read_text().splitlines()]
    assert sorted(d["line"] for d in listed if d["step"] == "contamination") == list(range(121, 121 + len(leaks)))

def test_made_examples_stay_in_training(tmp_path, warm):
    env = warm | {"LLMOPS_RUNS": str(tmp_path/"runs")}
    data = jsonl(tmp_path/"rows.jsonl", [{"prompt": a, "completion": b} for a,b,_ in made()])
    record = json.loads(llmops("run", "prepare", "-p", "data", data, "-p", "augment", "paraphrase", "-p", "augment_examples", "25", "-p", "privacy", "redact",
                               "-p", "wandb", "off", "--json", env=env))
    assert record["certificates"]["made_examples"]["passed"] and record["certificates"]["separation"]["passed"]
    examples = Examples.load(tmp_path/"runs"/record["id"]/"artifacts"/"dataset")
    assert {s: sum("made_from" in r for r in t) for s,t in examples.splits().items()} == {"train": 25, "validation": 0, "test": 0}
    ids = {r["id"] for r in examples.train}
    assert all(r["made_from"]["id"] in ids for r in examples.train if "made_from" in r)
    assert [s["reasons"] for s in examples.flow if s["step"] == "augment"] == [{"made": 25}]

def test_evaluate_says_what_it_has_seen_and_scores_the_rest_alone(tmp_path, warm):
    env = warm | {"LLMOPS_RUNS": str(tmp_path/"runs")}
    run = lambda *words: json.loads(llmops("run", *words, "-p", "wandb", "off", "--json", env=env))
    rows = [{"id": str(n), "prompt": a, "completion": b} for n,(a,b,_) in enumerate(made(120))]
    leaks = [dict(r, id=f"leak {r['id']}", prompt=r["prompt"].upper()) for r in rows[110:114]]
    (tmp_path/"mixed").mkdir()
    for name,part in (("train", rows[:100] + leaks), ("validation", rows[100:110]), ("test", rows[110:])): jsonl(tmp_path/"mixed"/f"{name}.jsonl", part)
    prepared = run("prepare", "-p", "data", tmp_path/"mixed", "-p", "similar", "0")  # near-duplicates would be left out
    assert not prepared["certificates"]["separation"]["passed"] and prepared["certificates"]["separation"]["value"] == 4
    run("finetune", "-p", "data", "latest:prepare", "-p", "max_steps", "4", "-p", "eval_every", "2", "-p", "max_new_tokens", "6", "-p", "certify", "off")
    evaluated = run("evaluate", "-p", "max_new_tokens", "6", "-p", "resamples", "100")
    metrics = evaluated["metrics"]
    assert metrics["overlaps"] == 4 and metrics["test/examples"] == 10 and metrics["clean/test/examples"] == 6
    assert metrics["clean/test/perplexity"] > 1 and metrics["clean/difference/perplexity/low"] <= metrics["clean/difference/perplexity"]
    assert "4 of 10 examples overlap with training rows." in evaluated["warnings"]
