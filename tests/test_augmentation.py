"Made examples: what each method gives, what its filter takes out, and that none is ever held out."
import shutil
from collections import Counter
import pytest, torch
from llmops_kit.data.rows import schema_of
from llmops_kit.evaluation import augmentation
from llmops_kit.evaluation.augmentation import (NewExamples, augment, back_translate, back_translation_problem, check_made, paraphrase_by_templates, parse_example,
                                               question_of, synthesise, translator, with_question)
from llmops_kit.models.load import bundled_folder, load_model
from llmops_kit.runs.errors import UserError

THINGS = ["parcel", "router", "invoice", "password", "printer", "account", "keyboard", "contract", "battery", "screen"]

def row(n, **more):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is wrong with the {THINGS[n % 10]} of customer {n}?"}, {"role": "assistant", "content": f"Answer {n}."}]
    return {"id": f"r{n:03}", "group": f"g{n // 2}", "messages": messages, **more}

ROWS = [row(n) for n in range(40)]
SPLITS = {"train": ROWS[:30], "validation": ROWS[30:34], "test": ROWS[34:]}


def test_every_made_example_says_what_it_is_made_from():
    by_id = {r["id"]: r for r in ROWS}
    made = paraphrase_by_templates(SPLITS["train"], seed=3, n=50)[0] + back_translate(SPLITS["train"], list, lambda ts: [t.replace("wrong with", "broken about") for t in ts], seed=3)[0]
    assert len(made) == 80 and len({r["id"] for r in made} | set(by_id)) == 120
    for r in made:
        source = by_id[r["made_from"]["id"]]
        assert r["made_from"].keys() == {"method", "id", "seed"} and r["made_from"]["seed"] == 3
        assert r["group"] == source["group"] and [r["messages"][i] for i in (0, 2)] == [source["messages"][i] for i in (0, 2)] and question_of(r) != question_of(source)

def test_made_examples_depend_on_rows_and_seed_not_on_order():
    rows = SPLITS["train"]
    for seed in (0, 1): assert paraphrase_by_templates(rows[::-1], seed=seed, n=12) == paraphrase_by_templates(rows, seed=seed, n=12)
    assert paraphrase_by_templates(rows, seed=0, n=12)[0] != paraphrase_by_templates(rows, seed=1, n=12)[0]
    assert paraphrase_by_templates(rows, seed=0, n=20)[0][:12] == paraphrase_by_templates(rows, seed=0, n=12)[0]

def test_all_templates_are_used_and_braces_in_questions_are_text():
    made,counts = paraphrase_by_templates(ROWS, ["A: {prompt}", "{x} {prompt}"], n=1000)
    assert counts == {"made": 80} and len({question_of(r) for r in made}) == 80
    curly = [row(1) | {"messages": [{"role": "user", "content": "What is {prompt} in f'{x}'?"}, {"role": "assistant", "content": "A slot."}]}]
    assert question_of(paraphrase_by_templates(curly, ["Say: {prompt}"])[0][0]) == "Say: What is {prompt} in f'{x}'?"
    for bad in (["no slot"], ["{prompt} {prompt}"], ["{prompt}"], []):
        with pytest.raises(UserError, match="Write some text|no template"): paraphrase_by_templates(ROWS, bad)

