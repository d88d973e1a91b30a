"""A small card: the optimizer in the host's memory, adapters, and the estimate of what a run will need."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers

import policy
import train
from data import InputError
from test_policy import plain_logprobs, prompts, rows  # noqa: F401
from test_resume import harness, same  # noqa: F401
from test_train import ROOT, run

FLAGS = ["--sft-steps", "3", "--sft-lists", "2", "--steps", "4", "--batch-lists", "2", "--group-size", "2", "--num-candidates", "6", "--eval-lists", "2",
         "--max-new-tokens", "8", "--save-every", "2", "--kl-coef", "0.1", "--warmup-steps", "1"]


# --- the optimizer in the host's memory ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_optimizer_is_the_plain_one_and_loads_its_state(dtype):
    """To the last bit, over steps with and without clipping and with parameters that have no gradient; states are the same tensors."""
    def fresh(offload):
        torch.manual_seed(0)
        layers = torch.nn.ModuleList([torch.nn.Linear(8, 8, dtype=dtype), torch.nn.Linear(8, 8, dtype=dtype), torch.nn.Linear(8, 1)])
        return layers, train.Optimizer([{"params": list(layers[:2].parameters()), "lr": 1e-2}, {"params": list(layers[2].parameters()), "lr": 1e-1}], offload)

    def steps(layers, optimizer, numbers):
        norms = []
        for n in numbers:
            for x in (1.0, -0.3):  # two backward passes: gradients add up in float32
                h = layers[0](torch.full((2, 8), x * n, dtype=dtype))
                (layers[2]((h if n % 2 else layers[1](h)).float())**2).sum().backward()
            assert {p.grad is None for p in layers.parameters() if p.dtype == torch.bfloat16} <= {True}
            norms.append(optimizer.step(rate=n / 5))
        return norms

    (plain, a), (offloaded, b) = fresh(False), fresh(True)
    equal = lambda x, y: all(torch.equal(p, q) for p, q in zip(x.parameters(), y.parameters()))
    assert steps(plain, a, range(1, 4)) == steps(offloaded, b, range(1, 4)) and equal(plain, offloaded)
    states = [{k: v.clone() for k, v in o.tensors().items()} for o in (a, b)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    steps(plain, a, range(4, 7))
    for offload in (False, True):  # either state goes on under either optimizer
        other, resumed = fresh(offload)
        other.load_state_dict(offloaded.state_dict())
        for (_, master), p in zip(resumed.pairs, [p for p in other.parameters() if offload or p.dtype != torch.float32]):
            master.data.copy_(p)  # main() loads the weights before it makes the optimizer
        resumed.load(states[not offload])
        steps(other, resumed, range(4, 7))
        assert equal(plain, other)


def test_what_sums_an_offloaded_gradient_has_no_memory_and_is_summed_over_processes(monkeypatch):
    weight = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    optimizer = train.Optimizer([{"params": [weight], "lr": 0.1}], offload=True)
    assert optimizer.sums[0].untyped_storage().nbytes() == 4 and optimizer.sums[0].shape == weight.shape
    (3 * weight).sum().backward()
    assert weight.grad is None and optimizer.sums[0].grad.dtype == torch.float32
    monkeypatch.setattr(train, "world", lambda: 2)
    monkeypatch.setattr(train, "gather", lambda items: items * 2)
    monkeypatch.setattr(train.dist, "all_reduce", lambda x: x.mul_(2))
    assert optimizer.step() == pytest.approx(6 * 6**0.5)
    assert optimizer.sums[0].grad is None and optimizer.pairs[0][1].grad is None and weight.unique().item() < 1


# --- adapters ---


@pytest.fixture
def adapted(model_and_tokenizer):
    """A tiny model with adapters that do something."""
    pytest.importorskip("peft")
    model = copy.deepcopy(model_and_tokenizer[0])
    policy.add_adapters(model, 4)
    torch.manual_seed(0)
    for x in policy.adapters(model).values():
        torch.nn.init.normal_(x, std=0.1)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_adapters_equal_the_plain_backward(adapted, model_and_tokenizer, rows, checkpointing):  # noqa: F811
    prefixes, owner, suffixes, responses = rows
    beneath = {k.replace(".base_layer", ""): v for k, v in adapted.state_dict().items() if ".lora_" not in k}
    assert all(torch.equal(v, beneath[k]) for k, v in model_and_tokenizer[0].state_dict().items())
    for n in range(len(owner)):
        logprobs, hidden = plain_logprobs(adapted, prefixes[owner[n]], suffixes[n], responses[n])
        (logprobs.sum() + hidden.tanh().sum()).backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    linear = sum(isinstance(m, torch.nn.Linear) for m in model_and_tokenizer[0].model.layers.modules())
    assert len(trained) == 2 * linear and all(".layers." in name and p.dtype == torch.float32 for name, p in trained.items())
    want = {name: p.grad.clone() for name, p in trained.items()}
    adapted.zero_grad()
    if checkpointing:
        policy.checkpoint_activations(adapted.train())
    for prefix, local, part in policy.micro_batches(adapted, prefixes, owner, suffixes, responses, 3):
        logprobs, _, hidden = policy.row_logprobs(prefix, local, [suffixes[n] for n in part], [responses[n] for n in part])
        (logprobs.sum() + hidden.tanh().sum()).backward()
    for name, p in trained.items():
        assert (p.grad - want[name]).norm() / want[name].norm() < 1e-4, name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_adapters_are_saved_apart_and_merged_at_the_end(adapted, model_and_tokenizer, tmp_path, dtype, tolerance):
    ids, tokenizer = torch.arange(5, 45)[None], model_and_tokenizer[1]
    for name, p in adapted.named_parameters():
        p.data = p.data if ".lora_" in name else p.data.to(dtype)
    with torch.no_grad():
        want = adapted(ids).logits
        policy.save_model(adapted, tmp_path), tokenizer.save_pretrained(tmp_path)
        again, _ = policy.load(str(tmp_path), dtype=dtype)
        assert torch.equal(again(ids).logits, want)
        without = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert (without(ids).logits - want).abs().max() > 1  # for others the file is the model beneath
        policy.merge_adapters(again)
        policy.save_model(again, tmp_path / "merged")
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
        assert not (tmp_path / "merged" / policy.ADAPTERS).exists() and not policy.adapters(again)
        assert (merged(ids).logits - want).abs().max() < tolerance * want.abs().max()


def test_the_reference_shares_what_is_frozen_and_stays(adapted, tmp_path):
    run_ = train.Run(tmp_path / "r", train.argparse.Namespace(save_every=1, keep=1))
    run_.model, ids = adapted, torch.arange(5, 45)[None]
    reference = train.frozen_reference(run_, train.argparse.Namespace(lora=4))
    with torch.no_grad():
        before = adapted(ids).logits
    base = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    optimizer = train.Optimizer([{"params": list(adapted.parameters()), "lr": 1e-2}])
    adapted(ids).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    run_.stage = "rl"  # a resumed run finds the same
    for model in (reference, train.frozen_reference(run_, train.argparse.Namespace(lora=4))):
        with torch.no_grad():
            assert torch.equal(model(ids).logits, before) and (adapted(ids).logits - before).abs().max() > 1e-3
        assert not any(p.requires_grad for p in model.parameters())
        for (name, p), q in zip(adapted.named_parameters(), model.parameters()):
            assert (p.data_ptr() == q.data_ptr()) == (".lora_" not in name)
    assert all(torch.equal(p, base[name]) for name, p in adapted.named_parameters() if name in base)


def test_without_peft_it_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="pip install peft"):
        policy.add_adapters(model, 4)


def test_a_run_with_adapters_goes_on_with_the_optimizer_offloaded(harness, tmp_path):  # noqa: F811
    """A killed run, resumed with --offload-optimizer and --gradient-checkpointing, which have no meaning: the same numbers; and what it
    leaves is an ordinary checkpoint, whose weights beneath the adapters did not change until they were merged."""
    pytest.importorskip("peft")
    whole, out = tmp_path / "whole", tmp_path / "r"
    assert harness([*FLAGS, "--lora", 4, "--out", whole])[0] == 0
    assert harness([*FLAGS, "--lora", 4, "--out", out], 300, out / "states/2-rl-000002/training.json")[0] is None
    state = max((out / "states").glob("2-rl-00000[0-9]"))
    base = transformers.AutoModelForCausalLM.from_pretrained(state)
    run("eval.py", "--run", out, "--eval-lists", 2, "--out", tmp_path / "eval.json")
    assert "rl" in json.loads((tmp_path / "eval.json").read_text())["systems"]
    assert "--lora 4 -> 8" in run("train.py", "--resume", out, "--lora", 8, code=2).stderr
    assert harness(["--resume", out, "--offload-optimizer", "--gradient-checkpointing"])[0] == 0
    same(whole, out)
    final = transformers.AutoModelForCausalLM.from_pretrained(out / "checkpoint").state_dict()
    assert not (out / "checkpoint" / policy.ADAPTERS).exists()
    for name, x in base.state_dict().items():
        assert torch.equal(x, final[name]) == ("_proj.weight" not in name)


# --- the estimate ---


def small_model(heads):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=3000, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
                                      num_key_value_heads=heads, max_position_embeddings=512)
    model = transformers.LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer._can_checkpoint_with_cache = True
    return model


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_counts_what_torch_allocates(heads, checkpointing):
    """Against what torch's allocator gives out and takes back, by the profiler's record of it, in an update on the very rows."""
    shape, lengths = (1, 3, 2), (50, 12, 20)
    prefixes, owner, suffixes, responses = train.blank_rows(*shape, lengths)
    real, blank = small_model(heads).train(), small_model(heads).to("meta")
    policy.checkpoint_activations(real, checkpointing)
    for p in [*real.parameters(), *blank.parameters()]:
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with torch.profiler.profile(profile_memory=True) as profile:
        for prefix, local, part in policy.micro_batches(real, prefixes, owner, suffixes, responses, 4):
            logprobs, _, hidden = policy.row_logprobs(prefix, local, [suffixes[n] for n in part], [responses[n] for n in part])
            (logprobs.sum() + hidden.sum()).backward()
    now = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"):
        now, peak = now + size, max(peak, now + size)
    assert sum(train.update_memory(blank, None, shape, lengths, 4, checkpointing)) == pytest.approx(peak, rel=0.05)


def test_the_estimate_counts_keys_and_values_of_a_rollout():
    """Layers x (keys and values) x heads x dimensions x 4 bytes a token: of 2 prefixes, 6 suffixes but for their last tokens, and 12
    rows with room for their responses; and the ids and mask of the prompts."""
    kept, rest = train.sampling_memory(small_model(2).to("meta"), (2, 3, 2), (50, 12, 20), 320)
    assert kept == 3 * 2 * 2 * 16 * 4 * (2 * 50 + 6 * 11 + 12 * 21) + 2 * 8 * 12 * (50 + 12) and rest > 12 * 3000 * 4
    assert train.sampling_memory(small_model(2).to("meta"), (2, 3, 2), (50, 12, 20), 6)[0] == pytest.approx(kept / 2, rel=0.01)


def test_the_estimate_meets_a_measured_peak(tmp_path):
    """Peak resident memory of a run in a process of its own."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs /proc")
    flags = ["--sft-steps", "0", "--steps", "2", "--batch-lists", "2", "--eval-lists", "8", "--warmup-steps", "1", "--max-new-tokens", "40"]
    code = ("import sys; sys.path.insert(0, sys.argv.pop(1)); import train; train.main(); sys.stdout = sys.__stdout__\n"
            "print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 2**20)")
    out = subprocess.run([sys.executable, "-c", code, str(ROOT), *flags, "--out", str(tmp_path / "r")], capture_output=True, text=True, check=True)
    printed = run("train.py", *flags, "--dry-run", "--out", tmp_path / "never").stdout
    assert not (tmp_path / "never").exists()
    together = [float(line.split()[1]) for line in printed.splitlines() if line.startswith("together")]
    assert max(together) == pytest.approx(float(out.stdout.split()[-1]), rel=0.15)


QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768,
        "eos_token_id": 2, "bos_token_id": 1}  # Qwen2.5-1.5B


def test_what_a_card_needs_is_turned_on_and_no_more(toy, tokenizer, tmp_path, monkeypatch, capsys):
    """Qwen2.5-1.5B on a card of 24 GB; then, to save time, a seventh of its layers on cards that hold a little more or less than is needed."""
    tokenizer.save_pretrained(tmp_path)

    def chosen(layers, gigabytes, *flags):
        (tmp_path / "config.json").write_text(json.dumps(QWEN | {"num_hidden_layers": layers}))
        monkeypatch.setattr(train, "room_on", lambda device: gigabytes * train.GB)
        monkeypatch.setattr(sys, "argv", ["train.py", "--model", str(tmp_path), "--batch-lists", "1", *flags])
        args = train.parse_flags()
        train.fit_memory(args, toy, None, "cuda", torch.bfloat16)
        return args.gradient_checkpointing, args.offload_optimizer, capsys.readouterr().out

    *on, printed = chosen(28, 23.3)
    assert on == [True, True] and printed.count("\n") == 1 and "--gradient-checkpointing --offload-optimizer, turned on" in printed
    needed = []
    for flags in ((), ("--gradient-checkpointing",), ("--offload-optimizer",), ("--gradient-checkpointing", "--offload-optimizer")):
        need = [f"--no-{name}" for name in ("gradient-checkpointing", "offload-optimizer") if f"--{name}" not in flags]
        *on, printed = chosen(4, 0.1, *flags, *need)  # explicit flags win
        assert on == ["--gradient-checkpointing" in flags, "--offload-optimizer" in flags] and "more than the 0.1 GB" in printed
        needed.append(float(printed.split()[1]))
    assert needed[0] > max(needed[1:3]) and min(needed[1:3]) > needed[3]
    assert chosen(4, needed[0] + 0.1) == (False, False, "")
    assert chosen(4, needed[0] - 0.1)[:2] == (True, False)
    assert chosen(4, min(needed[1:3]) - 0.1)[:2] == (True, True)
    # On four processes with --parallel fsdp three quarters of 12 bytes a parameter are elsewhere, and nothing is offloaded.
    monkeypatch.setattr(train, "world", lambda: 4)
    *on, printed = chosen(4, 0.1, "--parallel", "fsdp", "--no-gradient-checkpointing")
    assert on == [False, None]
    size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path)).parameters())
    assert needed[0] - float(printed.split()[1]) == pytest.approx(9 * size / train.GB, abs=0.15)
