"Probes of behaviour: what is planted is found, what is clean is not, and a probe that is none is named."
import json
from types import SimpleNamespace

import numpy as np
import pytest

from llmops_kit.evaluation import bias as bias_module, injection, robustness, toxicity
from llmops_kit.evaluation.augmentation import question_of
from llmops_kit.evaluation.bias import bias, bias_findings
from llmops_kit.evaluation.findings import Cases, Finding, findings_picture, findings_rows, findings_table, findings_text, flat_findings, judged
from llmops_kit.evaluation.injection import probe_injection
from llmops_kit.evaluation.memorization import memorization_findings, paired_by_length
from llmops_kit.evaluation.metrics import mean_metric
from llmops_kit.evaluation.probes import load_probes
from llmops_kit.evaluation.refusal import is_refusal
from llmops_kit.evaluation.robustness import robustness as probe_robustness, typos
from llmops_kit.evaluation.toxicity import probe_toxicity
from llmops_kit.runs.errors import UserError

PROBES = load_probes()


def answering(patch, module, answer):
    "A model that answers each prompt by a function."
    patch.setattr(module, "generate", lambda lm, rows, *args, **kwargs: SimpleNamespace(texts=[answer(question_of(r)) for r in rows]))


def names(findings): return [f.name for f in judged(findings, resamples=500) if f.found]


def test_the_kits_probes_are_well_formed_and_balanced():
    assert {k: len(v) for k, v in PROBES.items()} == {"bias": 120, "toxicity": 32, "refusal": 32, "injection": 12}
    assert len({(p["prompt"], p["a"], p["b"]) for p in PROBES["bias"]}) == 120
    assert not any(is_refusal(p["prompt"]) for p in PROBES["refusal"])


@pytest.mark.parametrize("line, says", [
    ("[1]", "own.jsonl line 2: a probe is a JSON object"), ('{"probe": "bais", "id": "x"}', "Did you mean bias"),
    ('{"probe": "toxicity", "id": "x", "kind": "rude", "prompt": "p"}', "neutral or provoking, not 'rude'"),
    ('{"probe": "toxicity", "id": "x", "kind": "neutral", "promt": "p"}', "needs 'prompt'"),
    ('{"probe": "refusal", "id": "x", "kind": "harmful", "prompt": "p", "promp": "q"}', "Did you mean prompt"),
    ('{"probe": "bias", "id": "x", "group": "g", "prompt": "p", "a": "A", "b": "B", "good": "y", "bad": "n"}', "no {person}"),
    ('{"probe": ', "line 2 is no JSON"), ('{"probe": "refusal", "id": "harmful-01", "kind": "harmful", "prompt": "p"}', "the kit's are taken")])
def test_a_probe_that_is_none_is_named(tmp_path, line, says):
    path = tmp_path/"own.jsonl"
    path.write_text('{"probe": "toxicity", "id": "fine", "kind": "neutral", "prompt": "p"}\n' + line + "\n")
    with pytest.raises(UserError) as found: load_probes(path)
    assert says in str(found.value)


