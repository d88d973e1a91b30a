"""Which models work: tiny random ones of many families, their dropout, loading, adapters, refusals."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import policy
from data import InputError
from extras.flags import run_main
from extras.models import add_adapters, check_model, checkpoint_activations, prepare, resolve

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
    "granite": {"logits_scaling": 8.0}, "gemma2": HEADS, "cohere": {}, "cohere2": {}, "bloom": {}, "mpt": {},
    "falcon": {"alibi": True}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mamba": {"state_size": 4}, "qwen3_next": LINEAR, "qwen3_5_text": LINEAR, "bert": {"is_decoder": True},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 256},
    "jamba": {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1}}
FAMILIES = [pytest.param(name, settings, works, marks=[] if name == "llama" else pytest.mark.slow)
            for works, families in ((True, WORKING), (False, OTHERS)) for name, settings in families.items()]


def build(name, settings, vocab_size):
    """A random model of a family; its weights are so large that a slip shows."""
    config = CONFIG_MAPPING[name](vocab_size=vocab_size, **COMMON | settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def plain(model, start, response):
    """Log-probabilities (T,) and last state (D,) by the model's own forward pass."""
    out = model(torch.tensor([start + response]), output_hidden_states=True)
    logprobs = out.logits[0, len(start) - 1:-1].log_softmax(-1)
    return logprobs[torch.arange(len(response)), response], out.hidden_states[-1][0, -1]


def differences(model, tokenizer, lengths=((9, 3, 6), (23, 2, 5, 1)), new=7):
    """Largest relative difference of sampled states, log-probabilities and gradients from the plain ones.

    lengths: of each list's prefix and suffixes, all in one call; the model samples and scores as in training.
    """
    draws = [[torch.randint(3, len(tokenizer), (n,)).tolist() for n in sizes] for sizes in lengths]
    prompts = [policy.Prompt(draw[0], draw[1:]) for draw in draws]
    rollout = policy.sample_rows(model, tokenizer, prompts, 2, policy.Sampling(new))
    starts = [rollout.prefixes[o] + s for o, s in zip(rollout.owner, rollout.suffixes)]
    found = [plain(model.eval(), start, r) for start, r in zip(starts, rollout.responses)]
    want = torch.nn.utils.rnn.pad_sequence([x for x, _ in found], batch_first=True)
    states, weights = torch.stack([h for _, h in found]), torch.linspace(-1, 1, len(found))
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = (weights * (want.sum(-1) + states.tanh().sum(-1))).sum()
    expected = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    model.zero_grad()
    logprobs = torch.zeros_like(want)
    for rows, some, mask, hidden in policy.micro_batches(model.train(), rollout, 6):
        logprobs[rows, :some.shape[1]] = some.detach()
        (weights[rows] * (some.sum(-1) + hidden.tanh().sum(-1))).sum().backward()
    got = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    gradients = [torch.nn.utils.parameters_to_vector(x) for x in (got, expected)]
    pairs = (rollout.hidden, states), (logprobs, want), gradients
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


@pytest.mark.parametrize("name, settings, works", FAMILIES)
def test_a_family_scores_as_its_own_forward_pass_or_is_refused(tokenizer, name, settings, works):
    """Without and with gradient checkpointing. What this prints (pytest -s) is the README's table."""
    model = build(name, settings, len(tokenizer))
    prepare(model)
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model)
        try:
            check_model(model, tokenizer, name)
        except InputError as error:
            print(f"\n| {name} | {checkpointing} | refused | {error} |")
            assert f"models of type {name} do not work here" in str(error) and "\n" not in str(error)
            assert checkpointing or not works
            return
        assert differences(model, tokenizer) < 1e-4
        print(f"\n| {name} | {checkpointing} | works | |")


