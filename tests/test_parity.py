"The parity certificate: broken templates, tokenizers and collators fail with their own message, clean families pass."

import pytest, torch
from transformers import DataCollatorForLanguageModeling

import llmops_kit.evaluation.parity as parity_module
from families import CALL, FAMILIES, clean, model_of, rows, tokenizer_of
from llmops_kit.evaluation.parity import parity
from llmops_kit.models.chat import CompletionTooLong, Rendered, render, render_pair, render_prompt, render_row, render_text, show_tokens
from llmops_kit.models.packing import pack
from llmops_kit.models.templates import has_markers, one_start
from llmops_kit.runs.errors import UserError

ALL = [*FAMILIES, "tiny", "default"]
def knows_system(name): return name not in FAMILIES or FAMILIES[name].system

@pytest.mark.parametrize("markers", [True, False], ids=["markers", "no markers"])
@pytest.mark.parametrize("name", ALL)
def test_clean_families_pass(name, markers):
    lm = clean(name, markers)
    assert has_markers(lm.tokenizer) == markers
    for system in {knows_system(name), False}:
        checked = parity(lm, rows(system))
        assert checked.passed and checked.value == 0 and checked.share_trained > 0.2, checked

def test_tools_are_seen_and_tool_calls_trained():
    lm = clean("qwen")
    row = rows(tools=True)[1]
    called = render_row(lm.tokenizer, row)
    assert trained(lm, called) == '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>Yes, at 7 degrees.<|im_end|>'
    assert called == render_row(clean("qwen", markers=False).tokenizer, row)
    prompt = render_prompt(lm.tokenizer, row["messages"], tools=row["tools"])
    assert called.ids[:len(prompt)] == prompt and "<tools>" in lm.tokenizer.decode(prompt)
    assert parity(lm, rows(tools=True)).passed

def trained(lm, rendered): return lm.tokenizer.decode([i for i, m in zip(rendered.ids, rendered.mask) if m])

def changed(name, *pairs, markers=True):
    "A family with something replaced in its template."
    tokenizer = tokenizer_of(name, markers)
    one_start(tokenizer)
    for old, new in pairs:
        assert old in tokenizer.chat_template
        tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    return model_of(name, tokenizer)

def start_twice():
    return changed("llama-3", ("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"))
def start_in_template_and_tokenizer():
    return model_of("llama-3", tokenizer_of("llama-3"))
def start_in_tokenizer_alone():
    made = tokenizer_of("gemma")
    made.chat_template = made.chat_template.replace("{{ bos_token }}", "")
    return model_of("gemma", made)
def no_markers_and_history_rewritten(): # earlier answers are changed, as by templates that cut thoughts away
    return changed("chatml", ("m['content'] + '<|im_end|>' }}{{", "(m['content'] if loop.last else m['content'] | upper) + '<|im_end|>' }}{{"), markers=False)
def history_rewritten_with_markers():
    return changed("chatml", ("m['content'] + '<|im_end|>' }}{% endgeneration", "(m['content'] if loop.last else m['content'] | upper) + '<|im_end|>' }}{% endgeneration"))
def end_never_rendered():
    return changed("tiny", (" + eos_token", ""))
def end_at_which_generation_goes_on():
    lm = clean("gemma")
    lm.model.generation_config.eos_token_id = lm.tokenizer.eos_token_id
    return lm
def end_after_a_line_break_outside_the_markers():
    return changed("chatml", ("m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}", "m['content'] }}{% endgeneration %}{{ '\\n<|im_end|>\\n' }}"))
def system_turn_dropped():
    return changed("chatml", ("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"))
def system_turn_required():
    return changed("chatml", ("{% for m", "{% if messages[0]['role'] != 'system' %}{{ raise_exception('the first turn is not a system turn') }}{% endif %}{% for m"))
def first_turn_taken_for_the_system_turn():
    return changed("chatml", ("{% for m in messages %}", "{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% for m in messages[1:] %}"))
def answer_changed():
    return changed("chatml", ("{% generation %}{{ m['content'] +", "{% generation %}{{ m['content'] | lower | replace('as', 'like') +"))