def test_each_schema_keeps_its_form_and_plain_text_is_left_out():
    preference,label = row(1, rejected=[{"role": "assistant", "content": "No."}]), {"id": "c", "group": "c", "label": "spam", "messages": [{"role": "user", "content": "Buy!"}, {"role": "assistant", "content": "spam"}]}
    made,_ = paraphrase_by_templates([preference, label, {"id": "t", "group": "t", "text": "A text."}], ["Hi. {prompt}"])
    assert {r["made_from"]["id"]: schema_of(r) for r in made} == {"r001": "preference", "c": "classification"}
    assert paraphrase_by_templates(made)[0] == [] # no copies of copies
    several = row(2); several["messages"] += [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Now it works."}]
    assert [m["content"] for m in with_question(several, "NEW", "x", 0)["messages"]][-2:] == ["NEW", "Now it works."]


# -- back-translation

@pytest.mark.parametrize("before,after,problem", [
    ("Where is my parcel?", "Where has my parcel gone?", ""), ("Where is my parcel?", "", "empty"), ("Where is my parcel?", "where IS my parcel", "near-identical"),
    ("Order 4711 is late", "Order 4712 is delayed", "numbers or links changed"), ("See https://a.org/b now", "Look at it now", "numbers or links changed"), ("Where is my parcel?", "banana banana", "unrelated")])
def test_what_comes_back_is_filtered(before, after, problem): assert back_translation_problem(before, after) == problem

@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory):
    from transformers import AutoTokenizer, MarianConfig, MarianMTModel, T5Config, T5ForConditionalGeneration
    folders = {name: tmp_path_factory.mktemp(name) for name in ("t5", "marian")}
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder()); tokenizer.pad_token = tokenizer.eos_token
    ends = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **ends)).save_pretrained(folders["t5"])
    MarianMTModel(MarianConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
                               max_position_embeddings=64, forced_eos_token_id=tokenizer.eos_token_id, **ends)).save_pretrained(folders["marian"])
    for f in folders.values(): tokenizer.save_pretrained(f)
    return folders

@pytest.mark.parametrize("family", ["t5", "marian"])
def test_a_model_translates_line_by_line(seq2seq, family):
    translate = translator(str(seq2seq[family]), max_new_tokens=6, lines_per_batch=2)
    texts = ["Where is my parcel?\n\nIt is late.", "It is late.", "", "\n", "One more line."]
    found = translate(texts)
    assert translate(texts) == found and len(found) == 5 and found[2:4] == ["", "\n"]
    assert found[0].count("\n") >= 2 and found[0].endswith(found[1])
    if family == "marian": assert translate(["It is late. "*60 + "\nIt is late."]) == [""] # too long for its context

def test_a_random_model_makes_no_examples(seq2seq):
    noise = translator(str(seq2seq["t5"]), max_new_tokens=6)
    made,counts = back_translate(SPLITS["train"], noise, noise, n=10)
    assert made == [] and counts.total() == 10

def test_what_is_no_translation_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="do not load as a translation model"): translator("tiny")
    with pytest.raises(UserError, match="no model"): translator(str(tmp_path/"none"))


# -- synthesis

def test_a_models_text_is_parsed():
    assert parse_example("Question: Why?\nAnswer: Because.\nSo it is.\n\nQuestion: And?\nAnswer: No.") == ("Why?", "Because.\nSo it is.")
    assert parse_example(" Why?\n\nAnswer: Because.") == ("Why?", "Because.")
    for bad in ("", "Sure!", "Question: Why?", "Question: Why?\nAnswer:", "Answer: Yes.", "Question: a\nQuestion: b\nAnswer: c", "???\nAnswer: c"): assert parse_example(bad) is None

def test_only_new_examples_with_known_labels_count():
    new = NewExamples(SPLITS["train"])
    tries = [("How late is the shop open?", "Till 8."), ("What is wrong with the parcel of customer 0, please?", "x"), ("How late is the shop open today?", "Till 9."), None]
    assert [new.problem(t) for t in tries] == ["", "too similar to a source", "repeated", "unparsable"]
    labelled = NewExamples([row(0, label="spam"), row(1, label="ham")])
    assert [labelled.problem(("Buy a new car now", l)) for l in ("offer", "spam")] == ["unknown label", ""]