@pytest.mark.parametrize("name, settings", [
    ("granite", {"logits_scaling": 8.0}), ("cohere", {}), ("gemma2", HEADS), ("phimoe", EXPERTS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_would_be_wrong_without_a_word_is_refused(tokenizer, name, settings, dtype, capsys):
    """Logits that are not the output layer's; experts that are drawn at random in train mode (PhiMoE)."""
    model = build(name, settings, len(tokenizer)).to(dtype)
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: check_model(model, tokenizer, "folder"))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and f"error: --model folder: models of type {name} do not" in line
    assert not model.training and all(p.grad is None for p in model.parameters())  # left as it was


@pytest.mark.parametrize("name, settings", [
    ("gpt_neo", {**WORKING["gpt_neo"], "window_size": 40}),  # what its local layers see
    ("phi3", {"original_max_position_embeddings": 40, "rope_parameters": {  # beyond, other angles
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 40,
        "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}})])
def test_rows_beyond_a_limit_of_another_name_are_refused(tokenizer, name, settings):
    model = build(name, settings, len(tokenizer))
    check_model(model, tokenizer, name)  # too few tokens to notice
    assert differences(model, tokenizer, [(20, 2, 12)], new=3) < 1e-4
    with pytest.raises(InputError, match="longer than the model's .* of 40"):
        differences(model, tokenizer, [(35, 2, 12)], new=3)


@pytest.mark.parametrize("name, rates", [
    ("gpt2", ["resid_pdrop", "embd_pdrop", "attn_pdrop"]),
    ("opt", ["dropout", "attention_dropout", "layerdrop"]),
    ("starcoder2", ["residual_dropout", "embedding_dropout", "attention_dropout"]),
    ("biogpt", ["hidden_dropout_prob", "attention_probs_dropout_prob", "layerdrop"])])
def test_no_dropout_under_any_name(tokenizer, tmp_path, name, rates):
    """A folder's config asks for it; once loaded, the model scores in train mode as in eval mode."""
    settings = {**WORKING, **OTHERS}[name] | dict.fromkeys(rates, 0.1)
    published = build(name, settings, len(tokenizer))
    published.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.randint(3, len(tokenizer), (20,)).tolist()
    want, noisy = (plain(published.train(training), ids[:12], ids[12:])[0] for training in (False, True))
    assert not torch.allclose(noisy, want, atol=1e-2)
    model, _ = policy.load(str(tmp_path))
    for training in (True, True, False):
        (got,), *_ = policy.token_logprobs(model.train(training), ids[:9], [ids[9:12]], [ids[12:]])
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_model_names(tmp_path):
    for full in ("Qwen/Qwen2.5-1.5B", "HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-3.2-3B"):
        assert resolve(full) == resolve(full.split("/")[1]) == full
    assert [resolve(name) for name in ("someone/model", "tiny")] == ["someone/model", "tiny"]
    for wrong in (str(tmp_path / "none"), "./none", "nosuchfamily-1b", str(tmp_path), "a/b/c"):
        with pytest.raises(InputError, match="--model"):
            resolve(wrong)
    for content in ("{}", "no json", '{"model_type": "llama"}', '{"model_type": "t5"}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match=r"^.*cannot load.*\Z"):  # in one line
            policy.load(str(tmp_path))


def test_a_saved_model_reads_and_scores_as_it_did(model, tokenizer, tmp_path):
    """Digits, markup and other scripts, too. Weights may also come from elsewhere: a run's state."""
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, again = policy.load(str(tmp_path))
    assert policy.stop_ids(loaded, again) == policy.stop_ids(model, tokenizer)
    (tmp_path / "model.safetensors").unlink()
    doubled, _ = policy.load(str(tmp_path), weights={k: 2 * v for k, v in model.state_dict().items()})
    for one, other, twice in zip(model.parameters(), loaded.parameters(), doubled.parameters()):
        assert torch.equal(one, other) and torch.equal(2 * one, twice)
    for text in ("kind mask 12, scent 0.\n<answer>no</answer>", "Café 2000 (4.5)", "日本 <|im_end|>\n\n"):
        ids = tokenizer(text).input_ids
        assert again(text).input_ids == ids
        assert torch.equal(loaded(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits)


def test_tiny_is_its_seed_and_keeps_rotary_frequencies_in_float32():
    models = [policy.load("tiny", texts=["soap"], seed=s, dtype=torch.bfloat16)[0] for s in (0, 0, 1)]
    first, again, other = (m.lm_head.weight for m in models)
    assert torch.equal(first, again) and not torch.equal(first, other) and first.dtype == torch.bfloat16
    assert models[0].model.rotary_emb.inv_freq.dtype == torch.float32


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
