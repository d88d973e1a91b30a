"""Which models work: tiny random ones of many families, their dropout, loading, adapters, refusals."""

import contextlib
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import policy
from data import InputError
from extras.models import add_adapters, check_model, check_width, checkpoint_activations, prepare, resolve
from steps import plain_row
from test_policy import gradients

COMMON = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 2, "pad_token_id": 0}
HEADS = {"head_dim": 8}
EXPERTS = {**HEADS, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 16}
LATENT = {**EXPERTS, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4, "kv_lora_rank": 16,
          "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LINEAR = {**EXPERTS, "layer_types": ["linear_attention", "full_attention"] * 2,
          "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
          "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16}
WORKING = {
    "llama": {}, "qwen2": {}, "qwen3": HEADS, "mistral": {}, "ministral": HEADS, "phi": {}, "phi3": {},
    "gemma": HEADS, "gemma3_text": HEADS, "olmo": {}, "olmo2": {}, "olmo3": {}, "smollm3": {}, "gpt2": {},
    "gpt_neo": {"num_hidden_layers": 2, "attention_types": [[["global", "local"], 1]]}, "gpt_neox": {},
    "falcon": {}, "starcoder2": {}, "stablelm": {}, "biogpt": {}, "granite": {}, "glm4": HEADS,
    "mixtral": EXPERTS, "olmoe": EXPERTS, "qwen3_moe": EXPERTS, "gpt_oss": EXPERTS, "deepseek_v3": LATENT}
OTHERS = {  # refused, or as right as the others: which of the two may change with transformers
    "gemma2": HEADS, "cohere": {}, "mpt": {}, "falcon": {"alibi": True}, "qwen3_next": LINEAR,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "mamba": {"state_size": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48},
    "jamba": {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1}}
SLOW = pytest.mark.skipif(os.environ.get("R2RANK_SLOW") != "1", reason="slow: set R2RANK_SLOW=1")
FAMILIES = [pytest.param(name, settings, works, marks=[] if name == "llama" else SLOW)
            for works, families in ((True, WORKING), (False, OTHERS)) for name, settings in families.items()]

def build(name, settings, vocab_size):
    """A random model of a family; its weights are so large that a slip shows."""
    config = CONFIG_MAPPING[name](vocab_size=vocab_size, **COMMON | settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    for matrix in (p for p in model.parameters() if p.dim() > 1):
        torch.nn.init.normal_(matrix, std=0.3)
    return model

def differences(model, tokenizer, lengths=((9, 3, 6), (23, 2, 5, 1)), new=7):
    """Largest relative difference of sampled states, log-probabilities and gradients from the plain ones.
    lengths: of each list's prefix and suffixes, all in one call; the model scores as in training."""
    draws = [[torch.randint(3, len(tokenizer), (n,)).tolist() for n in sizes] for sizes in lengths]
    prompts = [policy.Prompt(draw[0], draw[1:]) for draw in draws]
    rollout = policy.sample_rows(model, tokenizer, prompts, 2, policy.Sampling(new))
    rows, states, _ = zip(*(plain_row(model.eval(), rollout, n) for n in range(len(rollout.owner))))
    want, expected = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), gradients(model, rollout)
    logprobs, _ = policy.all_logprobs(model.train(), rollout, 6)
    pairs = ((rollout.hidden, torch.stack(states)), (logprobs, want),
             (gradients(model, rollout, 6), expected))
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)

@pytest.mark.parametrize("name, settings, works", FAMILIES)
def test_a_family_scores_as_its_own_forward_pass_or_is_refused(tokenizer, name, settings, works):
    """Without and with gradient checkpointing."""
    model = build(name, settings, len(tokenizer))
    prepare(model)
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model)
        try:
            check_model(model, tokenizer, name)
        except InputError as error:
            assert f"models of type {name} do not work here" in str(error) and "\n" not in str(error)
            assert checkpointing or not works
            return
        assert differences(model, tokenizer) < 1e-4

