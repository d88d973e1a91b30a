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
    folder = Path(name).expanduser()
    if name == "tiny" or (folder / "config.json").exists():
        return str(folder)
    family = re.match(r"[a-z]*", name.lower()).group()
    if family in ORGANISATIONS and "/" not in name:
        return f"{ORGANISATIONS[family]}/{name}"
    if name[:1] in "./~" or name.count("/") != 1:
        raise InputError(f"--model {name}: no such folder of a model; give `tiny`, a folder, a hub id, or "
                         f"a bare name of {', '.join(ORGANISATIONS)}")
    return name

def from_pretrained(source, dtype, weights=None):
    """(model, tokenizer) of a folder or hub id; weights: a state_dict, for a folder that has none."""
    transformers.utils.logging.disable_progress_bar()  # the stages' own bars say more
    try:
        config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        without_dropout(config)
        if weights is None:
            return AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype), tokenizer
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.load_state_dict(weights)
        return model, tokenizer
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--model: cannot load {source} ({reason})") from None

def without_dropout(holder):
    """Set every rate of dropout in a config or a module to 0, under whatever name. A search for nn.Dropout
    does not find a plain number (`self.dropout = 0.1`): train and eval mode would then score differently."""
    is_dropout = isinstance(holder, torch.nn.Module) and "dropout" in type(holder).__name__.lower()
    for name, value in list(vars(holder).items()):
        if isinstance(value, float) and ("drop" in name.lower() or is_dropout and name == "p"):
            setattr(holder, name, 0.0)
        elif isinstance(value, transformers.PretrainedConfig) and not isinstance(holder, torch.nn.Module):
            without_dropout(value)  # a model of several parts

def prepare(model):
    """What every model gets: no dropout, and gradient checkpointing that keeps the shared prefix."""
    for module in model.modules():
        without_dropout(module)
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
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]  # if not said: all have the window
    names = ["max_position_embeddings", "window_size"] + ["sliding_window"] * ("sliding_attention" in kinds)
    limits = {name: getattr(config, name, None) for name in names}  # window_size: GPT-Neo's local layers
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
        problem = _problem(model, tokenizer)
    except Exception as error:  # a model may fail in any way of its own
        if "memory" in str(error):
            raise
        problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    model.train(was_training)
    model.zero_grad()
    if problem:
        raise InputError(f"--model {name}: models of type {model.config.model_type} do not work here "
                         f"({problem}); plain decoders such as Qwen, Llama, SmolLM, Mistral and OLMo do")

@torch.no_grad()
def _logits(model, ids):
    """The model's logits (T, V) of one row."""
    return model(torch.tensor([ids], device=model.device)).logits[0].float()

def _problem(model, tokenizer):
    """What goes wrong on thirty tokens, or None."""
    if getattr(model.config, "router_jitter_noise", 0):  # PhiMoE's; on so few tokens it may not show
        return "its router draws at random"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, min(len(tokenizer), 1000), (30,), generator=generator).tolist()
    # Of unequal length: padding makes holes, which positions by column (ALiBi) do not survive.
    prefix, suffixes, responses = ids[:9], [ids[9:11], ids[11:20]], [ids[20:26], ids[26:30]]
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.2  # two right passes in bfloat16 differ by this

    # Logits must be the output layer's, to the bit in any precision: not scaled, not capped.
    states, head = [], model.get_output_embeddings()
    hook = model.base_model.register_forward_hook(lambda *call: states.append(call[2].last_hidden_state))
    logits = _logits(model, prefix)
    hook.remove()
    if states:  # others call their layers in another way, and fail later
        layers = head(states[0])[0].float()
        if not (layers - logits).abs().max() <= 1e-3 * layers.abs().max():
            return "its logits are scaled or capped"

    # Log-probabilities in train mode, with gradient checkpointing where it is on.
    shared, mask, hidden = policy.token_logprobs(model.train(), prefix, suffixes, responses)
    (shared.sum() + hidden.sum()).backward()  # whatever the update does must work, too
    for n, response in enumerate(responses):
        logits = _logits(model, prefix + suffixes[n] + response)[-len(response) - 1:-1]
        plain = logits.log_softmax(-1)[range(len(response)), response]
        difference = (shared[n][mask[n]] - plain).abs().max().item()
        if not difference < tolerance:  # a number that is none fails, too
            return f"log-probabilities differ by {difference:.2g} nats from the model's own"

    # Three greedy tokens, and the state after the last.
    prompts, greedy = [policy.Prompt(prefix, suffixes)], policy.Sampling(3, greedy=True)
    rollout = policy.sample_rows(model.eval(), tokenizer, prompts, 1, greedy)
    for suffix, response, state in zip(suffixes, rollout.responses, rollout.hidden):
        logits = _logits(model, prefix + suffix + response)[-len(response) - 1:]
        if any(row.max() - row[token] > tolerance for row, token in zip(logits, response)):  # more than a tie
            return "sampled tokens differ from the model's own"
        if not (head(state).float().softmax(-1) - logits[-1].softmax(-1)).abs().sum() < tolerance:
            return "states while sampling differ from the model's own"
