"Conversations, masks, loading and the bundled model: what the notebooks of models/ do not say of themselves."
import copy, json, re, time
from dataclasses import replace
from html import unescape

import pytest, torch

from llmops_kit.models.chat import DEFAULT_TEMPLATE, CompletionTooLong, has_markers, render, render_prompt, show_tokens
from llmops_kit.runs.ledger import is_sealed
from llmops_kit.models.load import bundled_folder, load_adapter, load_model, shared_copy
from llmops_kit.models.tiny import install_bundled, largest, new_model, save_model, train_tokenizer
from llmops_kit.runs.artifacts import bytes_of, sha256_of
from llmops_kit.runs.errors import UserError

CHATML = ("{% for m in messages %}{{ '<|user|>' if m['role'] != 'assistant' else '<|assistant|>' }}{{ m['role'] + '\n' + m['content'] + eos_token + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}<|assistant|>assistant\n{% endif %}")
MARKED_WITHOUT_END = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}"
                      "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
ONE = [{"role": "user", "content": "def area(w, h):\n    return w * h"}, {"role": "assistant", "content": "Return the area."}]
SEVERAL = [{"role": "system", "content": "Be brief."}, *ONE, {"role": "user", "content": "And the perimeter?"}, {"role": "assistant", "content": "\n\n  Return 2 * (w + h).\n"}]


@pytest.fixture(scope="module")
def tiny(): return load_model("tiny")

@pytest.fixture(params=["own", "default", "chatml", "marked without end", "start token twice"])
def tokenizer(request, tiny):
    made = copy.deepcopy(tiny.tokenizer)
    made.chat_template = {"own": made.chat_template, "default": DEFAULT_TEMPLATE, "chatml": CHATML, "marked without end": MARKED_WITHOUT_END,
                          "start token twice": "{{ bos_token }}" + made.chat_template}[request.param]
    return made

def trained(tokenizer, rendered): return tokenizer.decode([i for i, m in zip(rendered.ids, rendered.mask) if m])


@pytest.mark.parametrize("messages", [ONE, SEVERAL], ids=["one turn", "several"])
def test_prompt_is_a_prefix_and_only_answers_are_trained(tokenizer, messages):
    prompt, rendered = render_prompt(tokenizer, messages), render(tokenizer, messages)
    assert rendered.ids[:len(prompt)] == prompt and len(rendered.ids) == len(rendered.mask)
    assert rendered.ids.count(tokenizer.bos_token_id) == (1 if "bos_token" in tokenizer.chat_template else 0)
    assert trained(tokenizer, rendered) == "".join(m["content"] + tokenizer.eos_token for m in messages if m["role"] == "assistant")
    assert all(rendered.mask[len(prompt):len(prompt) + 3]), "the last answer is trained from its first token"

def test_markers_and_differences_agree(tiny):
    unmarked = copy.deepcopy(tiny.tokenizer)
    unmarked.chat_template = unmarked.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert has_markers(tiny.tokenizer) and not has_markers(unmarked)
    assert render(tiny.tokenizer, SEVERAL) == render(unmarked, SEVERAL)

def test_only_the_start_of_the_prompt_is_truncated(tokenizer):
    whole = render(tokenizer, ONE)
    answer = len(whole.ids) - len(render_prompt(tokenizer, ONE))
    for length in range(answer + 8, len(whole.ids) + 2):
        cut = render(tokenizer, ONE, max_length=length)
        assert len(cut.ids) == len(cut.mask) == min(length, len(whole.ids)) and cut.truncated == len(whole.ids) - len(cut.ids)
        assert cut.ids[-answer:] == whole.ids[-answer:] and sum(cut.mask) == sum(whole.mask)
        assert cut.ids.count(tokenizer.bos_token_id) == whole.ids.count(tokenizer.bos_token_id)
    with pytest.raises(CompletionTooLong, match=f"{answer} tokens and the context {answer}"): render(tokenizer, ONE, max_length=answer)

def test_a_conversation_without_an_answer_is_refused(tiny):
    with pytest.raises(UserError, match="assistant turn"): render(tiny.tokenizer, ONE[:1])
    with pytest.raises(UserError, match="user message"): render_prompt(tiny.tokenizer, [])

def test_a_template_that_refuses_a_role_says_so(tiny):
    strict = copy.deepcopy(tiny.tokenizer)
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + strict.chat_template
    with pytest.raises(UserError, match="no system role"): render(strict, SEVERAL)

