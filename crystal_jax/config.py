"""The configuration: typed dataclasses, declared once, and their way to plain data and back.

This file owns every field a user can set; rules.py owns the rule that each one obeys. Both import the standard library
only.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from crystal_jax.errors import UserError

PUBLISHED_VOCAB = 32032
DOMAINS = ("text", "code")

REMAT: dict[str, tuple[str, ...] | None] = {
    "none": None,
    "full": (),
    "attention": ("query", "key", "v", "context"),
    "products": ("query", "key", "v", "context", "gate", "up"),
}
"""What of each layer the backward pass finds saved, by name (None: all there is): the less, the more it recomputes."""


@dataclass(frozen=True)
class Family:
    """The choices in which decoders of one time differ."""

    norm: str
    """layer (mean and variance; scale and bias) or rms (scale alone)."""
    mlp: str
    """gated (SwiGLU) or plain (GELU)."""
    positions: str
    """interleaved or halves (which dims of a head rotate together), or learned (a vector per position)."""
    biases: bool
    """On every projection."""
    tied: bool
    """Whether the output matrix is the embedding."""
    attention_power: float
    """Scores are divided by head_dim to this power."""


FAMILIES = {
    "crystal": Family("layer", "gated", "interleaved", biases=True, tied=True, attention_power=1.0),
    "llama": Family("rms", "gated", "halves", biases=False, tied=False, attention_power=0.5),
    "starcoder": Family("layer", "plain", "learned", biases=True, tied=True, attention_power=0.5),
}
"""Crystal and the systems that its paper compares it with: Llama 2 and Code Llama, StarCoder (gpt_bigcode)."""


@dataclass(unsafe_hash=True)
class ModelConfig:
    """The Crystal transformer (LLM360 CrystalCoder, released config.json), or one of another family."""

    family: str = "crystal"
    """crystal, llama or starcoder."""
    vocab_size: int = PUBLISHED_VOCAB
    embed_dim: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int | None = None
    """Heads of keys and values, each shared by num_heads / num_kv_heads heads of queries; None for as many."""
    mlp_dim: int = 10922
    exact_gelu: bool = False
    """Of a plain MLP: GELU itself, not its tanh form; StarCoder releases differ in it."""
    max_length: int = 2048
    rotary_dim: int = 32
    """Leading dims of each head that are rotated, in interleaved pairs."""
    rotary_base: float = 10000.0
    norm_eps: float = 1e-5
    mup_base_width: int = 256
    """Width at which the maximal-update parametrisation equals the standard one."""
    embed_scale: float = 14.6
    output_scale: float = 2.22
    """Logits are multiplied by output_scale * width_scale."""
    init_std: float = 0.073
    """Of the embedding; hidden matrices take init_std * sqrt(width_scale)."""

    @property
    def choices(self) -> Family:
        return FAMILIES[self.family]

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def width_scale(self) -> float:
        """mup_base_width / embed_dim: 1/16 for the 7B model."""
        return self.mup_base_width / self.embed_dim

    @property
    def logit_scale(self) -> float:
        return self.output_scale * self.width_scale

    @property
    def matrix_std(self) -> float:
        """0.01825 for the 7B model."""
        return self.init_std * math.sqrt(self.width_scale)

    @property
    def output_std(self) -> float:
        """Of the two projections that write to the residual stream: 0.00228125 for the 7B model."""
        return self.matrix_std / math.sqrt(2 * self.num_layers)


@dataclass
class OptimizerConfig:
    """AdamW as Crystal used it: epsilon is added before the bias correction (optimizer.py)."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-9
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    mu_dtype: str = "float32"
    """In which the first moment is kept; bfloat16 saves 2 bytes a parameter."""


@dataclass
class LearningRate:
    """Linear from 0 to `peak` over `warmup_steps`, then linear to `end` over `decay_steps`.

    A phase that ends before the decay does leaves the schedule where it is (Crystal's phase 1).
    """

    peak: float = 0.012
    warmup_steps: int = 86
    end: float = 0.00012
    decay_steps: int = 1000


