"Quantized bases, merging, several adapters, and the convert job's folders."
import sys
from dataclasses import replace
import pytest, torch
from conftest import few
from llmops_kit.models.families import FAMILIES, random_lm
from llmops_kit.models.load import load_adapter, load_model, shared_copy
from llmops_kit.models.merge import FORMATS, combine_adapters, dequantized, merge_adapter, save_lm
from llmops_kit.models.quantize import quantized_share
from llmops_kit.runs.artifacts import sha256_of
from llmops_kit.runs.errors import UserError
from llmops_kit.training.adapters import add_lora
from llmops_kit.training.checkpoints import save_adapter
from llmops_kit.training.loss import token_nll
from llmops_kit.training.batching import collate

pytest.importorskip("bitsandbytes")
IDS = list(range(20, 60))

def logits(lm):
    with torch.no_grad(): return lm.model(input_ids=torch.tensor([IDS])).logits.float()

def trained(base, seed=0, **settings):
    torch.manual_seed(seed)
    lm = add_lora(base, 4, 8, 0.0, **settings)
    with torch.no_grad():
        for name, p in lm.model.named_parameters():
            if "lora_B" in name: p.normal_(0, 0.05)
    lm.model.eval()
    return lm

@pytest.fixture(scope="module")
def folders(tmp_path_factory): return {o: tmp_path_factory.mktemp(o) for o in FAMILIES}

@pytest.mark.parametrize("family", few(FAMILIES, ["llama", "gpt2", "qwen3_moe"]))
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_adapter_over_quantized_base(family, quantize, folders, tmp_path):
    "Trains, keeps its gradients after use without them, is saved, loaded and merged; the head and the embedding stay as they are."
    random_lm(family, folder=folders[family])
    base = load_model(str(folders[family]), quantize=quantize)
    assert base.quantize == quantize and base.parameters == random_lm(family).parameters and 0 < quantized_share(base.model) < 1
    assert base.model.get_output_embeddings().weight.dtype == base.model.get_input_embeddings().weight.dtype == torch.float32
    lm, before = trained(base), logits(base)
    batch = collate([dict(ids=IDS, mask=[True]*len(IDS))], 0)
    def gradients():
        lm.model.train().zero_grad()
        torch.manual_seed(0) # GPT-2 has dropout of its own
        token_nll(lm.model, batch).mean().backward()
        lm.model.eval()
        return torch.cat([p.grad.flatten() for p in lm.model.parameters() if p.grad is not None])
    first = gradients()
    logits(lm)
    assert torch.equal(first, gradients()) and first.norm() > 0
    assert torch.equal(logits(base), before) # the base is still the base
    save_adapter(lm, tmp_path/"adapter", dict(name=base.name, sha256=base.artifact.sha256))
    assert torch.equal(logits(load_adapter(str(tmp_path/"adapter"), base)), logits(lm))
    merged = merge_adapter(lm)
    assert merged.quantize == "none" and "written out" in merged.warnings[-1]
    effect, error = (logits(lm) - before).norm(), (logits(merged) - logits(lm)).norm()
    assert error < 0.2*effect if quantize == "int8" else error < 1e-3*effect # int8 also rounds what goes into a matrix

def test_written_out_gpt2_keeps_the_direction_of_its_square_matrices(tmp_path):
    base = random_lm("gpt2")
    again = load_model(str(save_lm(base, tmp_path/"nf4", "nf4")))
    plain = dequantized(again)
    saved = load_model(str(save_lm(plain, tmp_path/"plain")))
    assert torch.allclose(logits(saved), logits(again), atol=1e-5) and not torch.allclose(logits(again), logits(base), atol=1e-5)

def test_missing_library_is_named(monkeypatch, tmp_path):
    save_lm(random_lm("llama"), tmp_path/"int8", "int8")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for call in (lambda: load_model("tiny", quantize="nf4"), lambda: load_model(str(tmp_path/"int8"))):
        with pytest.raises(UserError, match=r"pip install 'llmops_kit\[quant\]'"): call()

@pytest.mark.parametrize("format", FORMATS)
def test_saved_formats(format, tmp_path):
    if format == "torchao-int8": pytest.importorskip("torchao")
    lm = merge_adapter(trained(random_lm("qwen3")))
    first, second = (save_lm(lm, tmp_path/o, format) for o in "ab")
    assert sha256_of(first) == sha256_of(second)
    again = load_model(str(first))
    assert again.quantize == (format if format not in ("fp32", "bf16") else "none")
    assert (first/"generation_config.json").exists() and (first/"README.md").read_text().startswith("---\n")
    if format == "fp32": assert torch.equal(logits(again), logits(lm))
    with pytest.raises(UserError, match="already|adapter"): save_lm(again if again.quantize != "none" else trained(random_lm("llama")), tmp_path/"c", "int8")

def test_nothing_to_quantize_is_refused(tmp_path):
    pytest.importorskip("torchao")
    with pytest.raises(UserError, match="linear layers"): save_lm(random_lm("gpt2"), tmp_path/"gpt2", "torchao-int8")

def test_experts_stay_unquantized_and_it_says_so(tmp_path):
    random_lm("qwen3_moe", folder=tmp_path)
    assert any("experts" in o for o in load_model(str(tmp_path), quantize="nf4").warnings)

@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weighted_sum_of_adapters(family):
    base = random_lm(family)
    one, two = trained(base, 1), trained(base, 2, variant="rslora")
    both = merge_adapter(combine_adapters(base, [one, two], [0.7, -0.4])).model.state_dict()
    parts, plain = [merge_adapter(o).model.state_dict() for o in (one, two)], base.model.state_dict()
    for name, p in plain.items():
        wanted = p + 0.7*(parts[0][name] - p) - 0.4*(parts[1][name] - p)
        assert torch.allclose(both[name], wanted, atol=1e-5), name
    assert torch.equal(logits(base), logits(replace(base, model=shared_copy(base.model))))

def test_refusals():
    base = random_lm("llama")
    with pytest.raises(UserError, match="no adapter"): merge_adapter(base)
    with pytest.raises(UserError, match="another base"): combine_adapters(base, [trained(random_lm("llama", seed=1))])
    with pytest.raises(UserError, match="Did you mean ties"): combine_adapters(base, [trained(base)], method="tie")
    with pytest.raises(UserError, match="2 adapters and 1 weights"): combine_adapters(base, [trained(base), trained(base, 1)], [1.0])
    with pytest.raises(UserError, match="experts"): combine_adapters(experts := random_lm("qwen3_moe"), [trained(experts)])
    broken = trained(base)
    with torch.no_grad(): next(p for n, p in broken.model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(UserError, match="cannot be merged"): merge_adapter(broken)
