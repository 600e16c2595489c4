"""Every family through adapters and full fine-tuning: the right layers get one, the loss falls, gradients are where they should be, and what is saved comes back."""
import copy, random, re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from conftest import few
from llmops_kit.models.families import FAMILIES, WINDOW, random_lm
from llmops_kit.models.load import load_adapter, load_model
from llmops_kit.runs.errors import UserError
from llmops_kit.training.adapters import add_lora, chosen_layers, layers_of, trained_layers
from llmops_kit.training.batching import collate, token_rows
from llmops_kit.training.checkpoints import save_adapter
from llmops_kit.training.loop import deterministic
from llmops_kit.training.loss import token_nll
from llmops_kit.training.sft import finetune

WORDS = "the of a file and returns name object value is for list key path with line error index count type".split()
ATTENTION = "q_proj,k_proj,v_proj,o_proj"
TARGETS = dict.fromkeys(FAMILIES, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}) | {
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}, "gpt2": {"c_attn", "c_proj", "c_fc"},
    "qwen3_moe": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}}
SMALL = dict(max_steps=6, eval_every=3, tokens_per_batch=256, lora_r=4, lora_dropout=0., precision="fp32")


def conversations(n, seed):
    rng = random.Random(seed)
    def text(low, high): return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))
    return [dict(id=str(i), messages=[dict(role="user", content=text(2, 60)), dict(role="assistant", content=text(1, 8))]) for i in range(n)]


EXAMPLES = SimpleNamespace(train=conversations(40, 1), validation=conversations(8, 2))


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)  # of adapters


@pytest.fixture(scope="module")
def bases(): return {family: random_lm(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    places = {family: tmp_path_factory.mktemp("families")/family for family in FAMILIES}
    for family, place in places.items(): random_lm(family, folder=place)
    return places


def batch_of(base, n=4):
    rows = token_rows(EXAMPLES.train[:n], base.tokenizer, base.max_length)
    return collate([rows[i] for i in range(n)], base.tokenizer.pad_token_id)


def logits(lm):
    with torch.no_grad(): return lm.model.eval()(**{k: v for k, v in batch_of(lm).items() if k != "labels"}).logits


def steps(lm, n=8, lr=3e-3):
    "A few plain steps; the losses, and the names of trained parameters that a gradient never reached."
    batch, losses = batch_of(lm), []
    parameters = {k: p for k, p in lm.model.named_parameters() if p.requires_grad}
    optimizer, unreached = torch.optim.AdamW(parameters.values(), lr=lr), set(parameters)
    lm.model.train()
    with deterministic(0):
        for _ in range(n):
            loss = token_nll(lm.model, batch).mean()
            loss.backward()
            unreached -= {k for k, p in parameters.items() if p.grad is not None and p.grad.any()}
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, unreached


def round_trip(lm, base, folder):
    "The adapter saved and loaded again on its base."
    return load_adapter(str(save_adapter(lm, folder, dict(name=base.name, sha256=base.artifact.sha256))), base)


# -- the models

@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_the_same_again_and_loads(family, bases, folders):
    base, loaded = bases[family], load_model(str(folders[family]))
    assert base.artifact.sha256 == random_lm(family).artifact.sha256 == loaded.artifact.sha256 and not base.model.training
    assert torch.equal(logits(base), logits(loaded))
    assert base.artifact.sha256 != random_lm(family, seed=1).artifact.sha256
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}


def reach(lm, at=0, n=60):
    "The positions whose logits change with the token at one position."
    ids = torch.arange(20, 20 + n)[None]
    other = ids.clone()
    other[0, at] = 100
    with torch.no_grad(): return ((lm.model(ids).logits - lm.model(other).logits).abs().amax(-1)[0] > 1e-6).nonzero()[:, 0].tolist()


def test_sliding_windows_are_there():
    assert reach(random_lm("mistral", layers=1)) == reach(random_lm("phi3", layers=1)) == list(range(WINDOW))
    assert reach(random_lm("llama", layers=1)) == list(range(60))
    kinds = random_lm("gemma3", layers=8).model.config.layer_types
    assert [i for i, o in enumerate(kinds) if o == "full_attention"] == [5, 7]


# -- where an adapter goes

@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_finds_every_matrix_in_the_blocks(family, bases):
    base = bases[family]
    lm = add_lora(base, 4)
    assert {o.name for o in chosen_layers(base)} == TARGETS[family]
    matrices = {re.sub(r"\.weight$", "", k) for k, p in base.model.named_parameters() if p.dim() > 1 and re.search(r"\.\d+\.", k)}  # whatever holds them
    routers = {o.path for o in layers_of(base.model) if o.kind == "router"}
    assert {o.path for o in chosen_layers(base)} == matrices - routers and len(routers) == (2 if family == "qwen3_moe" else 0)
    *rows, total = trained_layers(lm)
    assert sum(int(o["trained"].replace(",", "")) for o in rows) == int(total["trained"].replace(",", "")) == lm.model.num_parameters(only_trainable=True)
    assert {o["layer"] for o in rows} == TARGETS[family] and int(total["places"]) == len(matrices - routers)
    assert all("lora_" in k for k, p in lm.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family, variant", few([(o, v) for v in ("lora", "rslora", "dora") for o in FAMILIES],
                                                [("llama", "lora"), ("llama", "rslora"), ("llama", "dora"), ("gpt2", "dora"), ("qwen3_moe", "lora"), ("qwen3_moe", "dora")]))
