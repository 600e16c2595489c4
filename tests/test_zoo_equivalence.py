"""Planted bugs that the equivalence certificate must catch, and clean models of every family that it must pass.

`pytest -s` prints how far each is from the limit: 1 is the limit, bugs must be above and clean models below."""
import copy
from dataclasses import replace
from functools import lru_cache
import pytest, torch
from conftest import DOCSTRINGS, few
from llmops_kit.data.examples import load_examples
from llmops_kit.models.families import FAMILIES, random_lm
from llmops_kit.models.load import load_model, shared_copy
from llmops_kit.models.merge import adapter_of, merge_adapter, put_on, save_lm
from llmops_kit.runs.errors import UserError
from llmops_kit.training.adapters import add_lora
from llmops_kit.training.equivalence import equivalence

pytest.importorskip("bitsandbytes")
QUICK = dict(positions=120, prompts=2, max_new_tokens=8)

@lru_cache
def rows(): return [*load_examples(DOCSTRINGS).validation.select(range(12))]

def trained(base, variant="lora", size=0.05, seed=0):
    "An adapter with random weights of about the size that training gives."
    torch.manual_seed(seed)
    lm = add_lora(base, 4, 8, 0.0, "all-linear", variant)
    with torch.no_grad():
        for name, p in lm.model.named_parameters():
            if "lora_B" in name: p.normal_(0, size)
            if "magnitude" in name: p.mul_(1 + 0.02*torch.randn_like(p))
    lm.model.eval()
    return lm

def certified(label, lm, **forms):
    found = equivalence(lm, rows(), **(forms or {}), **QUICK)
    print(f"{label:38} {'passed' if found.passed else 'FAILED'}  measured/allowed {found.value:.3g}")
    return found

# --- clean controls

@pytest.mark.parametrize("family", few(FAMILIES, ["llama", "qwen3_moe"]))
def test_every_family_and_variant_passes(family):
    base = random_lm(family)
    for variant in ("lora", "rslora", "dora"):
        try: lm = trained(base, variant)
        except UserError as refused:
            print(f"{family} {variant}: refused, {refused}")
            continue
        formats = ("fp32", "bf16", "int8", "nf4") if variant == "lora" and family != "qwen3_moe" else ("fp32",)
        found = certified(f"{family} {variant}", lm, formats=formats)
        assert found.passed, found.details

@pytest.mark.parametrize("name, value", few([("quantize", "nf4"), ("quantize", "int8"), ("dtype", "bfloat16")], [("quantize", "nf4")]))
def test_quantized_bases_and_bf16_pass(name, value):
    found = certified(f"tiny on {value}", trained(load_model("tiny", **{name: value}), size=0.02), formats=("fp32", "int8"))
    assert found.passed, found.details

# --- planted bugs

@pytest.fixture(scope="module")
def lm(): return trained(random_lm("llama"))

def scaled(lm, factor):
    wrong, base = merge_adapter(lm), lm.base.model.state_dict()
    with torch.no_grad():
        for name, p in wrong.model.named_parameters(): p.copy_(base[name] + factor*(p - base[name]))
    return wrong

def changed_folder(lm, tmp_path, change):
    "The merged model, saved, its folder spoilt, and loaded again."
    change(folder := save_lm(merge_adapter(lm), tmp_path/"saved"))
    return load_model(str(folder))

def through_bf16(lm, tmp_path): return load_model(str(save_lm(merge_adapter(lm), tmp_path/"bf16", "bf16")))

def wrong_base(lm, tmp_path):
    return merge_adapter(put_on(random_lm("llama", seed=1), *adapter_of(lm)))

def almost_the_base(lm, tmp_path):
    other = copy.deepcopy(lm.base.model)
    with torch.no_grad(): other.model.layers[1].self_attn.o_proj.weight.mul_(1.001)
    return merge_adapter(put_on(replace(lm.base, model=other), *adapter_of(lm)))

def one_layer_forgotten(lm, tmp_path):
    wrong = merge_adapter(lm)
    with torch.no_grad(): wrong.model.model.layers[1].mlp.down_proj.weight.copy_(lm.base.model.model.layers[1].mlp.down_proj.weight)
    return wrong

def transposed(lm, tmp_path):
    wrong = merge_adapter(lm)
    with torch.no_grad():
        p = wrong.model.model.layers[0].self_attn.q_proj.weight
        p.copy_(p.T.clone())
    return wrong

def lost_embedding(lm, tmp_path):
    wrong = merge_adapter(lm)
    used = {i for row in rows() for m in row["messages"] for i in lm.tokenizer(m["content"])["input_ids"]}
    with torch.no_grad(): wrong.model.get_input_embeddings().weight[next(i for i in range(300, 4096) if i not in used)] = 0
    return wrong