def test_tokens_are_shown_in_html_and_on_the_terminal(tiny):
    view = show_tokens(render(tiny.tokenizer, [ONE[0], {"role": "assistant", "content": "Größe <b> 😀"}]), tiny.tokenizer)
    shown = unescape(re.sub("<[^>]+>", "", view._repr_html_()))
    assert "Größe <b> 😀<|end|>" in shown and "<b>" not in view._repr_html_()
    assert "😀" in view.text and "\x1b[" in view.text and "↵" in view.text and "\ufffd" not in view.text


def test_the_bundled_model_is_small_and_complete():
    beside = bundled_folder().with_name("tiny_run")
    assert bytes_of(bundled_folder()) + bytes_of(beside) <= largest == 8_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {o.name for o in bundled_folder().iterdir()}
    record = json.loads((beside/"run.json").read_text())
    assert is_sealed(record) and record["status"] == "finished" and (beside/"metrics.jsonl").stat().st_size
    assert sha256_of(bundled_folder()) == next(o["sha256"] for o in record["outputs"] if o["kind"] == "model")

def test_loading_is_quiet_deterministic_and_identified(tiny, capfd):
    again = load_model("tiny")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert again.artifact == tiny.artifact and tiny.artifact.sha256 == sha256_of(bundled_folder())
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), tiny.model.parameters()))
    assert {p.dtype for p in tiny.model.parameters()} == {torch.float32} and not tiny.warnings

def test_a_model_without_template_gets_the_default_and_a_warning(tmp_path):
    bare = train_tokenizer(["def f(): return 1"], 300, 64)
    bare.chat_template = None
    lm = load_model(str(save_model(new_model(bare, 64, 1, 64), tmp_path/"bare")))
    assert lm.tokenizer.chat_template == DEFAULT_TEMPLATE and "no chat template" in lm.warnings[0]
    assert trained(lm.tokenizer, render(lm.tokenizer, ONE)) == "Return the area." + lm.tokenizer.eos_token

@pytest.mark.parametrize("name", ["no such model", "nobody/no-such-model-7f3a", "nobody-no-such-model-7f3a@0123abc"])
def test_an_unknown_model_is_refused_quickly(name, monkeypatch):
    monkeypatch.setattr("llmops_kit.models.load._online", lambda endpoint: False)
    start = time.monotonic()
    with pytest.raises(UserError, match="model='tiny'"): load_model(name)
    assert time.monotonic() - start < 10

def test_folders_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(UserError, match="no config.json"): load_model(str(tmp_path))
    (tmp_path/"adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter"): load_model(str(tmp_path))
    (tmp_path/"config.json").write_text("{}")
    with pytest.raises(UserError, match="do not load"): load_model(str(tmp_path))
    with pytest.raises(UserError, match="Unknown dtype"): load_model("tiny", dtype="int3")

def test_an_adapter_for_another_base_is_refused(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model
    get_peft_model(shared_copy(tiny.model), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    assert load_adapter(str(tmp_path), tiny).base is tiny
    assert not any("lora" in name for name, _ in tiny.model.named_parameters()), "the base stays as it is"
    small = replace(tiny, name="small", model=new_model(tiny.tokenizer, 64, 1, 64).model)
    with pytest.raises(UserError, match="does not fit small"): load_adapter(str(tmp_path), small)
    (tmp_path/"base.json").write_text(json.dumps({"name": "other-base", "sha256": "0" * 64}))
    with pytest.raises(UserError, match="other-base.*tiny"): load_adapter(str(tmp_path), tiny)
    with pytest.raises(UserError, match="neither a folder nor a run"): load_adapter("nowhere", tiny)

def test_a_model_that_is_too_large_is_not_bundled(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPS_RUNS", str(tmp_path))
    from llmops_kit.runs import ledger
    id = "20260101-000000-pretrain-0000"
    model = tmp_path/id/"artifacts"/"model"
    ledger.create_record({"schema": ledger.schema, "id": id, "job": "pretrain", "status": "finished", "outputs": []})
    save_model(new_model(train_tokenizer(["def f(): return 1"], 300, 64), 640, 1, 3072), model)
    (tmp_path/id/"metrics.jsonl").write_text("")
    ledger.update_record(id, outputs=[{"name": "model", "kind": "model", "sha256": sha256_of(model), "bytes": bytes_of(model), "path": str(model)}])
    with pytest.raises(UserError, match="may have 8,000,000"): install_bundled(id, tmp_path/"bundled")
    assert not (tmp_path/"bundled").exists()
