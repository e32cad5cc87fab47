"""`train --amend_from=STEP`: a run that goes on from a saved state with another recipe.

What was trained before STEP stays as it was: its order, counts and checkpoints. From STEP on the new recipe decides;
each source goes on where it stood, a source whose store was replaced begins anew. plan.json records both, so that
every checkpoint still names the plan that it comes from and `inspect` still knows what each step saw.
"""

from typing import Any

from etils import epath

from crystal_jax import files
from crystal_jax.config import Config, from_dict
from crystal_jax.errors import UserError
from crystal_jax.exports import EXPORTS, INFO, Calendar
from crystal_jax.history import Record
from crystal_jax.phases import Plan, make_plan
from crystal_jax.states import FOLDER, POSITION, read_position, saved_states

FIXED = ("config.model", "config.data.seed", "config.data.sequence_length", "config.data.packing",
         "config.data.shuffle", "config.fingerprints.tokenizer", "config.init_from")
"""Where a difference would give the tokens or parameters that a run has another meaning."""


def amended(run_dir: epath.Path, known: Record, plan: dict[str, Any], changes: list[str], config: Config,
            step: int) -> Record:
    """The record of the run in `run_dir` once it follows `plan` from `step` on. Writes nothing.

    Raises:
      UserError: a step that isn't saved, a change that can't be made within a run, a phase boundary in the past moved.
    """
    if fixed := [change for change in changes if change.startswith(FIXED)]:
        raise UserError(f"--amend_from={step}: {fixed[0]}: that can't change within a run; undo it, or start a new run "
                        "with --init_from")
    saved = saved_states(run_dir)
    if step not in saved:
        raise UserError(f"--amend_from={step}: no state of that step; {run_dir} has "
                        f"{', '.join(map(str, saved)) or 'none'}")
    state = run_dir / FOLDER / str(step)
    if not known.accepts(read_position(state)["plan_hash"], step):
        raise UserError(f"--amend_from={step}: {state} is a state of another run; take another step")
    if known.amendments and step < known.amendments[-1]["from_step"]:
        raise UserError(f"--amend_from={step}: the run was amended at step {known.amendments[-1]['from_step']}; amend "
                        "it from there or later")
    recorded = files.read_json(run_dir / "config.json")
    recorded.pop("versions", None)
    old = from_dict(Config, recorded)
    _check_phases(make_plan(old), make_plan(config), step)
    _check_skips(old.data.skip, config.data.skip, step)
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


def _check_skips(old: list[list[int]], new: list[list[int]], step: int) -> None:
    """What was passed over before `step`, and what wasn't, is past."""
    before, now = ([skip for skip in skips if skip[0] <= step] for skips in (old, new))
    if before != now:
        first = min(skip[0] for skip in [*before, *now] if skip not in before or skip not in now)
        raise UserError(f"--amend_from={step}: config.data.skip before step {step + 1} was {before}, is {now}; the run "
                        f"has trained on that: amend it from a step before {first}, or leave that part as it was")


def set_aside(run_dir: epath.Path, record: Record) -> None:
    """Moves what the run saved beyond its last amendment, under the plan it left, to superseded/; may be repeated."""
    if not record.amendments:
        return
    for kept, says in ((FOLDER, POSITION), (EXPORTS, INFO)):  # each the file that makes a folder whole
        for name in sorted(files.list_files(run_dir / kept)):
            if not name.endswith(f"/{says}"):
                continue
            info = files.read_json(run_dir / kept / name)
            if record.accepts(info["plan_hash"], info["step"]):
                continue
            folder = f"{kept}/{name.removesuffix(f'/{says}')}"
            files.move_folder(run_dir / folder, run_dir / "superseded" / info["plan_hash"] / folder, first=says)
    Calendar(run_dir).refresh(record.hash)
