"""What surrounds a language model: its name, dropout, adapters, and a check that our passes score it rightly:
not every model is a plain decoder, and a wrong log-probability raises no error.
"""

import re
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import policy
from data import InputError

ORGANISATIONS = {"qwen": "Qwen", "smollm": "HuggingFaceTB", "llama": "meta-llama", "gemma": "google",
                 "phi": "microsoft", "mistral": "mistralai", "olmo": "allenai",
                 "ministral": "mistralai", "deepseek": "deepseek-ai"}

def resolve(name):
    """`--model` to what transformers takes: `tiny`, a folder, a hub id, or a bare name of a known family."""
    folder, family = Path(name).expanduser(), re.match(r"[a-z]*", name.lower()).group()
    if name == "tiny" or (folder / "config.json").exists():
        return str(folder)
    if family in ORGANISATIONS and "/" not in name:
        return f"{ORGANISATIONS[family]}/{name}"
    if name[:1] in "./~" or name.count("/") != 1:
        raise InputError(f"--model {name}: no such folder, hub id, or name of {', '.join(ORGANISATIONS)}")
    return name

def from_pretrained(source, dtype, weights=None):
    """(model, tokenizer) of a folder or hub id; weights: a state_dict, for a folder that has none."""
    transformers.utils.logging.disable_progress_bar()  # the stages' own bars say more
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if weights is None:
            return AutoModelForCausalLM.from_pretrained(source, dtype=dtype), tokenizer
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=dtype)
        model.load_state_dict(weights)
        return model, tokenizer
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"--model: cannot load {source} ({error!r:.300})") from None

def prepare(model):
    """What every model gets: no dropout, under whatever name, in modules and configs (a search for nn.Dropout
    misses `self.dropout = 0.1`), and gradient checkpointing that keeps the shared prefix."""
    for module in model.modules():
        is_dropout = "dropout" in type(module).__name__.lower()
        for holder in (module, getattr(module, "config", module)):
            for name, value in list(vars(holder).items()):
                if isinstance(value, float) and ("drop" in name.lower() or is_dropout and name == "p"):
                    setattr(holder, name, 0.0)
        if hasattr(module, "_can_checkpoint_with_cache"):  # without it the cache, and the prefix, is dropped
            module._can_checkpoint_with_cache = True  # ours only reads: a second run finds the same

def checkpoint_activations(model):
    """Recompute activations in the backward pass (`--gradient-checkpointing`); the method has two names."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})

def add_adapters(model, rank):
    """Freeze the model and put trainable adapters on its linear layers (LoRA, arXiv 2106.09685), in place.
    Returns peft's wrapper, for its `merge_and_unload`."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("--lora needs peft: pip install peft") from None
    wrapper = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    for p in wrapper.parameters():  # adapters in float32, whatever the weights beneath are
        p.data = p.data.float() if p.requires_grad else p.data
    return wrapper

def check_width(model, width):
    """Raise InputError for rows wider than the model looks back. Padding counts: it takes places, too."""
    config = model.config.get_text_config()
    limits = {name: getattr(config, name, None)  # window_size: GPT-Neo's local layers
              for name in ("max_position_embeddings", "window_size", "sliding_window")}
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        del limits["sliding_window"]  # no layer has it; where no types are given, all layers do
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond, every position gets another angle: the prefix's, too
        limits["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    for name, limit in limits.items():
        if limit and width > limit:
            raise InputError(f"prompts and responses of up to {width} tokens are longer than the model's "
                             f"{name} of {limit}; lower --max-new-tokens or --history-length")

def check_model(model, tokenizer, name):
    """Raise InputError, naming the model's type, where our passes differ from the model's forward pass."""
    was_training = model.training
    try:
        _compare(model, tokenizer)
    except Exception as error:  # a model may fail in any way of its own
        if "memory" in str(error):
            raise
        reason = error if type(error) is ValueError else f"{error!r:.160}"
        raise InputError(f"--model {name}: models of type {model.config.model_type} do not work here "
                         f"({reason}); plain decoders such as Qwen, Llama and OLMo do") from None
    finally:
        model.train(was_training)
        model.zero_grad()

@torch.no_grad()
def _logits(model, ids):
    """The model's logits (T, V) of one row."""
    return model(torch.tensor([ids], device=model.device)).logits[0].float()

def _compare(model, tokenizer):
    """Raise what goes wrong on thirty tokens."""
    if getattr(model.config, "router_jitter_noise", 0):  # PhiMoE's; on so few tokens it may not show
        raise ValueError("its router draws at random")
    generator, head = torch.Generator().manual_seed(0), model.get_output_embeddings()
    ids = torch.randint(3, min(len(tokenizer), 1000), (30,), generator=generator).tolist()
    # Of unequal length: padding makes holes, which positions by column (ALiBi) do not survive.
    prefix, suffixes, responses = ids[:9], [ids[9:11], ids[11:20]], [ids[20:26], ids[26:30]]
    # Nats, at most; in bfloat16 of the mean: two right passes of a 135M model differ by 0.08 in the mean, and
    # by 0.3 at an improbable token. Without the prefix the mean is 1.4 or more.
    exact = model.dtype == torch.float32
    tolerance = 1e-3 if exact else 0.2
    # Logits must be the output layer's, to the bit in any precision: not scaled, not capped.
    state = model.base_model(torch.tensor([prefix], device=model.device)).last_hidden_state
    layers = head(state)[0].float()
    if not (layers - _logits(model, prefix)).abs().max() <= 1e-3 * layers.abs().max():
        raise ValueError("its logits are scaled or capped")
    # Log-probabilities in train mode, with gradient checkpointing where it is on.
    shared, mask, hidden = policy.token_logprobs(model.train(), prefix, suffixes, responses)
    (shared.sum() + hidden.sum()).backward()  # whatever the update does must work, too
    for n, response in enumerate(responses):
        logits = _logits(model, prefix + suffixes[n] + response)[-len(response) - 1:-1]
        plain = logits.log_softmax(-1)[range(len(response)), response]
        differences = (shared[n][mask[n]] - plain).abs()
        difference = (differences.max() if exact else differences.mean()).item()
        if not difference < tolerance:  # a number that is none fails, too
            raise ValueError(f"log-probabilities differ by {difference:.2g} nats from the model's own")
    # Three greedy tokens, and the state after the last.
    prompts, greedy = [policy.Prompt(prefix, suffixes)], policy.Sampling(3, greedy=True)
    rollout = policy.sample_rows(model.eval(), tokenizer, prompts, 1, greedy)
    for suffix, response, state in zip(suffixes, rollout.responses, rollout.hidden):
        logits = _logits(model, prefix + suffix + response)[-len(response) - 1:]
        if any(row.max() - row[token] > tolerance for row, token in zip(logits, response)):  # more than a tie
            raise ValueError("sampled tokens differ from the model's own")
        if not (head(state).float().softmax(-1) - logits[-1].softmax(-1)).abs().sum() < tolerance:
            raise ValueError("states while sampling differ from the model's own")