def test_missing_and_empty_files_are_refused(tmp_path):
    (tmp_path/"empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="are empty"): load_probes(tmp_path/"empty.jsonl")
    with pytest.raises(UserError, match="cannot be read"): load_probes(tmp_path/"none.jsonl")


def test_planted_bias_is_found_in_its_group_alone(monkeypatch):
    def scorer(shift):
        def score(lm, rows, **kwargs):
            rng = np.random.default_rng(0)
            return SimpleNamespace(nll=np.array([3 + rng.normal(0, 0.2) + shift*("Nigeria" in question_of(r) or "Syria" in question_of(r))*(r["id"].endswith("good")) for r in rows]))
        return score
    monkeypatch.setattr(bias_module, "score", scorer(0.6))
    assert {n.split("/")[1] for n in names(bias(None, PROBES["bias"]))} == {"origin"}
    monkeypatch.setattr(bias_module, "score", scorer(0.0))
    assert names(bias(None, PROBES["bias"])) == []


def test_models_without_bias_are_seldom_accused():
    "100 made-up models: together 5 %, with three standard errors of simulation (6.5 points) and a point for twenty prompts."
    rng = np.random.default_rng(1)
    accused = [bool(names(bias_findings(PROBES["bias"], rng.normal(5, 0.3, 4*len(PROBES["bias"]))))) for _ in range(100)]
    assert np.mean(accused) < 0.13


def test_an_obedient_model_follows_hidden_instructions_and_an_echo_does_not(monkeypatch):
    answers = {p["instruction"]: p["follows"] for p in PROBES["injection"]}
    answering(monkeypatch, injection, lambda q: next((f.lower() + "." for i, f in answers.items() if i in q), "The text is short."))
    assert names(probe_injection(None, PROBES["injection"])) == ["injection"]
    answering(monkeypatch, injection, lambda q: q)
    assert names(probe_injection(None, PROBES["injection"])) == []
    answering(monkeypatch, injection, lambda q: " ".join(answers.values()))  # says it all, instruction or not
    assert names(probe_injection(None, PROBES["injection"])) == []


def test_one_toxic_answer_is_found(monkeypatch):
    answering(monkeypatch, toxicity, lambda q: "You 1diot, sh1t!" if q.startswith("Roast") else "No, thank you.")
    found = judged(probe_toxicity(None, PROBES["toxicity"]))
    assert [(f.name, f.found) for f in found] == [("toxicity/neutral", False), ("toxicity/provoking", True)]
    assert [c["prompt"][:5] for c in found[1].cases] == ["Roast"] and found[0].interval.high > 0.15


def test_typos_are_the_same_again_and_only_in_words():
    text = "Return the number of bytes written, or None: f(x_1, 2.5) != y."
    assert typos(text) == typos(text) != text and typos(text, seed=1) != typos(text)
    for seed in range(200):
        found = typos("number 1234 of it", seed)
        assert found != "number 1234 of it" and found[0] == "n" and found.endswith("r 1234 of it") and len(found) - 17 in (-1, 0, 1)


def conversations(n=30): return [{"id": f"r{i}", "group": "g", "messages": [{"role": "user", "content": f"Please describe function number {i} briefly"}, {"role": "assistant", "content": f"It returns item {i} of the list"}]} for i in range(n)]


def test_a_brittle_model_is_found_and_a_blind_one_is_not(monkeypatch):
    rows = conversations()
    clean = {question_of(r): r["messages"][-1]["content"] for r in rows}
    def scored(brittle): return lambda lm, given, **kwargs: SimpleNamespace(nll=np.array([10.0 + 2*(brittle and question_of(r) not in clean) + int(r["id"][1:])/10 for r in given]), tokens=np.full(len(given), 5))
    monkeypatch.setattr(robustness, "score", scored(True))
    answering(monkeypatch, robustness, lambda q: clean.get(q, "No idea"))
    assert names(probe_robustness(None, rows)) == ["typos/loss", "typos/rouge_l", "paraphrase/loss", "paraphrase/rouge_l"]
    monkeypatch.setattr(robustness, "score", scored(False))
    answering(monkeypatch, robustness, lambda q: "It returns something")
    assert names(probe_robustness(None, rows)) == []
    with pytest.raises(UserError, match="'mute'"): probe_robustness(None, [{"id": "mute", "messages": [{"role": "assistant", "content": "x"}]}])


def test_memorized_is_found_and_easy_answers_are_not():
    rows, tokens, rng = conversations(40), np.full(40, 8), np.random.default_rng(0)
    easy = np.where(rng.random((2, 40)) < 0.3, 8, 2)  # as many short common answers on both sides
    assert names(memorization_findings(rows, rows, tuple(easy), (tokens, tokens))) == []
    learned = np.where(rng.random(40) < 0.5, 8, 2)
    assert names(memorization_findings(rows, rows, (learned, np.full(40, 2)), (tokens, tokens))) == ["memorization/extraction", "memorization/start"]


def test_pairs_are_of_one_length_and_used_once():
    rng = np.random.default_rng(2)
    train, held = rng.integers(2, 60, 80), rng.integers(2, 60, 50)
    pairs = paired_by_length(train, held, 30)
    assert len(pairs) == 30 and len({j for _, j in pairs}) == 30 and all(abs(train[i] - held[j]) <= max(2, train[i]/10) for i, j in pairs)
    assert paired_by_length([5], [50], 9) == []


def test_findings_are_shown_and_saved_without_gaps():
    ids = [str(i) for i in range(30)]
    found = judged([Finding("a/b", "it is so", mean_metric("a", ids, np.arange(30) < 9, proportion=True, signature="s"), cases=[{"id": "<x>", "prompt": "p", "answer": "<b>", "score": 1.0}]),
                    Finding("c", "it falls", mean_metric("c", ids, np.arange(30.)), mean_metric("c", ids, np.arange(30.)), bad="lower")])
    assert "Found** in 1 of 2" in findings_text(found) and "Nothing found" in findings_text(judged(found[1:]))
    assert list(findings_table(found)[""]) == ["found", "not found"] and findings_picture(found).png[:4] == b"\x89PNG"
    assert "&lt;b&gt;" in Cases(found)._repr_html_() and "<b>" not in Cases(found)._repr_html_() and "a/b" in repr(Cases(found))
    assert flat_findings(found)["found"] == 1 and json.dumps([flat_findings(found), findings_rows(found)], allow_nan=False)
    with pytest.raises(UserError, match="no probe to judge"): judged([])
