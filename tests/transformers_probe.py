"""Exported folders in whatever transformers this interpreter has: `python transformers_probe.py JOB.json RESULT.npz`.

Owns no expectation: it loads each folder as a user would and saves what it gives. Nothing of ours may be imported.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports warn of its own and others' deprecations
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 64


def load(folder, **options):
    """The model in float32, once every tensor of it was in the folder and no other."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, torch_dtype=torch.float32, **options)
    assert not any(report.values()), (folder, report)
    return model.eval()


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=options.pop("attention_mask", torch.ones_like(ids)),
                     **options).logits.float().numpy()


def generated(model, ids, **options):
    options = {"attention_mask": torch.ones_like(ids), **options}
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
                              pad_token_id=2, **options).numpy()


def cached_logits(model, ids):
    """The same logits, the last tokens one at a time from the cache."""
    with torch.no_grad():
        first = model(ids[:, :-5], use_cache=True)
        cache, parts = first.past_key_values, [first.logits]
        for at in range(ids.shape[1] - 5, ids.shape[1]):
            step = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            parts.append(step.logits)
    return torch.cat(parts, 1).float().numpy()


def padded(ids, lengths):
    """(rows filled up on the left, their mask)."""
    width = ids.shape[1]
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    return torch.where(mask.bool(), ids, torch.full_like(ids, 2)), mask


def probe(folder, job):
    """Name to array, of one folder."""
    found, ids = {}, torch.tensor(job["ids"])
    for attention in ("eager", "sdpa"):
        model = load(folder, trust_remote_code=job["code"], attn_implementation=attention)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == job["tied"]
        found[f"{attention}.logits"] = logits(model, ids)
        if "prompts" not in job:
            continue
        prompts = torch.tensor(job["prompts"])
        found[f"{attention}.cached_logits"] = cached_logits(model, ids)
        found[f"{attention}.generated"] = generated(model, prompts)
        found[f"{attention}.uncached"] = generated(model, prompts, use_cache=False)
        found[f"{attention}.static"] = generated(model, prompts, cache_implementation="static")
        rows, mask = padded(prompts, job["lengths"])
        found[f"{attention}.padded_logits"] = logits(model, rows, attention_mask=mask)
        found[f"{attention}.padded_generated"] = generated(model, rows, attention_mask=mask)
        found[f"{attention}.padded_static"] = generated(model, rows, attention_mask=mask,
                                                        cache_implementation="static")
    vars(model)["_modules"].pop("_cache", None)  # 4.46 makes a static cache a part of the model
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        found["again.logits"] = logits(load(again, trust_remote_code=job["code"]), ids)
    return found


def main(job_file, result_file):
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    jobs, found = json.loads(Path(job_file).read_text()), {}
    for name, job in jobs.items():
        found |= {f"{name}.{key}": value for key, value in probe(job["folder"], job).items()}
        if job.get("texts"):
            tokenizer = AutoTokenizer.from_pretrained(job["folder"])
            encoded = [tokenizer(text)["input_ids"] for text in job["texts"]]
            found[f"{name}.ids"] = np.array([id for ids in encoded for id in [*ids, -1]])
    found["version"] = np.array(transformers.__version__)
    found["ours"] = np.array([name for name in sys.modules if name.split(".")[0] in ("crystal_jax", "jax", "flax")])
    np.savez(result_file, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
