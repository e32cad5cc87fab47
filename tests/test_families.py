"""The families that Crystal is compared with: the same transformer by another row of a table, against transformers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from crystal_jax import recipe, sharding
from crystal_jax.attention import empty_tails
from crystal_jax.config import MeshConfig, ModelConfig
from crystal_jax.errors import UserError
from crystal_jax.model import Crystal, init_params, map_specs, parameter_count

LLAMA = ModelConfig(family="llama", vocab_size=83, embed_dim=48, num_layers=3, num_heads=4, mlp_dim=67, max_length=64,
                    rotary_dim=12, rotary_base=1e6, mup_base_width=48, embed_scale=1.0, output_scale=1.0, init_std=0.05)
GROUPED = replace(LLAMA, num_kv_heads=2)
STARCODER = ModelConfig(family="starcoder", vocab_size=83, embed_dim=48, num_layers=3, num_heads=4, num_kv_heads=1,
                        mlp_dim=96, max_length=64, rotary_dim=0, mup_base_width=48, embed_scale=1.0, output_scale=1.0,
                        init_std=0.05)
CRYSTAL_GROUPED = replace(STARCODER, family="crystal", num_kv_heads=2, rotary_dim=4, embed_scale=14.6)
EXACT = replace(STARCODER, exact_gelu=True)
ALL = {"llama": LLAMA, "llama-grouped": GROUPED, "starcoder": STARCODER, "starcoder-exact": EXACT,
       "crystal-grouped": CRYSTAL_GROUPED}


def drawn(model: ModelConfig, seed: int = 0) -> dict:
    """Parameters in which every leaf is random, also norms and biases."""
    rng = np.random.default_rng(seed)
    specs = Crystal(model).specs()
    return map_specs(lambda spec: jnp.asarray(spec.mean + 0.2 * rng.standard_normal(spec.shape), jnp.float32), specs)


def ids(model: ModelConfig, rows: int = 3, length: int = 40) -> np.ndarray:
    return np.random.default_rng(1).integers(3, model.vocab_size, (rows, length)).astype(np.int32)


def llama_state(model: ModelConfig, params: dict) -> dict[str, np.ndarray]:
    D = model.embed_dim
    state = {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["final_norm"]["scale"],
             "lm_head.weight": params["head"]}
    attn, mlp = params["layers"]["attn"], params["layers"]["mlp"]
    for i in range(model.num_layers):
        prefix = f"model.layers.{i}."
        state[prefix + "input_layernorm.weight"] = params["layers"]["attn_norm"]["scale"][i]
        state[prefix + "post_attention_layernorm.weight"] = params["layers"]["mlp_norm"]["scale"][i]
        for name in "qkv":
            state[f"{prefix}self_attn.{name}_proj.weight"] = attn[name][i].reshape(D, -1).T
        state[prefix + "self_attn.o_proj.weight"] = attn["o"][i].reshape(-1, D).T
        for name in ("gate", "up", "down"):
            state[f"{prefix}mlp.{name}_proj.weight"] = mlp[name][i].T
    return state


def starcoder_state(model: ModelConfig, params: dict) -> dict[str, np.ndarray]:
    """gpt_bigcode: c_attn holds all queries, then the one key head, then the one value head."""
    D = model.embed_dim
    state = {"transformer.wte.weight": params["embed"], "transformer.wpe.weight": params["positions"],
             "transformer.ln_f.weight": params["final_norm"]["scale"],
             "transformer.ln_f.bias": params["final_norm"]["bias"], "lm_head.weight": params["embed"]}
    layers = params["layers"]
    for i in range(model.num_layers):
        prefix = f"transformer.h.{i}."
        for theirs, ours in (("ln_1", "attn_norm"), ("ln_2", "mlp_norm")):
            state[f"{prefix}{theirs}.weight"], state[f"{prefix}{theirs}.bias"] = (
                layers[ours]["scale"][i], layers[ours]["bias"][i])
        attn, mlp = layers["attn"], layers["mlp"]
        state[prefix + "attn.c_attn.weight"] = np.concatenate([attn[n][i].reshape(D, -1).T for n in "qkv"])
        state[prefix + "attn.c_attn.bias"] = np.concatenate([attn[f"{n}_bias"][i].reshape(-1) for n in "qkv"])
        state[prefix + "attn.c_proj.weight"] = attn["o"][i].reshape(-1, D).T
        state[prefix + "attn.c_proj.bias"] = attn["o_bias"][i]
        state[prefix + "mlp.c_fc.weight"], state[prefix + "mlp.c_fc.bias"] = mlp["up"][i].T, mlp["up_bias"][i]
        state[prefix + "mlp.c_proj.weight"], state[prefix + "mlp.c_proj.bias"] = mlp["down"][i].T, mlp["down_bias"][i]
    return state


def theirs(model: ModelConfig, params: dict):
    """The same model in transformers, in float32."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    if model.family == "llama":
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=model.vocab_size, hidden_size=model.embed_dim, intermediate_size=model.mlp_dim,
            num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads,
            num_key_value_heads=model.kv_heads, max_position_embeddings=model.max_length, rms_norm_eps=model.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base}))
        state = llama_state(model, params)
    else:
        made = transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(
            vocab_size=model.vocab_size, n_positions=model.max_length, n_embd=model.embed_dim,
            n_layer=model.num_layers, n_head=model.num_heads, n_inner=model.mlp_dim, multi_query=True,
            layer_norm_epsilon=model.norm_eps,
            activation_function="gelu" if model.exact_gelu else "gelu_pytorch_tanh",
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        state = starcoder_state(model, params)
    made.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    return made.eval()


@pytest.mark.torch
@pytest.mark.parametrize("name", ["llama", "llama-grouped", "starcoder", "starcoder-exact"])
def test_logits_and_gradients_are_those_of_transformers(name: str) -> None:
    import torch

    model, params = ALL[name], drawn(ALL[name])
    tokens = ids(model)
    reference = theirs(model, jax.tree.map(np.asarray, params))
    expected = reference(torch.from_numpy(tokens).long(), attention_mask=torch.ones(tokens.shape, dtype=torch.long))
    found = np.asarray(Crystal(model).bind(params)(jnp.asarray(tokens)))
    assert np.abs(found - expected.logits.detach().numpy()).max() <= 1e-5 * max(1, np.abs(found).max())

    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    mask = np.ones(targets.shape, np.float32)
    gradients = jax.grad(lambda p: Crystal(model).bind(p).loss(inputs, targets, mask)[0])(params)
    logits = reference(torch.from_numpy(inputs).long()).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).long().flatten()).backward()
    gradients = jax.tree.map(np.asarray, gradients)
    ours = llama_state(model, gradients) if model.family == "llama" else starcoder_state(model, gradients)
    for key, parameter in reference.named_parameters():
        scale = np.abs(parameter.grad.numpy()).max()
        assert np.abs(ours[key] - parameter.grad.numpy()).max() <= 2e-5 * scale + 1e-9, key


