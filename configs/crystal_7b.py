"""Crystal 7B as it was trained: 1.392T tokens in three phases, 136 permanent checkpoints.

Source: the parameter files and the paper that LLM360 released with CrystalCoder. `configs/crystal_7b.py:original`
keeps the 225 checkpoints that the original configuration saved; the default keeps the 136 that were published.

    crystal-jax recipe show --config=configs/crystal_7b.py
    crystal-jax train --config=configs/crystal_7b.py --config.data.root=STORES --run_dir=runs/7b
"""

from crystal_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LearningRate,
    MeshConfig,
    ModelConfig,
    Phase,
    Source,
    Subset,
    TrainingConfig,
)
from crystal_jax.errors import UserError

SLIMPAJAMA = ("ArXiv", "Book", "C4", "CommonCrawl", "Github", "StackExchange", "Wikipedia")
LANGUAGES = ("css", "javascript", "html", "python")

CALENDARS = {"published": (1500, 3000, 3000), "original": (1500, 1500, 1000)}


def get_config(calendar: str = "published") -> Config:
    if calendar not in CALENDARS:
        raise UserError(f"the variants are {', '.join(CALENDARS)}, not {calendar!r}")
    every = CALENDARS[calendar]
    return Config(
        name="crystal_7b",
        model=ModelConfig(),
        sources={
            **{name: Source(f"slimpajama/{name}", "code" if name == "Github" else "text") for name in SLIMPAJAMA},
            "StarCoder": Source("starcoder", "code"),
            **{name: Source(f"starcoder_{name}", "code") for name in LANGUAGES},
        },
        phases=[_phase1(every[0]), _phase2(every[1]), _phase3(every[2])],
        data=DataConfig(root="data", tokenizer="tokenizer.json", sequence_length=2048),
        # 10,922 is no multiple of a TPU's tiles: padded in memory, its gradients come back in parts.
        # On each generation of TPUs that was compiled for, fsdp over all chips is the fastest mesh (docs/planning.md);
        # 2,112 sequences can be dealt to 64 of them, not to 128 or 256: there they are filled up.
        training=TrainingConfig(pad_to=256, fill_batch=True, mesh=MeshConfig(data=1, fsdp=-1)),
        # A full state is 79 GB, weights in bfloat16 13 GB: 13 of the 136 keep it, and each phase's last.
        checkpoints=CheckpointConfig(keep_public_every=10),
    )


def _phase1(checkpoint_every: int) -> Phase:
    """Language: the even half of SlimPajama, once. Its decay was planned for 294,337 steps and cut at 79,721."""
    return Phase(
        name="phase1",
        steps=79_721,
        global_batch_size=2112,
        mix={
            "ArXiv": 0.043251179622600486,
            "Book": 0.0413121881861869,
            "C4": 0.2665010054745754,
            "CommonCrawl": 0.5334581653397988,
            "Github": 0.04962588209760537,
            "StackExchange": 0.03168034115317788,
            "Wikipedia": 0.03417123812605512,
        },
        subset={name: Subset(files="even") for name in SLIMPAJAMA},
        epochs=dict.fromkeys(SLIMPAJAMA, 1.0),
        lr=LearningRate(peak=0.012, warmup_steps=86, end=0.00012408, decay_steps=294_337),
        checkpoint_every=checkpoint_every,
    )


def _phase2(checkpoint_every: int) -> Phase:
    """Language and code: the odd half of SlimPajama once, StarCoder twice with fill-in-the-middle."""
    return Phase(
        name="phase2",
        steps=214_387,
        global_batch_size=2112,
        mix={
            "ArXiv": 0.016083857723861224,
            "Book": 0.015358576352403003,
            "C4": 0.09909981505117808,
            "CommonCrawl": 0.1983897689052003,
            "Github": 0.018454606218343703,
            "StackExchange": 0.011784941022274698,
            "Wikipedia": 0.012710859995188247,
            "StarCoder": 0.6281175747315507,
        },
        subset={name: Subset(files="odd") for name in SLIMPAJAMA},
        epochs={**dict.fromkeys(SLIMPAJAMA, 1.0), "StarCoder": 2.0},
        fim_rate={"StarCoder": 0.9},
        lr=LearningRate(peak=0.0087825, warmup_steps=86, end=0.00013679, decay_steps=214_301),
        checkpoint_every=checkpoint_every,
    )


def _phase3(checkpoint_every: int) -> Phase:
    """Code-centric adaptation: four languages three times, a replay of the first tenth of everything else."""
    replayed = (*(name for name in SLIMPAJAMA if name != "Github"), "StarCoder")
    return Phase(
        name="phase3",
        steps=27_728,
        global_batch_size=2112,
        mix={
            "ArXiv": 0.016663255966286664,
            "Book": 0.00831444671835677,
            "C4": 0.01685693658811707,
            "CommonCrawl": 0.058282893778895735,
            "StackExchange": 0.008379821974060706,
            "Wikipedia": 0.05835852419497722,
            "StarCoder": 0.0334403752024888,
            "css": 0.08792775542527535,
            "javascript": 0.18370762129027085,
            "html": 0.18536747298179254,
            "python": 0.34270089587947816,
        },
        subset={name: Subset(first=0.1) for name in replayed},
        epochs=dict.fromkeys(LANGUAGES, 3.0),
        fim_rate={"StarCoder": 0.3, **dict.fromkeys(LANGUAGES, 0.3)},
        lr=LearningRate(peak=0.002, warmup_steps=276, end=0.0002, decay_steps=27_452),
        checkpoint_every=checkpoint_every,
    )
