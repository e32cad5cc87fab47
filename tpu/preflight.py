"""What can be checked before money is spent: rights, place, data, fit, cost, how much a preemption loses.

Invariant: it only reads. What can't be learned is said to be unknown, never taken as right; memory is what
the TPU's compiler says, times are named as predicted or assumed, since only a chip knows better.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from crystal_jax.cli import Parser
from crystal_jax.config import Config
from crystal_jax.config_file import load_config
from crystal_jax.data.store import listed
from crystal_jax.errors import UserError, install
from crystal_jax.generations import Slice, find_slice
from crystal_jax.phases import make_plan
from crystal_jax.recipe import parameter_count
from tpu.cloud import Answer, call

GOOD, DOUBTFUL, BAD = "ok", "?", "BAD"
GIB = 2**30
MFU = (0.4, 0.5, 0.6)
WRITERS = {"roles/storage.objectAdmin", "roles/storage.objectUser", "roles/storage.admin"}
REFUSALS = ("NOT_FOUND", "not found", "PERMISSION_DENIED", "403", "matched no objects", "INVALID")
NO_LOGIN = ("active account", "gcloud auth login")
LOST_MINUTES = 30  # between rolling states: more than this costs a spot run dearly


@dataclass(frozen=True)
class Job:
    """What is to be launched."""

    project: str
    zone: str
    bucket: str
    run: str
    piece: Slice
    slices: int
    capacity: str
    service_account: str
    subnetwork: str
    config: Config
    flags: str
    """A named set of compiler flags."""

    @property
    def pod(self) -> str:
        return f"gs://{self.bucket}/{self.run}/pod"

    @property
    def region(self) -> str:
        return self.zone.rsplit("-", 1)[0]


class LoggedOut(Exception):
    """No account is active, or its login has expired."""


class Unknown(Exception):
    """What can't be learned on this machine."""


Line = tuple[str, str]  # GOOD, DOUBTFUL or BAD, and what was found


def ask(*argv: str) -> Answer:
    """One question to gcloud.

    Raises:
      LoggedOut: it wants a login first.
    """
    answer = call(["gcloud", *argv], seconds=120)
    if answer.code and any(text in answer.error for text in NO_LOGIN):
        raise LoggedOut
    return answer


def failed(answer: Answer, mend: str) -> Line:
    said = answer.error.split("ERROR: ")[-1][:200]
    return BAD if any(text in answer.error for text in REFUSALS) else DOUBTFUL, f"{said} ({mend})"


def check_type(job: Job) -> Iterator[Line]:
    """The zone has the type."""
    answer = ask("compute", "tpus", "accelerator-types", "list", f"--zone={job.zone}", f"--project={job.project}",
                 "--format=value(type)")
    if answer.code:
        yield failed(answer, f"see: gcloud compute tpus locations list --project={job.project}")
    elif job.piece.accelerator_type not in answer.out.split():
        yield BAD, (f"{job.zone} has no {job.piece.accelerator_type}; others: "
                    f"https://cloud.google.com/tpu/docs/regions-zones")
    else:
        yield GOOD, f"{job.zone} has {job.piece.accelerator_type}"


def check_quota(job: Job) -> Iterator[Line]:
    """The quotas whose name speaks of this generation and, as it is, of preemptible or not."""
    answer = ask("beta", "quotas", "info", "list", "--service=tpu.googleapis.com", f"--project={job.project}",
                 "--format=json")
    if answer.code:
        yield failed(answer, f"look: https://console.cloud.google.com/iam-admin/quotas?project={job.project}")
        return
    names = {"v5e": "v5lite"}
    wanted = names.get(job.piece.generation.name, job.piece.generation.name)
    needed = job.slices * int(job.piece.accelerator_type.rsplit("-", 1)[1])
    found = []
    for quota in json.loads(answer.out or "[]"):
        name = f"{quota.get('quotaDisplayName', '')} {quota.get('quotaId', '')}"
        plain = "".join(filter(str.isalnum, name.lower()))
        if wanted not in plain or ("preemptible" in plain) != (job.capacity == "spot"):
            continue
        for info in quota.get("dimensionsInfos", ()):
            where = [*info.get("dimensions", {}).values(), *info.get("applicableLocations", ())]
            if job.zone in where or job.region in where:
                found.append((quota.get("quotaDisplayName", name), int(info["details"]["value"])))
    if not found:
        yield DOUBTFUL, f"no quota found that names {job.piece.generation.name} in {job.zone}; {needed} are needed"
    elif max(value for _, value in found) in range(needed):
        yield BAD, f"{found[0][0]}: {found[0][1]} of {needed} needed in {job.zone}; ask for more in the console"
    else:
        yield GOOD, f"{found[0][0]}: {found[0][1]}, {needed} needed"


