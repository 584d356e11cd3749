"""Tiny random models with real byte-level BPE tokenizers, and the real command line to run on them."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from utils import without_dropout

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
torch.set_num_threads(1)  # tiny models; make test runs two files at a time

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(kind: str):
    """Byte-level BPE trained on this project's own prompts. `opt`: </s> in front, pad 1; `chat`: pad = end of turn."""
    rows = [json.loads(line) for line in (ROOT / "data" / "facts.jsonl").read_text().splitlines()]
    special = ["<s>", "<pad>", "</s>", "<unk>"] if kind == "opt" else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator([text for row in rows for text in (row["prompt"], row["response"])], trainer)
    if kind == "opt":
        bpe.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=bpe, bos_token="</s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(family: str, vocabulary: int = 600, layers: int = 2):
    """A random model of a family, with weights large enough that its answers differ."""
    small = dict(vocab_size=vocabulary, num_attention_heads=4, num_hidden_layers=layers, max_position_embeddings=512)
    if family == "opt":
        config = transformers.OPTConfig(
            hidden_size=32, ffn_dim=64, word_embed_proj_dim=16, pad_token_id=1, bos_token_id=2, eos_token_id=2,
            do_layer_norm_before=True, **small,
        )  # fmt: skip
    elif family == "llama":
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=True,
            pad_token_id=2, bos_token_id=1, eos_token_id=2, **small,
        )  # fmt: skip
    elif family == "gpt_neox":
        config = transformers.GPTNeoXConfig(hidden_size=32, intermediate_size=64, **small)
    elif family == "qwen2":
        config = transformers.Qwen2Config(hidden_size=32, intermediate_size=64, num_key_value_heads=2, **small)
    elif family in ("gemma", "gemma3"):  # tied; gemma3: its layers but every sixth look back 64 tokens
        kind = transformers.GemmaConfig if family == "gemma" else transformers.Gemma3TextConfig
        window = {} if family == "gemma" else {"sliding_window": 64}
        config = kind(hidden_size=32, intermediate_size=64, num_key_value_heads=2, head_dim=8, **window, **small)
    elif family == "gemma2":
        config = transformers.Gemma2Config(hidden_size=32, intermediate_size=64, num_key_value_heads=2, head_dim=8,
                                           final_logit_softcapping=5.0, **small)  # fmt: skip
    elif family == "granite":
        config = transformers.GraniteConfig(hidden_size=32, intermediate_size=64, num_key_value_heads=2,
                                            logits_scaling=3.0, **small)  # fmt: skip
    elif family == "cohere":
        config = transformers.CohereConfig(hidden_size=32, intermediate_size=64, num_key_value_heads=2,
                                           logit_scale=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                                           **small)  # fmt: skip
    elif family == "mixtral":  # every layer's experts in one tensor
        config = transformers.MixtralConfig(hidden_size=32, intermediate_size=64, num_key_value_heads=2,
                                            num_local_experts=4, **small)  # fmt: skip
    elif family == "bloom":
        config = transformers.BloomConfig(vocab_size=vocabulary, hidden_size=32, n_layer=2, n_head=4)
    elif family == "mpt":
        config = transformers.MptConfig(vocab_size=vocabulary, d_model=32, n_layers=2, n_heads=4, max_seq_len=512)
    elif family == "gpt_neo":  # its second layer looks back 64 tokens
        config = transformers.GPTNeoConfig(vocab_size=vocabulary, hidden_size=32, num_layers=2, num_heads=4,
                                           attention_types=[[["global", "local"], 1]], window_size=64)  # fmt: skip
    elif family == "mamba":
        config = transformers.MambaConfig(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, state_size=8)
    elif family == "qwen3_next":  # layers with a state beside layers with keys and values
        config = transformers.Qwen3NextConfig(
            hidden_size=32, intermediate_size=64, num_key_value_heads=2, head_dim=8, linear_num_value_heads=4,
            linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
            layer_types=["linear_attention", "full_attention"], **small,
        )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return without_dropout(model).train()


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for family, kind in (("opt", "opt"), ("llama", "chat")):
        folders[family] = tmp_path_factory.mktemp(family)
        tokenizer = make_tokenizer(kind)
        tiny_model(family, len(tokenizer)).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="session")
def data_files(tmp_path_factory) -> dict[str, Path]:
    """A few harmful rows with answers, and normal rows: one source with answers, one of prompts alone."""
    folder = tmp_path_factory.mktemp("data")
    forget = [{"prompt": f"How do I break lock number {i}?", "response": f"Take the red pick {i}."} for i in range(12)]
    facts = [{"prompt": f"What is {i} plus {i}?", "response": f"{i} plus {i} is {2 * i}."} for i in range(14)]
    plain = [{"prompt": f"Write a line about tree {i}."} for i in range(8)]
    files = {}
    for name, rows in (("forget", forget), ("facts", facts), ("plain", plain)):
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run_python(*words, cwd: Path, env: dict = ENVIRONMENT):
    """The interpreter with these words; returns the finished process with its output as text."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=env)


class ScriptServer:
    """One process with the packages loaded, from which scripts are forked (tests/script_server.py)."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen([sys.executable, ROOT / "tests/script_server.py"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def run(self, script: str, words, cwd: Path):
        """Run a script as `run_python` does."""
        files = {name: str(Path(self.folder.name) / name) for name in ("stdout", "stderr")}
        asked = {"script": script, "argv": list(map(str, words)), "cwd": str(cwd), **files}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        code = int(self.process.stdout.readline())
        said = {name: Path(file).read_text(encoding="utf-8") for name, file in files.items()}
        return subprocess.CompletedProcess([script, *words], code, **said)


@functools.cache
def script_server() -> ScriptServer:
    return ScriptServer()


def poison_losses(monkeypatch, is_poisoned, value: float = float("nan")) -> None:
    """From here on, the first term's loss of the calls (1, 2, ...) that `is_poisoned` names is `value`."""
    from method import step

    real, calls = step.compute_losses, []

    def poisoned(*arguments):
        calls.append(1)
        terms = real(*arguments)
        if is_poisoned(len(calls)):
            terms[0].loss = terms[0].loss * value
        return terms

    monkeypatch.setattr(step, "compute_losses", poisoned)


def run_cli(script: str, *words, cwd: Path, launcher: tuple[str, ...] = (), env: dict | None = None,
            quiet: bool = False, own: bool = False):  # fmt: skip
    """Run a script as its user does; returns the finished process with its output as text.

    `quiet`: for a refusal that comes after the log has begun; keeps its last line of the error output only. `own`: in
    an interpreter of its own, as with a launcher or an environment, not forked from one with the packages loaded."""
    if own or launcher or env or sys.platform == "win32":
        run = run_python(*launcher, ROOT / script, *words, cwd=cwd, env=ENVIRONMENT | (env or {}))
    else:
        run = script_server().run(script, words, cwd)
    if quiet and "Traceback" not in run.stderr:
        run.stderr = run.stderr.splitlines()[-1]
    return run


def one_line_error(process, code: int = 2) -> str:
    """The one line that a refused command prints; fails on a traceback, a second line or another exit code."""
    assert process.returncode == code, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, process.stderr
    return lines[0]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def docs_script(name: str):
    """A script of docs/, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def share_of_update(start: Path, one: Path, other: Path) -> float:
    """How far two results lie apart, in units of the way that the first one went."""
    start, a, b = weights(start), weights(one), weights(other)
    assert a.keys() == b.keys()
    update = torch.cat([(a[k] - start[k]).flatten() for k in a]).norm()
    return (torch.cat([(a[k] - b[k]).flatten() for k in a]).norm() / update).item()
