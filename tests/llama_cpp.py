"""llama.cpp in this process, through xllamacpp: ids of text, the next tokens of ids, and their probabilities."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest


class LlamaCpp:
    """A GGUF file, run on one thread with keys and values in float32."""

    def __init__(self, path: Path, context: int = 512):
        xllamacpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = params.n_batch = context
        params.cpuparams.n_threads = params.n_parallel = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup = params.fit_params = False
        params.port = params.verbosity = 0
        self._server = xllamacpp.Server(params)

    def tokenize(self, text: str, special: bool = True, bos: bool = False) -> list[int]:
        """Ids; `special`: whether "</s>" and the like become one."""
        body = json.dumps({"content": text, "add_special": bos, "parse_special": special}).encode()
        request = urllib.request.Request(f"{self._server.listening_address}/tokenize", body,
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["tokens"]

    def greedy(self, prompt: str | list[int], count: int) -> tuple[str, list[int]]:
        """(text, ids) of the most probable continuation."""
        choice = self._complete(prompt, count, 1)
        return choice["text"], [found["id"] for found in choice["logprobs"]["content"]]

    def next_token(self, ids: list[int], top: int) -> dict[int, float]:
        """The `top` most probable next tokens with their log-probabilities."""
        found = self._complete(ids, 1, top)["logprobs"]["content"][0]["top_logprobs"]
        return {token["id"]: token["logprob"] for token in found}

    def _complete(self, prompt: str | list[int], count: int, top: int) -> Any:
        return self._server.handle_completions({
            "prompt": prompt, "max_tokens": count, "temperature": 0, "logprobs": top, "ignore_eos": True,
            "cache_prompt": False})["choices"][0]