def check_bucket(job: Job) -> Iterator[Line]:
    """Its place, and what deleted checkpoints go on costing."""
    answer = ask("storage", "buckets", "describe", f"gs://{job.bucket}", "--raw", "--format=json")
    if answer.code:
        yield failed(answer, f"gcloud storage buckets create gs://{job.bucket} --location={job.region} "
                             f"--project={job.project} --uniform-bucket-level-access --soft-delete-duration=0")
        return
    bucket = json.loads(answer.out)
    place = bucket.get("location", "").lower()
    near = place == job.region or (place == "us" and job.region.startswith("us-"))
    yield GOOD if near else BAD, f"gs://{job.bucket} is in {place}, the hosts in {job.region}" + (
        "" if near else ": every checkpoint and batch would cross regions and be billed for it")
    kept = int(bucket.get("softDeletePolicy", {}).get("retentionDurationSeconds", 0))
    if kept or bucket.get("versioning", {}).get("enabled"):
        yield BAD, (f"gs://{job.bucket} keeps what is deleted ({kept / 86400:.0f} days): rolling checkpoints would "
                    f"pile up; gcloud storage buckets update gs://{job.bucket} --clear-soft-delete --no-versioning")


def check_rights(job: Job) -> Iterator[Line]:
    """The hosts' account, its right to the bucket, its right to release the capacity."""
    answer = ask("iam", "service-accounts", "describe", job.service_account, f"--project={job.project}",
                 "--format=value(email)")
    if answer.code:
        yield failed(answer, f"gcloud iam service-accounts create {job.service_account.split('@')[0]} "
                             f"--project={job.project}")
        return
    member = f"serviceAccount:{job.service_account}"
    answer = ask("storage", "buckets", "get-iam-policy", f"gs://{job.bucket}", "--format=json")
    if answer.code:
        yield failed(answer, "you can't read the bucket's policy")
    else:
        roles = {binding["role"] for binding in json.loads(answer.out).get("bindings", ())
                 if member in binding.get("members", ())}
        yield (GOOD, f"{job.service_account} writes gs://{job.bucket}") if roles & WRITERS else (
            BAD, f"{job.service_account} has no right to write gs://{job.bucket}; gcloud storage buckets "
                 f"add-iam-policy-binding gs://{job.bucket} --member={member} --role=roles/storage.objectUser")
    answer = ask("projects", "get-iam-policy", job.project, "--format=json")
    if answer.code:
        yield failed(answer, "you can't read the project's policy")
    else:
        roles = {binding["role"] for binding in json.loads(answer.out).get("bindings", ())
                 if member in binding.get("members", ())}
        yield (GOOD if roles else DOUBTFUL), (
            f"{job.service_account} in the project: {', '.join(sorted(roles)) or 'no role'}; to release capacity by "
            "itself it needs tpu.nodes.delete (docs/tpu.md, Rights)")


def check_network(job: Job) -> Iterator[Line]:
    """Hosts without external addresses reach the bucket through private access."""
    answer = ask("compute", "networks", "subnets", "describe", job.subnetwork, f"--region={job.region}",
                 f"--project={job.project}", "--format=value(privateIpGoogleAccess)")
    if answer.code:
        yield failed(answer, "docs/tpu.md, Network")
    elif answer.out.strip() != "True":
        yield BAD, (f"{job.subnetwork}: the hosts couldn't reach the bucket; gcloud compute networks subnets update "
                    f"{job.subnetwork} --region={job.region} --project={job.project} --enable-private-ip-google-access")
    else:
        yield GOOD, f"{job.subnetwork} in {job.region} has private access to Google's services"