@pytest.mark.parametrize("name, settings", [
    ("granite", {"logits_scaling": 8.0}), ("cohere", {}), ("gemma2", HEADS), ("phimoe", EXPERTS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_would_be_wrong_without_a_word_is_refused(tokenizer, name, settings, dtype):
    """Logits that are not the output layer's; experts that are drawn at random in train mode (PhiMoE)."""
    model = build(name, settings, len(tokenizer)).to(dtype)
    with pytest.raises(InputError, match=f"^--model folder: models of type {name} do not"):
        check_model(model, tokenizer, "folder")
    assert not model.training and all(p.grad is None for p in model.parameters())  # left as it was

@pytest.mark.parametrize("dtype, first, all_tokens, right", [
    (torch.float32, 0.0, 0.0, True), (torch.float32, 0.002, 0.0, False),
    (torch.bfloat16, 0.4, 0.0, True), (torch.bfloat16, 0.0, 0.4, False)])
def test_how_far_log_probabilities_may_be_off(tokenizer, monkeypatch, dtype, first, all_tokens, right):
    """In float32 no token may differ; in bfloat16 one may, but not all: improbable ones do."""
    def shifted(*arguments, real=policy.token_logprobs):
        logprobs, mask, hidden = real(*arguments)
        return logprobs + all_tokens + first * (torch.arange(mask.shape[1]) == 0), mask, hidden

    monkeypatch.setattr(policy, "token_logprobs", shifted)
    with contextlib.nullcontext() if right else pytest.raises(InputError, match="log-probabilities differ"):
        check_model(build("llama", {}, len(tokenizer)).to(dtype), tokenizer, "folder")

@pytest.mark.parametrize("settings, limit", [
    ({"max_position_embeddings": 40}, 40), ({"window_size": 40}, 40), ({"sliding_window": 40}, 40),
    ({"sliding_window": None}, 999), ({"sliding_window": 40, "layer_types": ["full_attention"] * 2}, 999),
    ({"sliding_window": 40, "layer_types": ["full_attention", "sliding_attention"]}, 40),
    ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 40}}, 40),
    ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 40}}, 999)])
def test_how_far_a_model_looks_back(settings, limit):
    """By limits of several names; a window that no layer has is none."""
    config = SimpleNamespace(**{"max_position_embeddings": 999} | settings)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    check_width(model, limit)
    with pytest.raises(InputError, match=f"{limit + 1} tokens are longer than the model's .* of {limit};"):
        check_width(model, limit + 1)

@pytest.mark.parametrize("name, rates", [
    ("gpt2", ["resid_pdrop", "embd_pdrop", "attn_pdrop"]),
    ("starcoder2", ["residual_dropout", "embedding_dropout", "attention_dropout"]),
    ("biogpt", ["hidden_dropout_prob", "attention_probs_dropout_prob", "layerdrop"]),
    ("falcon", ["attention_dropout", "hidden_dropout"])])  # read from the config in each pass
def test_no_dropout_under_any_name(tokenizer, tmp_path, name, rates):
    """A folder's config asks for it; once loaded, the model scores in train mode as in eval mode."""
    published = build(name, dict.fromkeys(rates, 0.1), len(tokenizer))
    published.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    row = policy.Rollout([policy.Prompt(list(range(9)), [[9, 10, 11]])], 1, [list(range(12, 20))])
    want, noisy = (plain_row(published.train(training), row, 0)[0] for training in (False, True))
    assert not torch.allclose(noisy, want, atol=1e-2)
    model, _ = policy.load(str(tmp_path))
    for training in (True, True, False):
        (got,), _ = policy.all_logprobs(model.train(training), row)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)

def test_model_names(tmp_path):
    for full in ("Qwen/Qwen2.5-1.5B", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        assert resolve(full) == resolve(full.split("/")[1]) == full
    for wrong in ("./none", "nosuchfamily-1b", str(tmp_path), "a/b/c"):
        with pytest.raises(InputError, match="--model"):
            resolve(wrong)
    for content in ("{}", "no json", '{"model_type": "llama"}', '{"model_type": "t5"}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match=r"^.*cannot load.*\Z"):  # in one line
            policy.load(str(tmp_path))

def test_adapters_start_as_nothing_train_alone_and_merge(tokenizer, monkeypatch):
    model = build("llama", {}, len(tokenizer))
    with monkeypatch.context() as missing, pytest.raises(InputError, match="pip install peft"):
        missing.setitem(sys.modules, "peft", None)
        add_adapters(model, 4)
    pytest.importorskip("peft")
    ids, frozen = torch.tensor([[5, 6, 7, 8]]), list(model.parameters())
    before, wrapper = model(ids).logits, add_adapters(model, 4)
    assert torch.equal(model(ids).logits, before) and not any(p.requires_grad for p in frozen)
    for adapter in (p for p in model.parameters() if p.requires_grad):
        assert adapter.dtype == torch.float32
        torch.nn.init.normal_(adapter, std=0.1)
    assert differences(model, tokenizer) < 1e-4  # gradients of the adapters only
    want = model.eval()(ids).logits
    torch.testing.assert_close(wrapper.merge_and_unload()(ids).logits, want)
