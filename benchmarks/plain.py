"""The yardstick: a decoder as one writes it in an afternoon of plain JAX (scan over layers, remat, optax).

RMSNorm, rotary positions, SwiGLU, tied embedding, no biases: the block that the peers run by default. It is an honest
program without tricks, not a straw man: everything is jitted and donated, the layers are scanned.
"""

import jax
import jax.numpy as jnp
import optax

optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1))


def init(key, layers, dim, heads, mlp, vocab):
    shapes = {"wq": (dim, dim), "wk": (dim, dim), "wv": (dim, dim), "wo": (dim, dim),
              "gate": (dim, mlp), "up": (dim, mlp), "down": (mlp, dim)}
    keys = jax.random.split(key, len(shapes) + 1)
    params = {name: 0.02 * jax.random.normal(k, (layers, *shape))
              for k, (name, shape) in zip(keys, shapes.items(), strict=False)}
    params |= {"norm1": jnp.ones((layers, dim)), "norm2": jnp.ones((layers, dim))}
    return {"layers": params, "embed": 0.02 * jax.random.normal(keys[-1], (vocab, dim)), "norm": jnp.ones(dim)}


def rms_norm(x, scale):
    return (x * jax.lax.rsqrt(jnp.mean(x.astype(jnp.float32) ** 2, -1, keepdims=True) + 1e-5) * scale).astype(x.dtype)


def rotary(x):
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def loss_fn(params, inputs, targets, heads, dtype, remat):
    x = params["embed"][inputs].astype(dtype)
    mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))

    def layer(x, w):
        w = jax.tree.map(lambda a: a.astype(dtype), w)
        h = rms_norm(x, w["norm1"])
        q, k, v = (jnp.reshape(h @ w[n], (*h.shape[:2], heads, -1)) for n in ("wq", "wk", "wv"))
        q, k = rotary(q), rotary(k)
        scores = jnp.einsum("bthd,bshd->bhts", q, k).astype(jnp.float32) / q.shape[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), -1).astype(dtype)
        x = x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(h.shape) @ w["wo"]
        h = rms_norm(x, w["norm2"])
        return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None

    x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, params["layers"])
    logits = (rms_norm(x, params["norm"]) @ params["embed"].T.astype(dtype)).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def make_step(heads, dtype, remat):
    def step(state, inputs, targets):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs, targets, heads, dtype, remat)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return jax.jit(step, donate_argnums=0)