def answer_stripped():
    return changed("chatml", ("{% generation %}{{ m['content'] +", "{% generation %}{{ m['content'] | trim +"))
def generation_prompt_missing():
    return changed("chatml", ("{% if add_generation_prompt %}", "{% if false %}"), markers=False)
def generation_prompt_of_another_format():
    return changed("llama-3", ("{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}", "{{ '<|start_header_id|>assistant<|end_header_id|> ' }}{% endif %}"))
def markers_around_the_user():
    return changed("chatml", ("{{ m['content'] + '<|im_end|>\\n' }}", "{% generation %}{{ m['content'] + '<|im_end|>\\n' }}{% endgeneration %}"))
def markers_around_the_header():
    return changed("llama-3", ("{{ '<|start_header_id|>' + m['role']", "{% generation %}{{ '<|start_header_id|>' + m['role']"), ("'<|end_header_id|>\\n\\n' }}{% if m", "'<|end_header_id|>\\n\\n' }}{% endgeneration %}{% if m"))
def markers_around_nothing():
    return changed("chatml", ("{{ m['content'] + '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}{{ m['content'] + '<|im_end|>' }}"))
def no_template():
    lm = clean("chatml")
    lm.tokenizer.chat_template = None
    return lm

def system_role_refused(): return clean("gemma")
def roles_refused(): return clean("mistral")

spaced = [row | {"messages": [*row["messages"][:-1], {"role": "assistant", "content": "    return 1"}]} for row in rows()]

@pytest.mark.parametrize("make, check, message, given", [
    (start_twice, "start", "begins with 2 start tokens <|begin_of_text|>", rows()),
    (start_in_template_and_tokenizer, "start", "one_start(tokenizer)", rows()),
    (start_in_tokenizer_alone, "start", "at the beginning of the template", rows(system=False)),
    (no_markers_and_history_rewritten, "refused", "has no generation markers, and renders the first 3 turns differently", rows()),
    (history_rewritten_with_markers, "answer", "What is trained is not the answer", rows()),
    (end_never_rendered, "end", "No end token follows the answer", rows()),
    (end_at_which_generation_goes_on, "end", "ends with <end_of_turn>, and generation stops at <eos>", rows(system=False)),
    (end_after_a_line_break_outside_the_markers, "end", "in the text but not trained", rows()),
    (system_turn_dropped, "turns", "drops or changes the system turn", rows()),
    (system_turn_required, "refused", "does not take a conversation without a system turn", rows()),
    (first_turn_taken_for_the_system_turn, "turns", "drops or changes the user turn", rows()),
    (answer_changed, "answer", "What is trained is not the answer", rows()),
    (answer_stripped, "answer", "strips space around the answer", spaced),
    (generation_prompt_missing, "prompt", "has no generation prompt", rows()),
    (generation_prompt_of_another_format, "refused", "not the beginning of the whole conversation", rows()),
    (markers_around_the_user, "answer", "trained that no assistant turn has", rows()),
    (markers_around_the_header, "answer", "trained that no assistant turn has", rows()),
    (markers_around_nothing, "answer", "No token of an answer is trained", rows()),
    (no_template, "refused", "has no chat template", rows()),
    (system_role_refused, "refused", "at the beginning of the first user turn", rows()),
    (roles_refused, "refused", "at the beginning of the first user turn", rows()),
], ids=lambda o: o.__name__ if callable(o) else "")
def test_broken_ones_fail_with_their_own_message(make, check, message, given):
    checked = parity(make(), given)
    assert not checked.passed and checked.value > 0 and check in checked.counts, checked
    assert any(message in o for o in checked.failures), checked.failures
    assert f"failed in {checked.counts[check]}" in checked._repr_markdown_()