def test_an_adapter_learns_and_comes_back(family, variant, bases, tmp_path):
    base = bases[family]
    before = logits(base)
    alpha = 16 if variant == "rslora" else 32  # 16/sqrt(4) is 32/4
    lm = add_lora(base, 4, alpha, target_modules=ATTENTION if (family, variant) == ("qwen3_moe", "dora") else "all-linear", variant=variant)
    assert torch.allclose(logits(lm), before, atol=1e-6)  # DoRA divides by the lengths it multiplies with
    losses, unreached = steps(lm)
    assert losses[-1] < losses[0] - 0.2 and not unreached
    assert torch.equal(logits(base), before)
    again = round_trip(lm, base, tmp_path)
    assert torch.equal(logits(again), logits(lm)) and not torch.allclose(logits(lm), before, atol=1e-3)


def test_the_scale_of_each_variant(bases):
    scales = {variant: next(o.scaling["default"] for o in add_lora(bases["llama"], 16, 32, variant=variant).model.modules() if isinstance(getattr(o, "scaling", None), dict))
              for variant in ("lora", "rslora", "dora")}
    assert scales == {"lora": 2., "rslora": 8., "dora": 2.}


def test_each_expert_learns_only_from_its_own_tokens(bases):
    lm = add_lora(bases["qwen3_moe"], 4, target_modules="gate_up_proj,down_proj")
    for p in lm.model.parameters():
        if p.requires_grad: torch.nn.init.normal_(p, std=0.1)
    routed = {}  # layer -> experts of the positions that the loss looks at
    for name, module in lm.model.named_modules():
        if name.endswith("mlp.experts"): module.register_forward_pre_hook(lambda module, args, name=name: routed.__setitem__(name, set(args[1][:-1].flatten().tolist())))
    batch = {k: v[:1, :3] for k, v in batch_of(lm).items()}
    batch["labels"] = batch["input_ids"].clone()
    token_nll(lm.model, batch).mean().backward()
    gradients = {k: p.grad for k, p in lm.model.named_parameters() if "experts.lora_A" in k}
    assert len(routed) == 2 == len(gradients)
    for (name, experts), gradient in zip(routed.items(), gradients.values()):
        reached = {i for i, o in enumerate(gradient.reshape(4, 4, -1)) if o.any()}
        assert reached == experts
    assert any(len(o) < 4 for o in routed.values())  # else the test could not fail


