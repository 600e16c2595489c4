"Prompt templates, the examples shown before a question, comparisons and searches: what each must refuse, and what it must not claim."
import math
import numpy as np, pytest
from llmops_kit.data.docstrings import INSTRUCTION
from llmops_kit.data.prompts import PromptTemplate, bundled_templates, with_shots
from llmops_kit.data.shots import ShotPool, apply, fitting_templates, select_shots, shots_of, variables_of
from llmops_kit.evaluation.prompt_search import candidates, halves, search_prompts, successive_halving
from llmops_kit.evaluation.prompting import PromptScorer, compare_prompts, score_answers, spread_rows
from llmops_kit.evaluation.scoring import Scores, score
from llmops_kit.evaluation.statistics import by_group
from llmops_kit.runs.artifacts import sha256_of
from llmops_kit.runs.errors import UserError

def text(body="Say it.\n\n{{ prompt }}", **head): return "---\n" + "".join(f"{k}: {v}\n" for k, v in ({"variables": "[prompt]"} | head).items()) + f"---\n{body}\n"

def function(name, code, answer="Return it.", group="m"):
    return {"id": f"{group}:{name}", "group": group, "messages": [{"role": "user", "content": f"{INSTRUCTION}\n\n{code}"}, {"role": "assistant", "content": answer}]}

# -- templates
BROKEN = {
    "no head": ("{{ prompt }}", "has no head"),
    "head without end": ("---\nvariables: [prompt]\n{{ prompt }}", "has no head"),
    "head is no YAML": (text(system="say: {{ prompt }}"), "no YAML"),
    "head is no mapping": ("---\n- prompt\n---\n{{ prompt }}", "no mapping"),
    "unknown field": (text(sytem="Be brief."), "Did you mean system?"),
    "no variables": ("---\ndescription: None.\n---\nHello.", "Write `variables: [prompt]`"),
    "undeclared variable": (text("{{ promt }}{{ prompt }}"), "Did you mean prompt?"),
    "unused variable": (text(variables="[prompt, code]"), "declares code and does not use it"),
    "a variable that is the answer": (text("{{ completion }}", variables="[completion]"), "completion"),
    "unclosed slot": (text("Hello.\n{{ prompt }"), "line 2"),
    "a filter that is random": (text("{{ prompt | random }}"), "No filter named 'random'"),
    "a function that is random": (text("{{ prompt }}{{ lipsum() }}"), "uses lipsum"),
    "empty text": (text(""), "its text is empty"),
    "example without answer": (text(examples="[{prompt: Hello}]"), "example 1 has no completion"),
    "example with a wrong variable": (text(examples="[{promt: Hello, completion: Hi}]"), "Did you mean prompt?"),
    "example that is a number": (text(examples="[{prompt: 1, completion: Hi}]"), "Put it in quotes"),
    "unknown selection": (text(few_shot="{count: 1, select: nearst}"), "Did you mean nearest?"),
    "count that is no number": (text(few_shot="{count: two}"), "whole number"),
    "unknown few-shot field": (text(few_shot="{number: 2}"), "Write `few_shot:"),
}

@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_template_is_refused_with_its_fix(case):
    broken, message = BROKEN[case]
    with pytest.raises(UserError) as error: PromptTemplate("mine", broken)
    assert message in str(error.value)

@pytest.mark.parametrize("name", bundled_templates())
def test_a_bundled_template_words_an_example(name):
    template, row = PromptTemplate.load(name), function("f", "def f(a, *, b=1):\n    return a")
    worded = apply(template, row)
    assert template.description and worded["messages"][-1] == row["messages"][-1] and worded["id"] == row["id"]
    assert "def f(a, *, b=1)" in worded["messages"][-2]["content"]
    assert (worded == row) == (name in ("default", "nearest"))

def test_values_are_text_and_never_code():
    row = function("f", "def f():\n    return '{{ 7*7 }}{% for x in y %}<b>'")
    assert "{{ 7*7 }}{% for x in y %}<b>" in apply(PromptTemplate.load("heading"), row)["messages"][0]["content"]
    for body in ("{{ prompt.__class__.__mro__ }}", "{{ prompt.nothing }}", "{% include 'x' %}{{ prompt }}"):
        with pytest.raises(UserError, match="cannot be filled in"): PromptTemplate("mine", text(body)).render({"prompt": "x"})