@dataclass
class Subset:
    """Which part of a source a phase reads: input files by ordinal, then the first part of their tokens."""

    files: str = "all"
    """all, even or odd."""
    first: float = 1.0
    """The leading share, in (0, 1]."""
    cursor: str = "carried"
    """carried (reading goes on where the last phase with the same files and share stopped) or fresh (anew)."""


@dataclass
class Source:
    """One token store and the side of the mixture that it counts towards."""

    store: str = ""
    """Folder of the store, below data.root."""
    domain: str = "text"
    """text or code."""


@dataclass
class Phase:
    """A phase of training as one object: budget, mixture, FIM, schedule, optimizer and calendar."""

    name: str = "phase1"
    steps: int | None = None
    tokens: int | None = None
    """The budget in tokens, instead of `steps`; rounded to whole steps."""
    global_batch_size: int = 8
    """Sequences per step."""
    mix: dict[str, float] = field(default_factory=dict)
    """Source name to its share of the phase's tokens; the shares sum to 1."""
    subset: dict[str, Subset] = field(default_factory=dict)
    """Source name to the part that is read; a source that isn't named is read whole."""
    epochs: dict[str, float] = field(default_factory=dict)
    """Source name to how often the phase means to read its subset; a plan that would read it more often is refused."""
    fim_rate: dict[str, float] = field(default_factory=dict)
    """Source name to the share of its document segments that become fill-in-the-middle."""
    spm_rate: float = 0.5
    """Of those segments, the share in suffix-prefix-middle order."""
    lr: LearningRate = field(default_factory=LearningRate)
    optimizer: str = "fresh"
    """fresh (moments and their step count restart) or carried."""
    checkpoint_every: int = 1500
    """Steps between the permanent checkpoints of the phase; its last step is always one."""


@dataclass
class DataConfig:
    root: str = "data"
    """Folder that holds the token stores."""
    tokenizer: str = "tokenizer.json"
    """The tokenizer.json that made the stores, below data.root."""
    sequence_length: int = 2048
    seed: int = 1
    fim_mode: str = "local"
    """local (character-level), crystal (as published, with its faults) or none."""
    packing: str = "concat"
    """concat (windows over the documents one after the other, as published) or best_fit (`prepare --packing`)."""
    document_mask: bool = False
    """Whether attention and positions begin anew at each document; as published they don't."""
    shuffle: bool = True
    """Whether each epoch of a source is read in an order of its own; without it, as it was prepared."""
    skip: list[list[int]] = field(default_factory=list)
    """[first step, steps] of each stretch of data that is passed over: the update of that number, as the log counts,
    reads on behind what it and the next ones would have read."""
    check_blocks: bool = False
    """Whether each block of a store is compared with its checksum when it is first read."""


@dataclass
class MeshConfig:
    """Devices along each mesh axis; -1 for one of them takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slice: int = 1
    """Slices of a pod that only the data-centre network joins; each has the other axes."""


@dataclass
class TrainingConfig:
    seed: int = 1
    """Of the initial parameters."""
    dtype: str = "bfloat16"
    """Of activations and of weights in matrix products; master weights and optimizer state are float32."""
    remat: str = "full"
    """A key of REMAT: full recomputes each layer in the backward pass, none keeps everything."""
    unroll: int = 1
    """Layers per iteration of the scan: num_layers unrolls it."""
    attention: str = "auto"
    """splash (TPU), cudnn (GPU), xla, or auto for the fastest that the devices have."""
    accumulate: int = 1
    """Parts that a global batch is computed in, one after the other, before the update."""
    fill_batch: bool = False
    """Whether sequences that count for nothing fill up a global batch that the mesh doesn't divide."""
    pad_to: int = 1
    """Multiple that MLP and vocabulary are padded to in memory, so that a mesh can split them: 256 makes 11,008 and
    32,256 of the published 10,922 and 32,032. Exports have the model's own sizes."""
    z_loss: float = 0.0
    """Times the squared logarithm of the softmax's divisor, added to the loss: PaLM's 1e-4 keeps logits small."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log_every: int = 10
    eval_every: int = 1000
    eval_sequences: int = 256
    """Held-out sequences per domain."""
    fingerprint_every: int = 100
    """Steps between fingerprints of the state in the log, for which the devices' copies are compared."""
    hang_seconds: float = 120.0
    """Without a step, after which a process ends itself and names the line it hangs at; ten times as long for whatever
    takes longer than steps."""
    spike_window: int = 128
    """Taken updates that the limits of a loss and a gradient norm are drawn from; 0 for no limits."""
    spike_factor: float = 10.0
    """Deviations above their level at which an update is skipped; see spikes.py."""
    skips_in_a_row: int = 3
    """Updates in a row that may be skipped, for a spike or for what isn't finite, before the run stops."""


