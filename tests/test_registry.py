"""seqio as the registry of a recipe: names, rates, documents and windows, the vocabulary; and training without it.

seqio imports TensorFlow, so everything that needs it is asked of one process (registry_probe.py).
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import OUTER_ENVIRONMENT, ROOT
from hypothesis import given
from hypothesis import strategies as st
from world import make_config, write_config

from crystal_jax.config import Config, Phase, Source, Subset
from crystal_jax.data import registry
from crystal_jax.data.documents import count_documents, read_documents
from crystal_jax.data.pipeline import Batches, Stores
from crystal_jax.data.store import TokenStore
from crystal_jax.errors import UserError
from crystal_jax.phases import make_plan
from crystal_jax.rules import validate

from configs import crystal_7b, crystal_tiny

LENGTH = 32
SUBSETS = {"world.code": ("code", Subset()), "world.text": ("text", Subset()),
           "world.text.even": ("text", Subset("even")), "world.text.odd": ("text", Subset("odd")),
           "world.text.first0.5": ("text", Subset(first=0.5))}
RECIPES = {"crystal_tiny": crystal_tiny.get_config, "crystal_7b": crystal_7b.get_config}


def environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**OUTER_ENVIRONMENT, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2",
            "PYTHONPATH": os.pathsep.join(paths), **more}


def run_python(*args: object) -> str:
    result = subprocess.run([sys.executable, *map(str, args)], env=environment(), cwd=ROOT, capture_output=True,
                            text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def found(world: Path) -> dict[str, Any]:
    """What registry_probe.py found out about `world`."""
    if not importlib.util.find_spec("seqio"):
        pytest.skip("needs seqio: pip install -r requirements/data.txt")
    return json.loads(run_python(ROOT / "tests" / "registry_probe.py", world))


def view_of(world: Path, task: str, split: str = "train") -> tuple[TokenStore, Any]:
    source, subset = SUBSETS[task]
    store = TokenStore.open(world / source)
    return store, store.view("train", subset.files, subset.first) if split == "train" else store.view(split)


def test_each_source_is_a_task_and_each_phase_a_mixture(found: dict[str, Any]) -> None:
    phases = {"world.phase1", "world.phase2", "world.phase3"}
    assert set(found["names"]) == SUBSETS.keys() | phases
    assert found["again"], "the same recipe may be registered twice"


@pytest.mark.parametrize("name", RECIPES)
def test_rates_are_the_quotas(found: dict[str, Any], name: str) -> None:
    """What seqio itself answers, for the three phases of the small recipe and of the full one."""
    config = validate(RECIPES[name]())
    plan = make_plan(config)
    assert len(plan.phases) == 3
    for placed in plan.phases:
        seen = found["recipes"][name][placed.phase.name]
        names = {source: registry.task_name(config, source, placed.phase.subset.get(source, Subset()))
                 for source in placed.quotas}
        assert seen["rates"] == {names[source]: quota for source, quota in placed.quotas.items()}
        assert seen["stated"] == seen["rates"]
        assert all(isinstance(rate, int) for rate in seen["stated"].values())
        assert seen["total"] == placed.steps * placed.phase.global_batch_size


def test_rates_are_what_the_batches_draw(found: dict[str, Any], world: Path) -> None:
    config = make_config(world)
    batches = Batches(config, Stores(config))
    plan = make_plan(config)
    for placed in plan.phases:
        drawn = {name: batches.counts(placed.end)[name] - batches.counts(placed.start)[name]
                 for name in placed.quotas}
        seen = found["world_rates"][placed.phase.name]["rates"]
        assert {task.split(".")[1]: rate for task, rate in seen.items()} == drawn


def test_names_say_what_a_phase_reads() -> None:
    config = crystal_7b.get_config()
    rates = registry.rates(config)
    assert list(rates) == ["crystal_7b.phase1", "crystal_7b.phase2", "crystal_7b.phase3"]
    assert "crystal_7b.C4.even" in rates["crystal_7b.phase1"]
    assert "crystal_7b.C4.odd" in rates["crystal_7b.phase2"] and "crystal_7b.StarCoder" in rates["crystal_7b.phase2"]
    assert {"crystal_7b.C4.first0.1", "crystal_7b.python"} <= rates["crystal_7b.phase3"].keys()
    assert registry.task_name(config, "C4") == "crystal_7b.C4"
    assert registry.task_name(config, "C4", Subset("odd", 0.25)) == "crystal_7b.C4.odd.first0.25"


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.01, 1), min_size=1), st.integers(1, 300),
       st.integers(1, 64))
def test_rates_add_up_to_the_phase(weights: dict[str, float], steps: int, batch: int) -> None:
    total = sum(weights.values())
    mix = {name: weight / total for name, weight in weights.items()}
    config = Config(name="any", sources={name: Source(name) for name in mix},
                    phases=[Phase("only", steps=steps, global_batch_size=batch, mix=mix)])
    (rates,) = registry.rates(config).values()
    assert sum(rates.values()) == steps * batch
    assert rates == {f"any.{name}": quota for name, quota in make_plan(config).phases[0].quotas.items()}


@pytest.mark.parametrize("task", SUBSETS)
def test_a_task_has_the_stores_documents(found: dict[str, Any], world: Path, task: str) -> None:
    for split in ("train", "heldout"):
        store, view = view_of(world, task, split)
        wanted = [document for span in view.shards for document in read_documents(store, view, split, span)]
        seen = found["documents"][task][split]
        assert seen["ids"] == [document.id for document in wanted]
        assert seen["sources"] == [document.source for document in wanted]
        assert seen["targets"] == [document.ids.tolist() for document in wanted]
        assert sum(seen["targets"], start=[]) == view.read(0, view.num_tokens).tolist()  # noqa: RUF017
    assert found["counts"][task] == len(found["documents"][task]["train"]["ids"])


def test_text_tokenises_to_the_stored_ids(found: dict[str, Any], world: Path) -> None:
    tokenizer = Stores(make_config(world)).tokenizer
    for task in ("world.text", "world.code"):
        seen = found["documents"][task]["train"]
        assert len(seen["texts"]) > 100
        for text, ids in zip(seen["texts"], seen["targets"], strict=True):
            assert [tokenizer.bos_id, *tokenizer.encode_document(text), tokenizer.eos_id] == ids


def test_the_texts_are_the_raw_documents(found: dict[str, Any], world: Path) -> None:
    raw = sorted(json.loads(line)["text"] for file in (world / "raw" / "code").glob("*.jsonl")
                 for line in file.read_text(encoding="utf-8").splitlines())
    seen = found["documents"]["world.code"]
    assert sorted(seen["train"]["texts"] + seen["heldout"]["texts"]) == raw


@pytest.mark.parametrize("task", SUBSETS)
def test_windows_follow_one_another(found: dict[str, Any], world: Path, task: str) -> None:
    _, view = view_of(world, task)
    windows = np.array(found["windows"][task])
    assert windows.shape == (view.num_tokens // LENGTH, LENGTH)
    np.testing.assert_array_equal(windows.ravel(), view.read(0, windows.size))


def test_a_mixtures_shares_are_the_phases(found: dict[str, Any], world: Path) -> None:
    sample, rates = found["sample"], found["world_rates"]["phase2"]["rates"]
    assert set(sample) == set(rates), "each window is one of the phase's own subsets"
    drawn, total = sum(sample.values()), sum(rates.values())
    for task, rate in rates.items():
        # Four standard deviations of a draw: seqio's mixing is random, ours isn't.
        share = rate / total
        assert abs(sample[task] / drawn - share) < 4 * (share * (1 - share) / drawn) ** 0.5
    assert found["mixed_texts"], "a mixture passes the text on where it is asked to"


def test_shards_and_orders(found: dict[str, Any]) -> None:
    whole = found["documents"]["world.text"]["train"]["ids"]
    first, second = found["by_shard"]
    assert sorted(first + second) == sorted(whole) and not set(first) & set(second)
    assert {name.split(":")[0] for name in first} == {"0.jsonl", "2.jsonl"}, "the even files"
    one, again, other = found["orders"]
    assert one == again != other
    assert sorted(one) == sorted(other) == sorted(whole) and one != whole


def test_a_feature_converter_takes_it(found: dict[str, Any]) -> None:
    assert found["model_features"]["decoder_target_tokens"] == [LENGTH]
    assert found["model_features"]["decoder_input_tokens"] == [LENGTH]


def test_the_vocabulary_is_the_tokenizer(found: dict[str, Any], world: Path) -> None:
    seen, tokenizer = found["vocabulary"], Stores(make_config(world)).tokenizer
    assert seen["encoded"] == [tokenizer.encode_document(text) for text in seen["texts"]]
    assert seen["encoded_tf"] == seen["encoded_by_map"] == seen["encoded"]
    assert "shape=(None,), dtype=tf.int32" in seen["element"]
    assert seen["decoded"] == seen["decoded_tf"] == seen["decoded_batch"] == seen["texts"]
    assert seen["decoded_nothing"] == "" and seen["out_of_range"] == seen["texts"][5]
    assert seen["sizes"] == [tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, 0]
    assert seen["equal"] and seen["unlike"], "a Mixture refuses Tasks of unequal vocabularies"


@pytest.mark.parametrize("rename, message", [
    ({"code": "my code"}, "'odd.my code' can't be a name"),
    ({"code": "phase1"}, "'odd.phase1' would be a source and a phase"),
    ({"code": "a/b"}, "'odd.a/b' can't be a name"),
])
def test_names_that_seqio_refuses(rename: dict[str, str], message: str) -> None:
    sources = {rename.get(name, name): Source(name) for name in ("text", "code")}
    config = Config(name="odd", sources=sources, phases=[Phase("phase1", steps=1, mix=dict.fromkeys(sources, 0.5))])
    names = [registry.task_name(config, source) for source in sources]
    with pytest.raises(UserError, match=message) as error:
        registry._check_names(config, [*names, *registry.rates(config)])
    assert "\n" not in str(error.value) and "rename" in str(error.value)


def test_without_seqio(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seqio", None)
    for call in (lambda: registry.register(make_config(world)), lambda: registry.make_vocabulary(None)):  # type: ignore
        with pytest.raises(UserError, match=r"seqio: can't be imported .* pip install .*requirements/data.txt"):
            call()


@pytest.mark.parametrize("block", [1, 50, 1 << 20])
@pytest.mark.parametrize("first", [1.0, 0.5, 0.37, 0.01])
def test_documents_are_the_view(world: Path, monkeypatch: pytest.MonkeyPatch, block: int, first: float) -> None:
    monkeypatch.setattr("crystal_jax.data.documents.BLOCK_TOKENS", block)
    store = TokenStore.open(world / "code")
    view = store.view(first=first)
    for span in view.shards:
        documents = list(read_documents(store, view, "train", span))
        assert len(documents) == count_documents(store, "train", span)
        ids = np.concatenate([document.ids for document in documents])
        np.testing.assert_array_equal(ids, view.read(span.start, span.tokens))
        assert [document.id for document in documents] == store.documents("train", span.name).ids[: len(documents)]


def test_the_reader_of_prepare_reads_a_task(found: dict[str, Any]) -> None:
    seen = found["documents"]["world.text.even"]["train"]
    assert [identity for _, identity, _ in found["as_read"]] == seen["ids"]
    assert [text for _, _, text in found["as_read"]] == seen["texts"]
    inputs = list(dict.fromkeys(name for name, _, _ in found["as_read"]))
    assert inputs == ["world.text.even/00", "world.text.even/01"], "an input per shard"


@pytest.mark.drill
def test_a_task_can_be_prepared_again(found: dict[str, Any], world: Path, tmp_path: Path,
                                      run_cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """`prepare --source=seqio:...` of a registered Task writes the documents that the Task was made of."""
    (tmp_path / "my_tasks.py").write_text(
        "from pathlib import Path\nfrom crystal_jax.data.registry import register\nfrom world import make_config\n"
        f"register(make_config(Path({str(world)!r})))\n")
    paths = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    result = run_cli("prepare", "--source=seqio:world.text.even", "--input=my_tasks", "--name=again", "--workers=1",
                     f"--tokenizer={world / 'tokenizer.json'}", f"--output={tmp_path}", "--heldout=0", "--id_key=id",
                     env={"PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "2"})
    assert result.returncode == 0, result.stderr
    store = TokenStore.open(tmp_path / "again")
    view = store.view()
    again = [document for span in view.shards for document in read_documents(store, view, "train", span)]
    seen = found["documents"]["world.text.even"]["train"]
    assert [document.id for document in again] == seen["ids"]
    assert [document.ids.tolist() for document in again] == seen["targets"]


TRAIN = """
import sys
from crystal_jax.cli import main
code = main(sys.argv[1:])
heavy = sorted({"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "apache_beam"} & set(sys.modules))
print("LOADED", *heavy)
sys.exit(code)
"""


def test_training_loads_neither_tensorflow_nor_seqio(world: Path, tmp_path: Path) -> None:
    """Two steps, an evaluation, a checkpoint: the whole command, with both packages there to be loaded."""
    config = write_config(world, tmp_path / "world_config.py")
    steps = [f"--config.phases[{index}].{field}" for index, field in
             ((0, "steps=1"), (1, "steps=1"), (2, "tokens=None"), (2, "steps=1"))]
    output = run_python("-c", TRAIN, "train", f"--config={config}", f"--run_dir={tmp_path / 'run'}", *steps)
    assert "LOADED\n" in output, output
    assert (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").count('"loss"') >= 2