def test_what_peft_would_train_of_a_router_is_not_trained(bases):
    from peft import LoraConfig, get_peft_model
    theirs = get_peft_model(copy.deepcopy(bases["qwen3_moe"].model), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    def routers(model): return [k for k, p in model.named_parameters() if p.requires_grad and "mlp.gate.lora" in k]
    assert routers(theirs) and not routers(add_lora(bases["qwen3_moe"], 4).model)


@pytest.mark.parametrize("family, arguments, message", [
    ("qwen3_moe", dict(dropout=0.1), "experts of random_qwen3_moe cannot have dropout 0.1.*target_modules=q_proj,k_proj,v_proj,o_proj"),
    ("qwen3_moe", dict(variant="dora"), "cannot have DoRA.*Use lora or rslora"),
    ("qwen3_moe", dict(target_modules="gate"), "is the router"),
    ("qwen3", dict(target_modules=["q_proj", "lm_head"]), "are one matrix"),
    ("gemma3", dict(target_modules="embed_tokens"), "are one matrix"),
    ("gpt2", dict(target_modules="wte"), "are one matrix"),
    ("gpt2", dict(target_modules="q_proj"), "has no layer q_proj.*c_attn"),
    ("phi3", dict(target_modules="qkv_prj"), "Did you mean qkv_proj"),
    ("llama", dict(target_modules=""), "no layer without a name"),
    ("llama", dict(variant="lorra"), "Did you mean lora"),
])
def test_what_is_not_supported_is_said(family, arguments, message, bases):
    with pytest.raises(UserError, match=message): add_lora(bases[family], 4, **arguments)


def test_new_tokens_without_rows_are_refused(bases):
    tokenizer = copy.deepcopy(bases["llama"].tokenizer)
    tokenizer.add_tokens(["<|tool|>"])
    with pytest.raises(UserError, match="4097 tokens and its embedding 4096 rows"): add_lora(replace(bases["llama"], tokenizer=tokenizer))


def test_a_head_of_its_own_can_have_an_adapter(bases, tmp_path):
    lm = add_lora(bases["llama"], 4, target_modules="lm_head")
    losses, unreached = steps(lm)
    assert losses[-1] < losses[0] and not unreached
    assert torch.equal(logits(round_trip(lm, bases["llama"], tmp_path)), logits(lm))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_gets_an_adapter_and_its_whole_head(family, bases):
    config = copy.deepcopy(bases[family].model.config)
    config.num_labels = 3
    lm = add_lora(replace(bases[family], model=AutoModelForSequenceClassification.from_config(config).eval()), 4)
    rows = {o["layer"]: o["trained"] for o in trained_layers(lm)}
    assert rows.pop("score") == str(3*64) and set(list(rows)[:-1]) == TARGETS[family]
    batch = batch_of(lm)
    lm.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(p.grad.any() for k, p in lm.model.named_parameters() if p.requires_grad and ("lora_B" in k or "score" in k))


# -- quantized

@pytest.mark.parametrize("family, quantize", few([(o, q) for q in ("int8", "nf4") for o in FAMILIES], [("llama", "nf4"), ("gpt2", "int8"), ("qwen3_moe", "nf4")]))
def test_an_adapter_on_a_quantized_base(family, quantize, folders, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = load_model(str(folders[family]), quantize=quantize)
    before = logits(base)
    lm = add_lora(base, 4)
    assert {o.name for o in chosen_layers(base)} == TARGETS[family]
    losses, unreached = steps(lm)
    assert losses[-1] < losses[0] - 0.2 and not unreached
    assert torch.equal(logits(base), before)
    assert torch.equal(logits(round_trip(lm, base, tmp_path)), logits(lm))


def test_dora_over_int8_is_refused(folders):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match="Use lora or rslora, or quantize nf4"): add_lora(load_model(str(folders["llama"]), quantize="int8"), 4, variant="dora")


# -- the whole way

@pytest.mark.parametrize("family, method", few([(o, m) for m in ("lora", "full") for o in FAMILIES], [("llama", "lora"), ("gpt2", "full"), ("qwen3_moe", "lora")]))
def test_finetune(family, method, bases, tmp_path):
    base = bases[family]
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    tuned = finetune(base, EXAMPLES, folder=tmp_path/"checkpoints", method=method, lr=1e-2 if method == "lora" else 3e-3, **SMALL)
    assert tuned.metrics["validation/loss"] < tuned.metrics["base/loss"] - 0.2 and tuned.kind == {"lora": "adapter", "full": "model"}[method]
    assert all(torch.equal(v, before[k]) for k, v in base.model.state_dict().items())
    folder = str(tuned.save(tmp_path/"saved"))
    assert torch.equal(logits(load_adapter(folder, base) if method == "lora" else load_model(folder)), logits(tuned.lm))
    if method == "full":
        same = [k for k, v in tuned.lm.model.state_dict().items() if torch.equal(v, before[k])]
        assert not same and tuned.metrics["parameters/trained"] == base.parameters


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])  # dropout; experts
def test_finetune_twice_is_the_same(family, bases, tmp_path):
    first, second = (finetune(bases[family], EXAMPLES, folder=tmp_path/name, lr=1e-2, **SMALL | {"max_steps": 3}) for name in "ab")
    assert first.history and [{k: v for k, v in o.items() if not k.startswith("cost/")} for o in first.history] == [{k: v for k, v in o.items() if not k.startswith("cost/")} for o in second.history]