def check_objects(job: Job) -> Iterator[Line]:
    """What the run reads: pushed code, tokenizer, a manifest for each store whose files are all there."""
    answer = ask("storage", "ls", f"{job.pod}/*")
    here = answer.out.split()
    if f"{job.pod}/launch.json" not in here:
        yield BAD, f"{job.pod}/launch.json: missing; run: tpu/push"
    for marker in ("DONE", "FATAL"):
        if f"{job.pod}/{marker}" in here:
            yield BAD, f"{job.pod}/{marker}: the run has ended; to go on: gcloud storage rm {job.pod}/{marker}"
    root = job.config.data.root.rstrip("/")
    if not root.startswith("gs://"):
        yield BAD, f"config.data.root={root}: the hosts read the stores from gs://"
        return
    stores = sorted({source.store for source in job.config.sources.values()})
    for key in (job.config.data.tokenizer, *(f"{store}/manifest.json" for store in stores)):
        answer = ask("storage", "cat", f"{root}/{key}")
        if answer.code:
            yield failed(answer, f"{root}/{key}: make it: crystal-jax prepare, docs/data.md")
        elif key.endswith("manifest.json"):
            yield from check_store(f"{root}/{key}".rsplit("/", 1)[0], json.loads(answer.out))
        else:
            yield GOOD, f"{root}/{key}"


def check_store(store: str, manifest: dict[str, Any]) -> Iterator[Line]:
    """The sizes of the files that the manifest names."""
    answer = ask("storage", "ls", "--long", "--recursive", f"{store}/")
    sizes = {line.split()[2][len(store) + 1:]: int(line.split()[0]) for line in answer.out.splitlines()
             if len(line.split()) == 3 and line.split()[0].isdigit()}
    named = {file.name: file.bytes for file in listed(manifest)}
    wrong = sorted(name for name, size in named.items() if sizes.get(name) != size)
    if answer.code or not named:
        yield DOUBTFUL, f"{store}: has a manifest; whether its files are there isn't known"
    elif wrong:
        yield BAD, f"{store}/{wrong[0]}: missing or of another size, and {len(wrong) - 1} more; see: crystal-jax verify"
    else:
        yield GOOD, f"{store}: {len(named)} files of the stated sizes (their contents: crystal-jax verify {store})"


def check_fit(job: Job) -> Iterator[Line]:
    """The step, compiled for the slice: some seconds of this machine."""
    config = copy.deepcopy(job.config)
    config.training.mesh.slice = job.slices
    try:
        found = compile_plan(config, job.piece, job.slices, job.flags)
    except Unknown as error:
        yield DOUBTFUL, f"whether the step fits isn't known: {error}"
    except UserError as error:
        yield BAD, str(error)
    else:
        memory, step = found["memory"], found["step"]
        text = (f"the step takes {memory['used'] / GIB:.1f} of {memory['usable'] / GIB:.2f} GiB of a device, as "
                f"compiled; predicted: {step['seconds']:.2f} s a step, MFU {step['mfu']:.0%}")
        yield (GOOD, text) if memory["fits"] else (
            BAD, f"out of memory: {text}; what would fit: crystal-jax plan --sweep (docs/planning.md)")


def compile_plan(config: Config, piece: Slice, slices: int, flags: str) -> dict[str, Any]:
    """`plan` of a config, without machine code.

    Raises:
      Unknown: the compiler isn't here.
      UserError: the mesh or the batch doesn't fit the devices, or there are no such flags.
    """
    try:
        from crystal_jax.plan import plan
        from crystal_jax.topology import MISSING, is_installed
    except ImportError as error:
        raise Unknown(f"{error}; {install('tpu')}") from error
    if not is_installed():
        raise Unknown(MISSING)
    return plan(config, piece, slices, flags, machine_code=False)


def flops_per_token(config: Config) -> float:
    """6N + 12·L·D·S, PaLM's convention, which counts the whole attention square."""
    model = config.model
    return 6 * parameter_count(model) + 12 * model.num_layers * model.embed_dim * config.data.sequence_length


def seconds_per_step(job: Job, mfu: float, tokens: int) -> float:
    """Of a step of so many tokens."""
    peak = job.piece.generation.tflops * 1e12 * job.piece.chips * job.slices
    return tokens * flops_per_token(job.config) / (peak * mfu)