@dataclass
class CheckpointConfig:
    every_steps: int = 250
    """Between rolling full states."""
    every_minutes: float = 0.0
    """Between rolling full states, by the clock, beside every_steps; 0 for never."""
    keep_last: int = 3
    keep_public_every: int = 0
    """Each so many permanent checkpoints one keeps its full state, as each phase's last does; 0 for none."""
    slow_save_seconds: float = 600.0
    """After which a save in the background is reported at each log line; one that takes ten times as long fails."""
    export_dtype: str = "bfloat16"
    """Of the permanent checkpoints."""


@dataclass
class Config:
    name: str = "crystal"
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sources: dict[str, Source] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON data."""
    return dataclasses.asdict(config)


def from_dict(cls: type, data: Any, path: str = "config") -> Any:
    """The dataclass that `to_dict` wrote.

    Raises:
      UserError: an unknown key (with the nearest name) or a value of the wrong type, by its path.
    """
    if not isinstance(data, dict):
        raise UserError(f"{path}: {data!r} should be an object with the fields of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise UserError(f"{path}.{key}: unknown field{nearest(key, hints)}")
    return cls(**{key: _build(hints[key], value, f"{path}.{key}") for key, value in data.items()})


def _build(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path)
    if origin is dict and isinstance(value, dict):
        return {key: _build(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if origin is list and isinstance(value, list):
        return [_build(args[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
    _check_type(value, hint, path)
    return value


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """'; did you mean X?' for the closest of `names`, else the list of them."""
    names = [str(n) for n in names]
    close = difflib.get_close_matches(name, names, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(names))}"


def digest(data: Any) -> str:
    """A short, stable hash of plain JSON data."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_types(value: Any, path: str) -> None:
    hints = typing.get_type_hints(type(value))
    for name in vars(value):
        if name not in hints:
            raise UserError(f"{path}.{name}: unknown field{nearest(name, hints)}")
    for name, hint in hints.items():
        _check_type(getattr(value, name), hint, f"{path}.{name}")


def _check_type(value: Any, hint: Any, path: str) -> None:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is not None:
            _check_type(value, next(arg for arg in args if arg is not type(None)), path)
    elif origin is dict:
        require(isinstance(value, dict), path, value, "a dict")
        for key, item in value.items():
            _check_type(item, args[1], f"{path}.{key}")
    elif origin is list:
        require(isinstance(value, list | tuple), path, value, "a list")
        for index, item in enumerate(value):
            _check_type(item, args[0], f"{path}[{index}]")
    elif dataclasses.is_dataclass(hint):
        require(isinstance(value, typing.cast(type, hint)), path, value, f"a {typing.cast(type, hint).__name__}")
        check_types(value, path)
    elif hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        require(number, path, value, "a finite number")
    else:
        require(isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), path, value,
                 {int: "a whole number", str: "a string", bool: "true or false"}[hint])


def require(condition: bool, path: str, value: Any, rule: str) -> None:
    if not condition:
        raise UserError(f"{path}: {value!r} must be {rule}")


def check_local(path: str, value: Any) -> None:
    """Refuses an address: everything is read and written through the local file system.

    Raises:
      UserError: `value` names another kind of storage.
    """
    require("://" not in str(value), path, str(value), "a local folder; mount the bucket, or copy it here")
