"""The command `verify`: re-reads a token store against its manifest and names each damaged file."""

import argparse

from tqdm import tqdm

from crystal_jax.data import store
from crystal_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="the folder that holds the store's manifest.json")


def main(args: argparse.Namespace) -> int:
    with tqdm(unit="B", unit_scale=True, desc="verifying", mininterval=1) as bar:
        problems = store.verify(args.store, bar.update)
    if problems:
        print("\n".join(problems))
        raise UserError(f"{args.store}: {len(problems)} damaged; run `prepare` again or copy the store again")
    print(f"{args.store}: every file is as prepared")
    return 0