def test_an_end_token_that_is_the_padding_and_masked_as_padding_fails(monkeypatch):
    lm = clean("llama-3")
    assert lm.tokenizer.pad_token == lm.tokenizer.eos_token and parity(lm, rows()).passed, "the kit's own batch goes by the attention mask"
    masks_padding = DataCollatorForLanguageModeling(lm.tokenizer, mlm=False)
    def collate(kept, pad_token_id):
        batch = masks_padding([{"input_ids": o["ids"]} for o in kept])
        wanted = torch.nn.utils.rnn.pad_sequence([torch.tensor(o["mask"]) for o in kept], batch_first=True)
        return dict(batch) | {"labels": batch["labels"].where(wanted, torch.tensor(-100))}
    monkeypatch.setattr(parity_module, "collate", collate)
    checked = parity(lm, rows())
    assert checked.value == 8 and "is also the padding token" in checked.failures[0], checked
    lm = clean("qwen") # a padding token of its own
    masks_padding = DataCollatorForLanguageModeling(lm.tokenizer, mlm=False)
    assert parity(lm, rows()).passed

def test_a_trainer_or_evaluator_that_reads_other_tokens_fails(monkeypatch):
    from llmops_kit.evaluation import scoring
    def of(module, name, change):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: change(whole(*args, **kwargs)))
        checked = parity(clean("tiny"), rows())
        monkeypatch.undo()
        return " ".join(checked.failures)
    assert "generates from another prompt" in of(scoring, "render_prompt", lambda ids: ids[:-1])
    assert "scores other tokens" in of(scoring, "_render_row", lambda r: Rendered(r.ids, [True] * len(r.ids)))
    assert "do not begin with the served prompt" in of(parity_module, "token_rows", lambda made: (made.ids.__setitem__(0, made.ids[0][:1] + made.ids[0]), made.mask.__setitem__(0, [False] + made.mask[0]), made)[-1])
    assert "tokens of an answer are not trained" in of(parity_module, "token_rows", lambda made: (made.mask.__setitem__(0, [m and not any(made.mask[0][:i]) or i == len(made.mask[0]) - 1 for i, m in enumerate(made.mask[0])]), made)[-1])

def test_missing_contents_tools_and_roles_are_named():
    without = [{"id": "0", "messages": CALL[:1] + [{k: v for k, v in CALL[1].items() if k != "content"}] + CALL[2:]}]
    assert "Turn 2 (assistant) has no content" in parity(clean("chatml"), without).about
    assert render(clean("qwen").tokenizer, without[0]["messages"]) == render(clean("qwen").tokenizer, CALL)
    assert "leaves something out of a turn with a tool call" in parity(clean("chatml"), [{"id": "0", "messages": CALL}]).about
    dropped = changed("qwen", ("{%- elif m.role == 'tool' %}", "{%- elif false %}"), ("m.role != 'system' or not loop.first", "m.role == 'user'"))
    assert "drops or changes the tool turn" in parity(dropped, [{"id": "0", "messages": CALL}]).about

def test_too_few_trained_tokens_fail():
    tokenizer = clean("tiny").tokenizer
    tokenizer.model_max_length = 10**6
    long = [{"id": "0", "messages": [{"role": "user", "content": "word " * 5000}, {"role": "assistant", "content": "yes"}]}]
    checked = parity(tokenizer, long)
    assert checked.counts == {"share": 1} and "of the tokens are trained, less than 0.1%" in checked.about
    assert parity(tokenizer, [*long, *rows()]).passed

def test_cut_conversations_agree_and_what_does_not_fit_is_counted():
    for name in ("tiny", "llama-3", "mistral"):
        checked = parity(clean(name), rows(knows_system(name)), max_length=50)
        assert checked.passed, checked
    whole = render(clean("tiny").tokenizer, rows()[0]["messages"])
    answer = len(whole.ids) - len(render_prompt(clean("tiny").tokenizer, rows()[0]["messages"]))
    checked = parity(clean("tiny"), [*rows(), *[rows()[0] | {"id": "long", "messages": [*rows()[0]["messages"][:-1], {"role": "assistant", "content": "word " * 60}]}]], max_length=answer + 8)
    assert checked.passed and checked.left_out == 1, checked

def test_rows_without_messages_are_refused():
    lm, many = clean("tiny"), rows(n=32)
    assert parity(lm, many).examples == 32
    with pytest.raises(UserError, match="not conversations"): parity(lm, [{"id": "0", "text": "words"}])


