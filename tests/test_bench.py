"""The arithmetic of tests/bench.py: FLOPs against PyTorch's own counter, the fit against planted and constrained solutions."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import bench
import policy


def counted(model, tokens, cache, predict):
    """FLOPs of reading tokens one by one, which computes no pair of positions in vain."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for token in tokens:
            hidden = model.model(torch.tensor([[token]]), use_cache=True, **policy._named(model, cache)).last_hidden_state
            if predict:
                model.lm_head(hidden)
    return counter.get_total_flops()


@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("share", (True, False))
def test_needed_flops_are_those_that_torch_counts(share, tied):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                         tie_word_embeddings=tied, attn_implementation="eager"))
    prefix, suffixes, G, new = 7, (2, 4, 3), 2, 5
    total, cached = 0, DynamicCache()
    if share:
        total += counted(model, range(prefix), cached, False)
    for s in suffixes:
        if share:
            candidate = DynamicCache(list((layer.keys.clone(), layer.values.clone()) for layer in cached.layers))
            total += counted(model, range(s), candidate, False)
        for _ in range(G):
            if share:
                row = DynamicCache(list((layer.keys.clone(), layer.values.clone()) for layer in candidate.layers))
            else:
                row = DynamicCache()
                total += counted(model, range(prefix + s), row, False)
            total += counted(model, range(new), row, True)
    args = SimpleNamespace(group_size=G, new_tokens=new, micro_batch=16, rollout_rows=320)
    need = bench.needs(bench.dimensions(model), prefix, suffixes, args, share)
    assert need["rollout_flops"] == total
    assert need["update_flops"] == 3 * total


def test_a_backward_pass_costs_twice_its_forward_pass():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                         attn_implementation="eager"))
    ids = torch.arange(9)[None]
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(ids).last_hidden_state
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        hidden.sum().backward()
    assert counter.get_total_flops() == 2 * forward


def test_the_fit_finds_planted_coefficients_of_any_scale():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(20, 4, generator=generator, dtype=torch.float64) * torch.tensor([1e12, 1e3, 1.0, 1.0])
    truth = torch.tensor([1e-11, 0.0, 0.5, 2.0], dtype=torch.float64)
    found = torch.tensor(bench.nonnegative_fit(features.tolist(), (features @ truth).tolist()), dtype=torch.float64)
    assert torch.allclose(found, truth, rtol=1e-6, atol=1e-9)


def test_the_fit_is_the_best_that_is_nowhere_negative():
    generator = torch.Generator().manual_seed(1)
    features = torch.rand(12, 3, generator=generator, dtype=torch.float64) + 0.1
    values = features @ torch.tensor([1.0, -0.6, 0.8], dtype=torch.float64)  # the free solution has a negative number
    found = bench.nonnegative_fit(features.tolist(), values.tolist())
    loss = lambda x: ((features @ torch.tensor(x, dtype=torch.float64)) / values - 1).square().sum().item()
    grid = [n / 40 for n in range(60)]
    assert min(found) >= 0
    assert loss(found) <= min(loss(x) for x in itertools.product(grid, repeat=3)) + 1e-12


def test_a_peak_is_that_of_its_own_block():
    if bench.status("VmHWM") != bench.status("VmHWM"):
        pytest.skip("no /proc here")
    phases = {}
    for size in (2**26, 2**20):  # floats: 256 MB, then 4 MB
        with bench.watched(phases, "block", "cpu"):
            torch.ones(size)
    grown = [(p - b) / 4 for p, b in zip(phases["block"]["peak"], phases["block"]["before"])]
    assert 0.9 * 2**26 < grown[0] < 1.3 * 2**26
    assert grown[1] < 2**24
