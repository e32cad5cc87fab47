# SPDX-License-Identifier: Apache-2.0
"""Crystal in PyTorch: this one file makes an exported folder load with transformers, 4.46 to 5.x.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

A pre-norm decoder with LayerNorm, biases on every linear, a gated MLP, rotary positions on the leading dims of each
head in interleaved pairs, attention scores divided by head_dim (not by its root), scaled embeddings and scaled logits
from a tied head. It holds no buffers: rotary angles and masks are computed in forward, so a loader that leaves buffers
uninitialised can't change the model. New weights made from a config alone aren't the training initialisation.
"""

import torch
import transformers
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

try:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError:  # before 4.48 every implementation is the eager one
    ALL_ATTENTION_FUNCTIONS = {}

MASKED_HERE = ("eager", "sdpa")
"""Attention implementations that take an additive [B, 1, T, S] mask; others get the padding mask as it came."""


class CrystalConfig(PretrainedConfig):
    """Sizes and scales; `logit_scale` = output_scale * mup_base_width / hidden_size multiplies the logits."""

    model_type = "crystal"
    keys_to_ignore_at_inference = ["past_key_values"]
    # How several devices share the linears of a layer, for transformers and the backends that read it.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def __init__(
        self, vocab_size=32032, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=10922,
        max_position_embeddings=2048, rotary_dim=32, rotary_base=10000.0, layer_norm_eps=1e-5, mup_base_width=256,
        embed_scale=14.6, output_scale=2.22, logit_scale=0.13875, initializer_range=0.073, use_cache=True,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True, **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = self.num_key_value_heads = num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.rotary_dim = rotary_dim
        self.rotary_base = rotary_base
        self.layer_norm_eps = layer_norm_eps
        self.mup_base_width = mup_base_width
        self.embed_scale = embed_scale
        self.output_scale = output_scale
        self.logit_scale = logit_scale
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        for derived in ("num_key_value_heads", "head_dim"):
            kwargs.pop(derived, None)
        super().__init__(
            bos_token_id=bos_token_id, eos_token_id=eos_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs
        )


def rotary_angles(config, position_ids, dtype):
    """(cos, sin), each [B, 1, T, rotary_dim / 2], in at least float32: angles reach max_position_embeddings radians."""
    dims = range(0, config.rotary_dim, 2)
    frequencies = [config.rotary_base ** (-i / config.rotary_dim) for i in dims]
    exact = torch.promote_types(dtype, torch.float32)
    frequencies = torch.tensor(frequencies, dtype=exact, device=position_ids.device)
    angles = position_ids[:, None, :, None].to(exact) * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """x [B, heads, T, head_dim] with its leading dims turned in pairs (0, 1), (2, 3), ...; the others untouched."""
    turned, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    even, odd = turned[..., 0::2].to(cos.dtype), turned[..., 1::2].to(cos.dtype)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def key_count(cache, past, length):
    """The keys that a layer meets: those so far, or with a static cache its whole size."""
    holders = getattr(cache, "layers", [cache])[:1]  # 4.46 has no layers: the cache itself says it
    return next((each.max_cache_len for each in holders if hasattr(each, "max_cache_len")), past + length)


def additive_mask(attention_mask, slots, keys, hidden):
    """[B or 1, 1, T, S]: 0 where the query in slot t may see key s (s <= t and not padding), else the lowest number.

    Finite, so that a row of padding, which sees nothing, stays free of NaN.
    """
    seen = (torch.arange(keys, device=hidden.device) <= slots[:, None])[None, None]
    if attention_mask is not None:
        known = nn.functional.pad(attention_mask.bool(), (0, keys - attention_mask.shape[-1]))
        seen = seen & known[:, None, None, :]
    lowest = torch.finfo(hidden.dtype).min
    return torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~seen, lowest)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention with the softmax in at least float32, as in training."""
    scores = query @ key.transpose(2, 3) * scaling + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class CrystalAttention(nn.Module):
    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = 1 / config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, mask, angles, cache, slots, **kwargs):
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, *angles), rotate(key, *angles)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, {"cache_position": slots})
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention)
        merged, weights = attend(self, query, key, value, mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(merged.flatten(2)), weights


class CrystalMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(self.up_proj(x) * nn.functional.silu(self.gate_proj(x)))


class CrystalLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CrystalAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CrystalMLP(config)

    def forward(self, hidden, mask, angles, cache, slots, **kwargs):
        attended, weights = self.self_attn(self.input_layernorm(hidden), mask, angles, cache, slots, **kwargs)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), weights


class CrystalPreTrainedModel(PreTrainedModel):
    config_class = CrystalConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CrystalLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_cache_class = _supports_static_cache = True  # 4.46


class CrystalModel(CrystalPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(CrystalLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def _prepare_4d_causal_attention_mask_with_cache_position(self, attention_mask, *args, **kwargs):
        return attention_mask  # 4.46's name of create_masks_for_generate, below

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None, **kwargs,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = hidden * self.config.embed_scale
        recompute = self.gradient_checkpointing and self.training
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        cache = None if recompute else cache  # a layer that runs twice would enter its keys twice
        past, length = 0 if cache is None else cache.get_seq_length(), hidden.shape[1]
        slots = torch.arange(length, device=hidden.device) + past
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        elif position_ids is None:
            position_ids = slots[None]
        angles = rotary_angles(self.config, position_ids, hidden.dtype)
        masked_here = self.config._attn_implementation in MASKED_HERE
        keys = key_count(cache, past, length)
        mask = additive_mask(attention_mask, slots, keys, hidden) if masked_here else attention_mask
        states, attentions = [], []
        for layer in self.layers:
            states.append(hidden)
            if recompute:
                hidden, weights = self._gradient_checkpointing_func(layer.__call__, hidden, mask, angles, cache, slots)
            else:
                hidden, weights = layer(hidden, mask, angles, cache, slots, **kwargs)
            attentions.append(weights)
        hidden = self.norm(hidden)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*states, hidden) if output_hidden_states or self.config.output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output.to_tuple() if return_dict is False else output


class CrystalForCausalLM(CrystalPreTrainedModel, GenerationMixin):
    _tied_weights_keys = (
        ["lm_head.weight"]
        if transformers.__version__.startswith("4.")
        else {"lm_head.weight": "model.embed_tokens.weight"}
    )

    def __init__(self, config):
        super().__init__(config)
        self.model = CrystalModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """What generate would make of the padding mask for a static cache; forward makes its own."""
        return attention_mask

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, logits_to_keep=0, return_dict=None, **kwargs,
    ):
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]) * self.config.logit_scale
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output.to_tuple() if return_dict is False else output