@pytest.mark.parametrize("name", ALL)
def test_the_system_turn_and_the_last_answer_survive_a_cut(name):
    lm, system = clean(name), knows_system(name)
    messages = [{"role": "system", "content": "Be brief."}] * system + [{"role": "user", "content": "one two three " * 40}, {"role": "assistant", "content": "First answer."},
                {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Last answer."}]
    whole = render(lm.tokenizer, messages)
    for length in range(len(whole.ids) // 2, len(whole.ids), 7):
        cut = render(lm.tokenizer, messages, length)
        text = lm.tokenizer.decode(cut.ids)
        assert len(cut.ids) == len(cut.mask) == length and cut.truncated == len(whole.ids) - length
        assert ("Be brief." in text) == system and trained(lm, cut) == trained(lm, whole)
        asked = render_prompt(lm.tokenizer, messages, length)
        assert len(asked) <= length and ("Be brief." in lm.tokenizer.decode(asked)) == system
    while True: # down to the last answer: an answer that the cut goes through is not trained, and there is never half a one
        length -= 1
        try: cut = render(lm.tokenizer, messages, length)
        except CompletionTooLong: break
        assert trained(lm, cut).replace(" ", "").replace("Firstanswer.", "", 1).count("answer.") == 1
    assert length < 60

@pytest.mark.parametrize("name", ALL)
def test_both_answers_of_a_pair_have_one_prompt(name):
    lm = clean(name)
    row = rows(knows_system(name))[1]
    row = row | {"rejected": [{"role": "assistant", "content": "I do not know, and I will not say more than this."}]}
    for length in (None, 70):
        chosen, rejected = render_pair(lm.tokenizer, row, length)
        start = chosen.mask.index(True)
        assert rejected.mask.index(True) == start and rejected.ids[:start] == chosen.ids[:start]
        assert row["messages"][-1]["content"] in trained(lm, chosen) and "will not say" in trained(lm, rejected) and "And why" not in trained(lm, chosen)
    if knows_system(name): assert chosen.truncated > 0
    with pytest.raises(CompletionTooLong): render_pair(lm.tokenizer, row, 12)

@pytest.mark.parametrize("name", ALL)
def test_packing_keeps_every_example_whole(name):
    lm = clean(name)
    made = [render_row(lm.tokenizer, o) for o in rows(knows_system(name))] + [render_text(lm.tokenizer, f"A text of {n} words.") for n in range(5)]
    made += [Rendered([7, 8, 9], [True, True, True])]
    blocks = pack(made, 128)
    assert sorted(i for b in blocks for i in b.examples) == list(range(len(made))) and blocks == pack(made, 128)
    for block in blocks:
        assert len(block.ids) == len(block.mask) == len(block.position_ids) == len(block.sequence_ids) <= 128
        for n, (i, a, b) in enumerate(zip(block.examples, block.boundaries, block.boundaries[1:])):
            assert block.ids[a:b] == made[i].ids and block.mask[a:b] == [False] + made[i].mask[1:]
            assert block.position_ids[a:b] == list(range(b - a)) and block.sequence_ids[a:b] == [n] * (b - a)
    assert show_tokens(blocks[0], lm.tokenizer).caption.startswith(f"{len(blocks[0].ids)} tokens")

def test_a_text_is_trained_whole_and_cut_at_its_end():
    tokenizer = clean("llama-3").tokenizer
    whole = render_text(tokenizer, "one two three")
    assert tokenizer.decode(whole.ids) == "<|begin_of_text|>one two three<|eot_id|>" and whole.mask == [False] + [True] * (len(whole.ids) - 1)
    for length in range(1, len(whole.ids) + 2):
        cut = render_text(tokenizer, "one two three", length)
        assert cut.ids == whole.ids[:length] and cut.mask == whole.mask[:length] and cut.truncated == max(0, len(whole.ids) - length)
    with pytest.raises(UserError, match="empty"): render_text(tokenizer, "")
