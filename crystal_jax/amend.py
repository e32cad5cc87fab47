"""`train --amend_from=STEP`: a run that goes on from a saved state with another recipe.

What was trained before STEP stays as it was: its order, counts and checkpoints. From STEP on the new recipe decides;
each source goes on where it stood, a source whose store was replaced begins anew. plan.json records both, so that
every checkpoint still names the plan that it comes from and `inspect` still knows what each step saw.
"""

from pathlib import Path
from typing import Any

from crystal_jax import files
from crystal_jax.checkpoint import INFO, Calendar
from crystal_jax.config import Config, from_dict
from crystal_jax.errors import UserError
from crystal_jax.history import Record
from crystal_jax.phases import Plan, make_plan

FIXED = ("config.model", "config.data.seed", "config.data.sequence_length", "config.data.packing",
         "config.data.shuffle", "config.fingerprints.tokenizer", "config.init_from")
"""Where a difference would give the tokens or parameters that a run has another meaning."""


def amended(run_dir: Path, known: Record, plan: dict[str, Any], changes: list[str], config: Config,
            step: int) -> Record:
    """The record of the run in `run_dir` once it follows `plan` from `step` on. Writes nothing.

    Raises:
      UserError: a step that isn't saved, a change that can't be made within a run, a phase boundary in the past moved.
    """
    if fixed := [change for change in changes if change.startswith(FIXED)]:
        raise UserError(f"--amend_from={step}: {fixed[0]}: that can't change within a run; undo it, or start a new run "
                        "with --init_from")
    state = run_dir / "checkpoints" / str(step) / "position" / "metadata"
    if not state.exists():
        saved = sorted(int(entry.name) for entry in run_dir.glob("checkpoints/*") if entry.name.isdigit())
        raise UserError(f"--amend_from={step}: no state of that step; {run_dir} has "
                        f"{', '.join(map(str, saved)) or 'none'}")
    if not known.accepts(files.read_json(state)["plan_hash"], step):
        raise UserError(f"--amend_from={step}: {state.parent.parent} is a state of another run; take another step")
    if known.amendments and step < known.amendments[-1]["from_step"]:
        raise UserError(f"--amend_from={step}: the run was amended at step {known.amendments[-1]['from_step']}; amend "
                        "it from there or later")
    recorded = files.read_json(run_dir / "config.json")
    recorded.pop("versions", None)
    old = make_plan(from_dict(Config, recorded))
    _check_phases(old, make_plan(config), step)
    left = {"from_step": step, "plan": known.plan, "config": recorded}
    return Record(plan, [*known.amendments, left])


def _check_phases(old: Plan, new: Plan, step: int) -> None:
    """What is over stays as it was: phases that have begun keep name and place, those that have ended all they say.

    The phase that ends just at `step` may be made longer.
    """
    for placed in old.phases:
        if placed.start >= step:
            break
        path, now = f"config.phases[{placed.index}]", new.phases[placed.index : placed.index + 1]
        if not now or (now[0].phase.name, now[0].start) != (placed.phase.name, placed.start):
            found = f"{now[0].phase.name} from step {now[0].start}" if now else "missing"
            raise UserError(f"--amend_from={step}: {path} is {found}, but the run has begun {placed.phase.name} at "
                            f"step {placed.start}; change only what comes later")
        over = placed.end < step or (placed.end == step and now[0].end == step)
        if over and now[0].phase != placed.phase:
            raise UserError(f"--amend_from={step}: {path} ({placed.phase.name}) ended at step {placed.end}, but is "
                            "changed; change only what comes later")
        if not over and now[0].end <= step:
            raise UserError(f"--amend_from={step}: {path} ({placed.phase.name}) would end at step {now[0].end}; make "
                            "it longer: the run is there already")
    if step >= new.total_steps:
        raise UserError(f"--amend_from={step}: the new recipe ends at step {new.total_steps}; make it longer")


def set_aside(run_dir: Path, record: Record) -> None:
    """Moves what the run saved beyond its last amendment, under the plan it left, to superseded/; may be repeated."""
    if not record.amendments:
        return
    for path in [*run_dir.glob("checkpoints/*/position/metadata"), *run_dir.glob(f"exports/*/*/{INFO}")]:
        info = files.read_json(path)
        if record.accepts(info["plan_hash"], info["step"]):
            continue
        folder = path.parent if path.name == INFO else path.parent.parent
        target = run_dir / "superseded" / info["plan_hash"] / folder.relative_to(run_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
    Calendar(run_dir).refresh(record.hash)