def test_missing_and_unknown_values_are_refused():
    template = PromptTemplate("mine", text())
    with pytest.raises(UserError, match="does not give prompt"): template.render({})
    with pytest.raises(UserError, match="gives promt, which it does not declare. Did you mean prompt?"): template.render({"prompt": "a", "promt": "b"})
    with pytest.raises(UserError, match="empty prompt"): PromptTemplate("mine", text("{{ prompt }}")).render({"prompt": " \n"})

def test_a_template_is_known_by_its_content(tmp_path):
    one, other = PromptTemplate("one", text()), PromptTemplate("other", text("Say it!\n\n{{ prompt }}"))
    one.save(tmp_path/"a.md")
    (tmp_path/"windows.md").write_bytes(b"\xef\xbb\xbf" + one.text.replace("\n", "\r\n").encode())
    assert sha256_of(tmp_path/"a.md") == one.sha256 == one.artifact.sha256 != other.sha256
    assert {PromptTemplate.load(str(tmp_path/name)).sha256 for name in ("a.md", "windows.md")} == {one.sha256}
    with pytest.raises(UserError, match="Did you mean default?"): PromptTemplate.load("defualt")
    (tmp_path/"latin.md").write_bytes("---\nvariables: [prompt]\n---\nWörter: {{ prompt }}".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"): PromptTemplate.load(str(tmp_path/"latin.md"))

def test_a_conversation_keeps_its_turns():
    before = [{"role": "system", "content": "Old."}, {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1."}]
    row = {"id": "1", "group": "1", "messages": [*before, {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2."}]}
    assert apply(PromptTemplate.load("default"), row) == row
    worded = apply(PromptTemplate("mine", text("Q: {{ prompt }}", system="New.")), row, [({"prompt": "Zero?"}, "0.")])["messages"]
    assert [(m["role"], m["content"]) for m in worded] == [("system", "New."), ("user", "Q: Zero?"), ("assistant", "0."), ("user", "One?"), ("assistant", "1."), ("user", "Q: Two?"), ("assistant", "2.")]
    assert [t.name for t in fitting_templates(row)] == ["default", "nearest"]
    with pytest.raises(UserError, match="needs code"): apply(PromptTemplate.load("code_only"), row)

def test_no_variable_holds_the_answer():
    assert not [v for v in variables_of(function("f", "def f(): ...", "A secret answer.")).values() if "secret" in v]

# -- examples before the question
@pytest.mark.parametrize("how", ["fixed", "random", "nearest"])
def test_shots_are_never_the_question_nor_of_its_group(how):
    query = function("f", "def sorted_words(text): return sorted(text.split())", group="planted")
    twin = function("twin", "def sorted_words(text): return sorted(text.split())", group="planted") # would be the nearest of all
    rows = [query, twin, *(function(f"g{n}", f"def other{n}(words): return {n}", group=f"g{n % 7}") for n in range(30))]
    for seed in range(5):
        found = select_shots(rows, query, 8, how, seed)
        assert len({r["id"] for r in found}) == 8 and "planted" not in {r["group"] for r in found}
        assert found == select_shots(rows[::-1], query, 8, how, seed) == ShotPool(rows).select(query, 8, how, seed)
    assert (len({str(select_shots(rows, query, 8, how, seed)) for seed in range(5)}) > 1) == (how == "random")

def test_nearest_shares_the_rare_words():
    rows = [function(f"common{n}", f"def common{n}(self, value): return self.value", group=f"g{n}") for n in range(20)] + [
        function("match", "def parse_header(quoted_printable): ...", group="rare")]
    query = function("f", "def decode(self, value, quoted_printable): return self.value", group="q")
    assert select_shots(rows, query, 1, "nearest")[0]["id"] == "rare:match"

# -- scoring with shots
@pytest.fixture(scope="module")
def lm():
    from llmops_kit.models.load import load_model
    from llmops_kit.models.tiny import new_model
    return new_model(load_model("tiny").tokenizer, hidden_size=64, layers=1, intermediate_size=128, seed=1)

TRAIN = [function(f"t{n}", f"def t{n}(x):\n    return x + {n}", f"Add {n} to a number.", group=f"train{n}") for n in range(12)]
HELD_OUT = [function(f"v{n}", f"def v{n}(x):\n    return x * {n}", f"Multiply a number by {n}.", group=f"held{n % 6}") for n in range(24)]

def test_only_the_last_answer_counts(lm):
    template = PromptTemplate.load("nearest")
    rows = [apply(template, row, shots_of(template, select_shots(TRAIN, row, 2, "nearest"))) for row in HELD_OUT[:6]]
    everything, before = score(lm, rows), score(lm, [row | {"messages": row["messages"][:-2]} for row in rows])
    found = score_answers(lm, rows)
    assert np.allclose(found.nll, everything.nll - before.nll, atol=1e-3)  # a causal model: what comes first is not changed by what follows
    assert (found.tokens == everything.tokens - before.tokens).all()
    assert np.allclose(score_answers(lm, HELD_OUT).nll, score(lm, HELD_OUT).nll, atol=1e-3)

def test_shots_that_do_not_fit_are_given_up_last_first(lm):
    from llmops_kit.models.chat import render_prompt
    long = [function(f"t{n}", "def f():\n" + "    pass # many words\n"*40, f"Answer {n}.", group=f"train{n}") for n in range(4)]
    scorer, template = PromptScorer(lm, long, max_new_tokens=40), with_shots(PromptTemplate.load("default"), 4, "fixed")
    rows, left_out = scorer.worded(template, HELD_OUT[:3])
    shown = [[m["content"] for m in row["messages"][:-1] if m["role"] == "assistant"] for row in rows]
    assert left_out == sum(4 - len(s) for s in shown) > 0 and all(0 < len(s) < 4 and s == [f"Answer {n}." for n in range(len(s))] for s in shown)
    assert all(len(render_prompt(lm.tokenizer, row["messages"])) + 40 <= lm.max_length for row in rows)
    longer = [row | {"messages": [row["messages"][0], {"role": "assistant", "content": "word "*200}]} for row in HELD_OUT[:3]]
    assert [len(r["messages"]) for r in scorer.worded(template, longer)[0]] == [len(r["messages"]) for r in rows], "the answer decides on the prompt"

def test_what_is_measured_is_never_shown(lm):
    scorer = PromptScorer(lm, [*TRAIN, HELD_OUT[3]])
    with pytest.raises(UserError, match="are training rows"): compare_prompts(scorer, [PromptTemplate.load("default")], HELD_OUT)

def test_a_comparison_of_a_real_model_is_the_difference_of_its_scores(lm):
    scorer, templates = PromptScorer(lm, TRAIN, max_new_tokens=4), [PromptTemplate.load(name) for name in ("default", "code_first", "nearest")]
    found = compare_prompts(scorer, templates, HELD_OUT, generated=4, resamples=200)
    a, b = (scorer.score(t, HELD_OUT) for t in templates[:2])
    assert math.isclose(found.differences["code_first"]["nll"].value, b.nll.sum()/b.tokens.sum() - a.nll.sum()/a.tokens.sum(), abs_tol=1e-9)
    flat = found.flat()
    assert {"prompt/default/nll", "difference/nearest/nll/low", "difference/nearest/nll/high", "verdict/nearest", "prompt/nearest/rouge_l", "left_out/nearest"} <= set(flat)
    assert "difference/default/nll" not in flat and flat["groups"] == 6 and found.confidence == 0.975

# -- what is claimed
class Pretended:
    "Scores with a true effect of each template, noise of each example, and noise that a group's examples share."
    def __init__(self, seed, effect=(), shared=0.0): self.seed, self.effect, self.shared = seed, dict(effect), shared
    def score(self, template, rows, on_progress=None):
        number = lambda *key: np.random.default_rng([self.seed, *map(ord, "/".join(key))])
        own = number(template.name).normal(0, 0.3, 1000)
        shared = {g: number(template.name, g).normal(0, self.shared) for g in {r["group"] for r in rows}} if self.shared else {}
        level, tokens = number("level").normal(5, 1, 1000), number("tokens").integers(6, 20, 1000)
        at = [row["n"] for row in rows]
        each = np.array([level[n] + own[n] + shared.get(r["group"], 0) for n, r in zip(at, rows)]) + self.effect.get(template.name, 0)
        return Scores([r["id"] for r in rows], each*tokens[at], tokens[at])

ROWS = [{"id": f"{n}", "n": n, "group": f"group {n % 40}", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]} for n in range(240)]

def wordings(n): return [PromptTemplate("default" if i == 0 else f"wording {i}", text("Please. "*i + "{{ prompt }}")) for i in range(n)]

def test_equal_templates_have_no_winner_in_a_comparison():
    claimed = {"corrected": 0, "each on its own": 0}
    for seed in range(200):
        found = compare_prompts(Pretended(seed, shared=0.2), wordings(6), ROWS, resamples=500, seed=seed)
        claimed["corrected"] += found.best != "default"
        alone = [compare_prompts(Pretended(seed, shared=0.2), [wordings(6)[0], t], ROWS, resamples=500, seed=seed).best for t in wordings(6)[1:]] if seed < 40 else []
        claimed["each on its own"] += any(best != "default" for best in alone)
    assert claimed["corrected"] <= 10, claimed  # at most 5 % of 200
    assert claimed["each on its own"] >= 3, claimed  # of 40: about one in ten

def test_ignoring_groups_would_claim_what_is_not_there():
    from llmops_kit.evaluation.statistics import paired_difference
    wrong = {"by group": 0, "by example": 0}
    for seed in range(60):
        found = compare_prompts(Pretended(seed, shared=0.5), wordings(2), ROWS, resamples=300, seed=seed)
        wrong["by group"] += found.differences["wording 1"]["nll"].excludes_zero
        plain = [found.metrics[name]["nll"] for name in ("default", "wording 1")]
        wrong["by example"] += paired_difference(*plain, resamples=300, seed=seed).excludes_zero
        assert math.isclose(by_group(plain[0], [r["group"] for r in ROWS]).value, plain[0].value)
    assert wrong["by group"] <= 8 and wrong["by example"] >= 15, wrong

def test_a_search_among_equal_templates_claims_no_winner():
    claimed, runs = {"confirmed": 0, "on what it saw": 0}, 200
    for seed in range(runs):
        pretended, equal = Pretended(seed, shared=0.1), wordings(8)
        found = search_prompts(pretended, equal[0], equal, ROWS, budget=600, resamples=300, seed=seed)
        claimed["confirmed"] += found.best.name != "default"
        if found.confirmed:
            seen = halves(ROWS, seed)[0][:found.rounds[-1].examples]
            claimed["on what it saw"] += compare_prompts(pretended, [equal[0], found.found], seen, resamples=300, seed=seed).best != "default"
    assert claimed["confirmed"] <= 0.05*runs, claimed
    assert claimed["on what it saw"] > 0.07*runs, claimed

def test_a_search_finds_what_is_there_within_its_budget():
    class Counting(Pretended):
        scored = 0
        def score(self, template, rows, on_progress=None):
            self.scored += len(rows)
            return super().score(template, rows)
    counting = Counting(3, {"wording 5": -0.4})
    found = search_prompts(counting, wordings(8)[0], wordings(8), ROWS, budget=700, resamples=1000)
    assert (found.best.name, found.verdict) == ("wording 5", "better") and found.confirmed.differences["wording 5"]["nll"].low < -0.4 < found.confirmed.differences["wording 5"]["nll"].high
    assert counting.scored <= 700 and counting.scored == found.searched + 2*found.confirmed.examples
    assert not {r["group"] for r in halves(ROWS)[0]} & {r["group"] for r in halves(ROWS)[1]}
    again = search_prompts(Pretended(3, {"wording 5": -0.4}), wordings(8)[0], wordings(8), ROWS[::-1], budget=700, resamples=1000)
    assert again.flat() == found.flat(), "the order of the rows plays a part"

def test_worse_is_said_too_and_the_default_stays():
    found = compare_prompts(Pretended(1, {"wording 1": 0.4}), wordings(3), ROWS, resamples=500)
    assert found.verdicts == {"wording 1": "worse", "wording 2": "not decided"} and found.best == "default" and found.flat()["verdict/wording 1"] == -1

def test_a_search_refuses_what_cannot_be_decided():
    with pytest.raises(UserError, match="Give a budget of"): search_prompts(Pretended(0), wordings(8)[0], wordings(8), ROWS, budget=100)
    with pytest.raises(UserError, match="has 3 groups"): search_prompts(Pretended(0), wordings(2)[0], wordings(2), [r for r in ROWS if r["n"] % 40 < 3], budget=900)
    with pytest.raises(UserError, match="one group says nothing"): compare_prompts(Pretended(0), wordings(2), [r for r in ROWS if r["n"] % 40 == 0])
    only, spent = successive_halving(Pretended(0), wordings(2), spread_rows(ROWS), 100)
    assert len(only) == 1 and spent == 100

def test_candidates_that_say_the_same_are_one():
    found = candidates([PromptTemplate.load("default"), PromptTemplate.load("nearest")], [0, 2], ["nearest", "fixed"])
    assert [t.name for t in found] == ["default", "nearest", "default+fixed2"]
    assert len({t.sha256 for t in found}) == 3

def test_rows_are_taken_from_every_group():
    lopsided = [r | {"group": "large" if r["n"] < 200 else f"small {r['n']}"} for r in ROWS]
    taken = spread_rows(lopsided, 60)
    assert len({r["group"] for r in taken}) == 41 and spread_rows(lopsided, 20) == taken[:20] == spread_rows(lopsided[::-1], 20)