def check_cost(job: Job) -> Iterator[Line]:
    """Days and dollars of the whole recipe, and what a preemption loses."""
    plan = make_plan(job.config)
    tokens = plan.tokens(plan.total_steps)
    days = [seconds_per_step(job, mfu, tokens) / 86400 for mfu in MFU]
    price = job.piece.dollars_per_hour(job.capacity == "spot")
    dollars = "the price isn't known" if price is None else "$" + " to $".join(
        f"{value * job.slices * days[1] * 24:,.0f}" for value in dict.fromkeys(price))
    yield GOOD, (f"{tokens:.3g} tokens: {days[0]:.1f} / {days[1]:.1f} / {days[2]:.1f} days at 40/50/60% MFU (assumed), "
                 f"an estimated {dollars} at 50% without preemptions ({job.capacity}, list prices)")
    per_step = tokens / plan.total_steps
    step = seconds_per_step(job, MFU[1], int(per_step))
    checkpoints = job.config.checkpoints
    minutes = min(filter(None, (checkpoints.every_minutes, checkpoints.every_steps * step / 60)))
    late = job.capacity == "spot" and minutes > LOST_MINUTES
    yield (BAD if late else GOOD), (
        f"a state every {minutes:.0f} minutes at {step:.1f} s a step: a preemption loses half of that on average" +
        (f"; set --config.checkpoints.every_minutes=15 (at most {LOST_MINUTES} on spot)" if late else ""))


PLACED = ("type", "quota", "bucket", "network")
"""Of each zone."""
LOCAL = ("memory", "cost")
"""Need no login."""
CHECKS: dict[str, Callable[[Job], Iterator[Line]]] = {
    "type": check_type, "quota": check_quota, "bucket": check_bucket, "rights": check_rights,
    "network": check_network, "objects": check_objects, "memory": check_fit, "cost": check_cost,
}


def read_jobs(argv: list[str] | None) -> tuple[list[Job], bool]:
    """The arguments that tpu/preflight gives, for each zone, and whether to ask nothing."""
    parser = Parser(prog="tpu/preflight", allow_abbrev=False)
    for name in ("project", "zones", "bucket", "run", "type", "capacity", "service-account", "subnetwork",
                 "flag-set"):
        parser.add_argument(f"--{name}", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--slices", type=int, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--yes", action="store_true", help="don't ask")
    parser.add_argument("train", nargs="+", help="the trainer's arguments, after --")
    args = parser.parse_args(argv)
    config = next((item.split("=", 1)[1] for item in args.train if item.startswith("--config=")), None)
    if config is None:
        raise UserError("TRAIN_ARGS: no --config=FILE")
    overrides = [item for item in args.train if item.startswith("--config.")]
    loaded = load_config(config, overrides)
    jobs = [Job(args.project, zone, args.bucket, args.run, find_slice(args.type), args.slices, args.capacity,
                args.service_account, args.subnetwork, loaded, args.flag_set) for zone in args.zones.split(",")]
    return jobs, args.yes


def run_checks(jobs: list[Job], names: Iterable[str]) -> int:
    """Prints the lines of these checks; how many of them are bad.

    Raises:
      LoggedOut: one of them needs a login.
    """
    bad = 0
    for name in names:
        asked = jobs if name in PLACED else jobs[:1]
        for level, text in dict.fromkeys(line for job in asked for line in CHECKS[name](job)):
            print(f"{level:4} {name:8} {text}", flush=True)
            bad += level == BAD
    return bad


def main(argv: list[str] | None = None) -> int:
    """Prints the checks; 0 if none is bad and the question was answered with yes."""
    try:
        jobs, yes = read_jobs(argv)
        remote = [name for name in CHECKS if name not in LOCAL]
        try:
            bad = run_checks(jobs, remote)
        except LoggedOut:
            print(f"{BAD:4} login    gcloud auth login; not looked at: {len(remote)} checks need a login: "
                  f"{', '.join(remote)}", flush=True)
            bad = 1
        bad += run_checks(jobs, LOCAL)
    except UserError as error:
        print(f"tpu/preflight: {error}", file=sys.stderr)
        return error.exit_code
    if bad:
        print(f"{bad} of these must be mended first; nothing was created", file=sys.stderr)
        return 1
    if yes:
        return 0
    print("Go on and pay for this? [y/N] ", end="", file=sys.stderr, flush=True)
    return 0 if sys.stdin.readline().strip().lower() in ("y", "yes") else 1


if __name__ == "__main__":
    sys.exit(main())