@pytest.mark.parametrize("name", ALL)
def test_with_a_cache_as_without(name: str) -> None:
    model, params = ALL[name], drawn(ALL[name])
    tokens = ids(model, length=24)
    bound = Crystal(model).bind(params)
    whole = bound.hidden(jnp.asarray(tokens))
    tails = empty_tails(model, 3, 24, jnp.float32)
    assert tails[0][0].shape == (3, model.kv_heads, 24, model.head_dim)
    for first, last in ((0, 10), (10, 11), (11, 24)):
        part, tails = bound.extend(bound.blocks(), tokens[:, first:last], tails, first)
        np.testing.assert_allclose(part, whole[:, first:last], atol=2e-5)


@pytest.mark.parametrize("name", ALL)
def test_documents_apart_are_documents_alone(name: str) -> None:
    model, params = ALL[name], drawn(ALL[name])
    tokens = ids(model, rows=1, length=20)
    segment = np.array([[0] * 8 + [1] * 12])
    positions = np.concatenate([np.arange(8), np.arange(12)])[None]
    bound = Crystal(model).bind(params)
    packed = bound(jnp.asarray(tokens), positions, segment)
    np.testing.assert_allclose(packed[:, :8], bound(jnp.asarray(tokens[:, :8])), atol=1e-4)
    np.testing.assert_allclose(packed[:, 8:], bound(jnp.asarray(tokens[:, 8:])), atol=1e-4)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mesh", [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2), MeshConfig(1, 4, 2)])
def test_on_a_mesh_as_on_one_device(name: str, mesh: MeshConfig) -> None:
    model = replace(ALL[name], vocab_size=88, mlp_dim=96, embed_dim=64, rotary_dim=min(ALL[name].rotary_dim, 16))
    tokens = ids(model, rows=8, length=16)
    mask = np.ones(tokens.shape, np.float32)
    crystal = Crystal(model)

    def loss(params: dict, batch: dict):
        return crystal.bind(params).loss(batch["inputs"], batch["targets"], batch["mask"])[0]

    batch = {"inputs": tokens, "targets": np.roll(tokens, -1, 1), "mask": mask}
    one = jax.make_mesh((1, 1, 1, 1), sharding.AXES, devices=jax.devices()[:1], axis_types=(AxisType.Explicit,) * 4)
    results = []
    for devices in (one, sharding.make_mesh(mesh)):
        with jax.set_mesh(devices):
            params = init_params(crystal.specs(), 0, devices)
            results.append(jax.jit(jax.value_and_grad(loss))(params, sharding.put_batch(devices, batch)))
    (loss_1, grads_1), (loss_8, grads_8) = results
    np.testing.assert_allclose(loss_1, loss_8, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads_1), jax.tree.leaves(grads_8), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("name", ALL)
def test_the_recipe_counts_what_the_model_declares(name: str) -> None:
    assert recipe.parameter_count(ALL[name]) == parameter_count(Crystal(ALL[name]).specs())


def test_the_compared_systems_have_their_published_sizes() -> None:
    from configs import compared

    sizes = {name: recipe.parameter_count(model) for name, model in compared.MODELS.items()}
    assert sizes == {"llama2": 6_738_415_616, "codellama": 6_738_546_688, "starcoder": 15_517_456_384}


def test_the_compared_systems_take_crystals_recipe() -> None:
    from crystal_jax.config_file import load_config

    from configs import compared, crystal_7b

    for name in compared.MODELS:
        config = load_config(f"configs/compared.py:{name}", [])
        assert config.phases == crystal_7b.get_config().phases
        assert config.model.family == ("starcoder" if name == "starcoder" else "llama")
    with pytest.raises(UserError, match="llama3"):
        load_config("configs/compared.py:llama3", [])


@pytest.mark.parametrize("change, says", [
    ({"family": "gpt5"}, "config.model.family: 'gpt5' must be one of crystal, llama, starcoder"),
    ({"num_kv_heads": 3}, "config.model.num_kv_heads: 3 must be a divisor of num_heads = 4"),
    ({"family": "starcoder"}, "config.model.rotary_dim: 12 must be 0 in the family starcoder"),
])
def test_a_choice_that_cannot_be_is_refused(change: dict, says: str) -> None:
    from crystal_jax.rules import _check_model

    with pytest.raises(UserError) as refused:
        _check_model(replace(LLAMA, **change), 32)
    assert says in str(refused.value)