def truncated_vocabulary(lm, tmp_path):
    wrong = merge_adapter(lm)
    wrong.model.resize_token_embeddings(4000)
    return wrong

def padded_vocabulary(lm, tmp_path):
    wrong = merge_adapter(lm)
    wrong.model.resize_token_embeddings(4160)
    return wrong

def lost_end_token(lm, tmp_path):
    wrong = merge_adapter(lm)
    wrong.model.generation_config = copy.deepcopy(wrong.model.generation_config)
    wrong.model.generation_config.eos_token_id = 7
    return wrong

def other_end_token_in_folder(lm, tmp_path):
    def change(folder):
        path = folder/"tokenizer_config.json"
        path.write_text(path.read_text().replace('"eos_token": "<|end|>"', '"eos_token": "<|pad|>"'))
    return changed_folder(lm, tmp_path, change)

def other_template(lm, tmp_path):
    return changed_folder(lm, tmp_path, lambda folder: (folder/"chat_template.jinja").write_text((folder/"chat_template.jinja").read_text().replace("<|assistant|>{% gen", "<|assistant|> {% gen")))

def template_gone(lm, tmp_path):
    return changed_folder(lm, tmp_path, lambda folder: (folder/"chat_template.jinja").unlink())

PLANTS = {"adapter lost (base saved)": lambda lm, _: scaled(lm, 0), "merged twice": lambda lm, _: scaled(lm, 2), "scale alpha/r ignored": lambda lm, _: scaled(lm, 0.5),
          "merged with the wrong sign": lambda lm, _: scaled(lm, -1), "saved in bf16 as fp32": through_bf16, "wrong base": wrong_base, "a base 0.1 % off in one matrix": almost_the_base,
          "one layer forgotten": one_layer_forgotten, "square matrix transposed": transposed, "a token's embedding lost": lost_embedding, "vocabulary truncated": truncated_vocabulary,
          "vocabulary padded": padded_vocabulary, "end token lost in generation settings": lost_end_token, "another end token in the folder": other_end_token_in_folder,
          "another chat template": other_template, "chat template gone": template_gone}

# one of each kind
SHORT = {"scale alpha/r ignored", "saved in bf16 as fp32", "a base 0.1 % off in one matrix", "one layer forgotten", "a token's embedding lost", "vocabulary truncated",
         "end token lost in generation settings", "another end token in the folder", "another chat template"}

@pytest.mark.parametrize("bug", few(PLANTS, SHORT))
def test_planted_bug_is_caught(bug, lm, tmp_path):
    format = "fp32" if "folder" in bug or "template" in bug or "fp32" in bug else "merged"
    found = certified(bug, lm, forms={format: PLANTS[bug](lm, tmp_path)})
    assert found.passed is False and found.value > 1, found.details
    assert all(o["verdict"] == "passed" for o in found.details[:2])  # what it is compared with is in order

def test_adapter_that_does_nothing(lm):
    torch.manual_seed(0)
    untrained = add_lora(lm.base, 4, 8, 0.0)
    untrained.model.eval()
    found = certified("adapter that does nothing", untrained)
    assert not found.passed and "does nothing" in found.about

def test_base_changed_in_place(tmp_path):
    "peft merges into the weights it is given: over a shared base, the base is not the base any more."
    base = random_lm("llama", folder=tmp_path/"base")
    lm = trained(base)
    adapter = adapter_of(lm)
    lm.model.merge_and_unload()
    found = certified("base changed in place", put_on(base, *adapter))
    assert not found.passed and "not those of its files" in found.about

def test_adapter_over_another_model_than_its_base(lm):
    found = certified("over another model than its base", replace(lm, base=random_lm("llama", seed=1)), forms={"merged": merge_adapter(lm)})
    assert found.details[1]["verdict"] == "FAILED"

QUANTIZED = {"adapter lost": 0, "merged twice": 2, "wrong sign": -1}

@pytest.mark.parametrize("bug, format", few([(o, f) for o in QUANTIZED for f in ("int8", "nf4")], [("adapter lost", "int8"), ("merged twice", "nf4"), ("wrong sign", "nf4")]))
def test_bug_under_quantization_noise(bug, format, lm, tmp_path):
    "Also where four bits cost more than the adapter changes."
    wrong = load_model(str(save_lm(scaled(lm, QUANTIZED[bug]), tmp_path/format, format)))
    found = certified(f"{bug}, {format}", lm, forms={format: wrong})
    assert not found.passed, found.details

def test_adapter_of_nf4_base_rounded_away_by_nf4():
    "Not planted: what rounding to the grid that the base is already on does to a small adapter."
    found = certified("trained over nf4, merged, nf4 again", trained(load_model("tiny", quantize="nf4"), size=0.02), formats=("nf4",))
    assert [o["verdict"] for o in found.details] == ["passed", "passed", "passed", "FAILED"] and found.details[-1]["effect"] < 0.5
