"""What surrounds a language model: its name, dropout, adapters, and a check that our passes score it rightly.

Not every model is a plain decoder (linear attention, short windows, scaled logits), and a wrong
log-probability raises no error. So `check_model` compares after loading, and refuses in one line.
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
                 "phi": "microsoft", "mistral": "mistralai", "ministral": "mistralai", "olmo": "allenai",
                 "deepseek": "deepseek-ai"}

def resolve(name):
    """`--model` to what transformers takes: `tiny`, a folder, a hub id, or a bare name of a known family."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").exists():
        raise InputError(f"--model {name}: the folder has no config.json, so it is no Hugging Face model")
    if name == "tiny" or folder.is_dir():
        return str(folder)
    family = re.match(r"[a-z]*", name.lower()).group()
    if family in ORGANISATIONS and "/" not in name:
        return f"{ORGANISATIONS[family]}/{name}"
    if name[:1] in "./~" or name.count("/") != 1:
        raise InputError(f"--model {name}: no such folder; give `tiny`, a folder, a hub id such as "
                         f"Qwen/Qwen2.5-1.5B, or a bare name of {', '.join(ORGANISATIONS)}")
    return name

def from_pretrained(source, dtype, weights=None):
    """(model, tokenizer) of a folder or hub id; weights: a state_dict, for a folder that has none."""
    transformers.utils.logging.disable_progress_bar()  # the stages' own bars say more
    try:
        config = AutoConfig.from_pretrained(source)
        without_dropout(config)
        tokenizer = AutoTokenizer.from_pretrained(source)
        if weights is None:
            return AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype), tokenizer
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.load_state_dict(weights)
        return model, tokenizer
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--model: cannot load {source} ({reason})") from None

def without_dropout(holder):
    """Set to 0 every rate of dropout that a config or a module holds, under whatever name.

    A search for nn.Dropout does not find a rate that is a plain number (`self.dropout = 0.1`): train and eval
    mode would then score differently, without a word.
    """
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
        if hasattr(module, "_can_checkpoint_with_cache"):
            # Under gradient checkpointing transformers drops a cache, and with it the prefix, unless a layer
            # says that it can have one. Ours only reads: a layer that runs again finds the same.
            module._can_checkpoint_with_cache = True

def checkpoint_activations(model):
    """Recompute activations in the backward pass (`--gradient-checkpointing`)."""
    # transformers renamed the method
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})

def add_adapters(model, rank):
    """Freeze the model and put trainable adapters on its linear layers (`--lora`; LoRA, arXiv 2106.09685).

    Returns peft's wrapper, for its `merge_and_unload`; `model` is changed in place and used on.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("--lora needs peft: pip install peft") from None
    wrapper = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    for parameter in wrapper.parameters():
        if parameter.requires_grad:  # in float32, whatever the weights beneath are
            parameter.data = parameter.data.float()
    return wrapper

def check_width(model, width):
    """Raise InputError for rows wider than the model looks back. Padding counts: it takes places, too."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]  # if not said: all have the window
    rope = getattr(config, "rope_parameters", None) or {}
    limits = {"max_position_embeddings": getattr(config, "max_position_embeddings", None),
              "window_size": getattr(config, "window_size", None)}  # GPT-Neo's local layers
    if rope.get("rope_type") == "longrope":  # beyond, every position gets another angle: the prefix's, too
        limits["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if "sliding_attention" in kinds:
        limits["sliding_window"] = getattr(config, "sliding_window", None)
    if "chunked_attention" in kinds:
        limits["attention_chunk_size"] = getattr(config, "attention_chunk_size", None)
    for name, limit in limits.items():
        if limit and width > limit:
            raise InputError(f"prompts and responses of up to {width} tokens are longer than the model's "
                             f"{name} of {limit}; lower --max-new-tokens or --history-length")

def check_model(model, tokenizer, name):
    """Compare our passes with plain ones on some twenty tokens. Raises InputError, naming the model's type.

    Log-probabilities with the shared prefix, in train mode (with gradient checkpointing, where it is on), and
    three greedy tokens and the last state of `policy.sample_rows`, against the model's own forward pass.
    """
    # In bfloat16 two correct passes differ by some hundredths.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.2
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, min(len(tokenizer), 1000), (30,), generator=generator).tolist()
    # Of unequal length: padding makes holes, which positions by column (ALiBi) do not survive.
    prefix, suffixes, responses = ids[:9], [ids[9:11], ids[11:20]], [ids[20:26], ids[26:30]]
    was_training = model.training
    # PhiMoE's; on so few tokens it may not show
    problem = "its router draws at random" if getattr(model.config, "router_jitter_noise", 0) else None
    try:
        problem = problem or _compare_logits(model, prefix)
        problem = problem or _compare_logprobs(model.train(), prefix, suffixes, responses, tolerance)
        problem = problem or _compare_sampled(model.eval(), tokenizer, prefix, suffixes, tolerance)
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
def _compare_logits(model, ids):
    """Logits must be the output layer's, to the bit in any precision: not scaled, not capped."""
    states = []
    hook = model.base_model.register_forward_hook(
        lambda module, args, output: states.append(output.last_hidden_state))
    try:
        logits = model(torch.tensor([ids], device=model.device)).logits.float()
    finally:
        hook.remove()
    if states:  # others call their layers in another way, and fail later
        layers = model.get_output_embeddings()(states[0]).float()
        if not (layers - logits).abs().max() <= 1e-3 * layers.abs().max():
            return "its logits are scaled or capped"


def _compare_logprobs(model, prefix, suffixes, responses, tolerance):
    shared, mask, hidden = policy.token_logprobs(model, prefix, suffixes, responses)
    (shared.sum() + hidden.sum()).backward()  # whatever the update does must work, too
    for n, response in enumerate(responses):
        start = prefix + suffixes[n]
        with torch.no_grad():
            logits = model(torch.tensor([start + response], device=model.device)).logits[0].float()
        targets = torch.tensor(response, device=model.device)
        plain = logits[len(start) - 1:-1].log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        difference = (shared[n][mask[n]] - plain).abs().max().item()
        if not difference < tolerance:  # a number that is none fails, too
            return f"log-probabilities differ by {difference:.2g} nats from the model's own"

@torch.no_grad()
def _compare_sampled(model, tokenizer, prefix, suffixes, tolerance):
    def own_logits(context):
        return model(torch.tensor([context], device=model.device)).logits[0, -1].float()

    prompts = [policy.Prompt(prefix, suffixes)]
    rollout = policy.sample_rows(model, tokenizer, prompts, 1, policy.Sampling(3, greedy=True))
    for suffix, response, state in zip(suffixes, rollout.responses, rollout.hidden):
        context = prefix + suffix
        for token in response:
            logits = own_logits(context)
            if logits.max() - logits[token] > tolerance:  # more than a tie
                return "sampled tokens differ from the model's own"
            context = context + [token]
        ours = model.get_output_embeddings()(state).float().softmax(-1)
        if not (ours - own_logits(context).softmax(-1)).abs().sum() < tolerance:
            return "states while sampling differ from the model's own"