def test_synthesis_with_a_model_that_can(monkeypatch):
    "The model's part is played by a function; drawing, filter, counts, rounds and origin are real."
    seen = []
    def writes(lm, rows, **_):
        seen.extend(rows)
        texts = [f"Question: Is {len(seen)}{i}1 less than {len(seen)}{i}2 and {len(seen)}{i}3 or {len(seen)}{i}4?\nAnswer: Yes {i}." if i % 2 else "Hm." for i,_ in enumerate(rows)]
        return type("G", (), {"texts": texts})
    monkeypatch.setattr(augmentation, "generate", writes)
    made,counts = synthesise(None, SPLITS["train"], n=8, seed=5)
    assert counts["made"] == len(made) == 7 and counts["unparsable"] == 4 + 2 + 1
    assert len(seen) == 14 and all(r["messages"][0]["content"].count("Question: ") == 3 for r in seen)
    for r in made: assert r["made_from"]["id"] == r["made_from"]["shown"][0] and r["messages"][0]["content"] == "Be brief."
    assert check_made(SPLITS | {"train": SPLITS["train"] + made}) == []
    with pytest.raises(UserError, match="needs 3 examples"): synthesise(None, ROWS[:2], n=1)
    with pytest.raises(UserError, match="no answer that lost"): synthesise(None, [row(n, rejected=[]) for n in range(3)], n=1)

def test_the_bundled_model_writes_the_same_twice():
    lm = load_model("tiny")
    first,second = (synthesise(lm, SPLITS["train"], n=2, max_new_tokens=8) for _ in range(2))
    assert first == second and first[1].total() == 6


# -- never held out

def test_clean_splits_are_proved_clean():
    more,counts = augment(SPLITS, "paraphrase", n=45, seed=1)
    assert counts == {"made": 45} and len(more["train"]) == 75 and (more["validation"], more["test"]) == (SPLITS["validation"], SPLITS["test"])
    assert check_made(more) == check_made(SPLITS) == []

def test_planted_leaks_are_caught():
    made = with_question(ROWS[0], "Another question?", "x", 0)
    from_test = with_question(ROWS[35], "Another question?", "x", 0)
    planted = {
        "is a made example in test": SPLITS | {"test": SPLITS["test"] + [made]}, "is a made example in validation": SPLITS | {"validation": [made]},
        "is made from r035 of test": SPLITS | {"train": ROWS[:30] + [from_test]}, "is of group g17, which is in test": SPLITS | {"train": ROWS[:30] + [from_test | {"made_from": made["made_from"]}]},
        "is not in the group of its source": SPLITS | {"train": ROWS[:30] + [made | {"group": "g1"}]}, "which is in no split": SPLITS | {"train": ROWS[1:30] + [made]},
        "is made from r031 of validation": SPLITS | {"train": ROWS[:30] + [made | {"made_from": made["made_from"] | {"shown": ["r000", "r031"]}}]},
        "says the same as r036 of test": SPLITS | {"train": ROWS[:30] + [made | {"messages": [m | {"content": m["content"].upper()} for m in ROWS[36]["messages"]]}]}}
    missed = {problem: check_made(splits) for problem,splits in planted.items() if not any(problem in p for p in check_made(splits))}
    assert missed == {}

def test_augment_refuses_rows_that_leak_and_wrong_calls():
    with pytest.raises(UserError, match="Made examples leak .*Split by group"): augment(SPLITS | {"test": [ROWS[34] | {"group": "g0"}]}, "paraphrase", n=30)
    with pytest.raises(UserError, match="Did you mean synthesise"): augment(SPLITS, "synthesize", n=3)
    with pytest.raises(UserError, match="1 or more"): augment(SPLITS, "paraphrase", n=0)
    with pytest.raises(UserError, match="two models"): augment(SPLITS, "back_translate", n=3, model="one")

def test_back_translation_from_folders_in_one_call(seq2seq):
    more,counts = augment(SPLITS, "back_translate", n=3, model=f"{seq2seq['t5']},{seq2seq['marian']}")
    assert counts.total() == 3 and len(more["train"]) == 30 + counts["made"]
