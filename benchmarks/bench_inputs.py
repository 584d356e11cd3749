"""What the benchmark steps on: rows made of this project's own texts, and models of published shapes.

A model of a `--shape` has random weights, made on the device, and a small tokenizer trained on the same texts. Nothing
is downloaded; its embeddings and head keep the size that the shape's own vocabulary has.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
import transformers

from options import UnlearnOptions
from prompts.tokenizer import load_tokenizer
from run.parsing import parse_run
from sources.rows import Row, read_rows
from utils import load_model, without_dropout

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER_SIZE = 8192  # tokens; the texts of data/ fill no more
LLAMA = dict(hidden_act="silu", max_position_embeddings=4096, bos_token_id=0, eos_token_id=0, pad_token_id=0)
SHAPES = {
    "tiny": lambda: transformers.LlamaConfig(
        vocab_size=TOKENIZER_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, **LLAMA
    ),
    "smollm2-135m": lambda: transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, **LLAMA
    ),
    "llama-3.2-1b": lambda: transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True, **LLAMA
    ),
    "opt-1.3b": lambda: transformers.OPTConfig(
        vocab_size=50272, hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, ffn_dim=8192,
        word_embed_proj_dim=2048, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, pad_token_id=0
    ),
    "llama-7b": lambda: transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        **LLAMA
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RowLengths:
    """Words of the answers: of forget rows, of normal rows, and whether normal rows give the replacement answers (else
    the facts do, in a sentence each)."""

    forget: tuple[int, int]
    normal: tuple[int, int]
    long_replacements: bool = False


ROWS = {
    "long": RowLengths((25, 60), (25, 60)),
    "short": RowLengths((10, 25), (6, 18)),  # as users have them: PKU-SafeRLHF's short answers, TruthfulQA's
    "full": RowLengths((60, 110), (60, 110), long_replacements=True),  # most fill --answer_tokens 128
}


def make_rows(kind: str) -> tuple[list[Row], list[list[Row]]]:
    """Return (forget rows, sources of normal rows): this project's prompts, with answers composed from its facts."""
    lengths, facts = ROWS[kind], read_rows(str(ROOT / "data/facts.jsonl"), "facts")
    text = " ".join(row.response for row in facts).split()

    def answer(number: int, words: tuple[int, int]) -> str:
        start, count = 41 * number % (len(text) - words[1]), words[0] + 7 * number % (words[1] - words[0])
        return " ".join(text[start : start + count])  # answers vary in length, as real ones do

    def answered(file: str, shift: int, words: tuple[int, int]) -> list[Row]:
        rows = read_rows(str(ROOT / "data" / file), file)
        return [Row(row.prompt, answer(i + shift, words)) for i, row in enumerate(rows)]

    forget, normal = answered("harmful.jsonl", 0, lengths.forget), answered("benign.jsonl", 7, lengths.normal)
    if not lengths.long_replacements:
        return forget, [normal, facts]
    return forget, [[dataclasses.replace(row, true_answers=(row.response,)) for row in normal]]


def parse_words(options, extra_answers: int) -> UnlearnOptions:
    """Return the options of a run as the benchmark's own set them."""
    words = [f"--max_unlearn_steps={options.total_steps}", f"--compile={options.compile}", "--save_every=0"]
    words += [f"--gradient_checkpointing={options.gradient_checkpointing}"]
    if options.config:
        return parse_run([f"--config={ROOT / options.config}", *words])
    words += [f"--batch_size={options.batch_size}", f"--max_answer_tokens={options.answer_tokens}",
              f"--set=mismatch.answers={options.num_random_answers + extra_answers}"]  # fmt: skip
    if options.use_lora:
        words += ["--use_lora", f"--set=lora.rank={options.rank}"]
    return parse_run(words)


def tokenizer_of(options):
    """Return the tokenizer of --model_name, or a small one for a --shape."""
    if not options.shape:
        return load_tokenizer(options.model_name)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=TOKENIZER_SIZE, special_tokens=["</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    lines = [json.loads(line) for name in ("facts", "benign", "harmful")
             for line in (ROOT / f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines()]  # fmt: skip
    bpe.train_from_iterator([value for line in lines for value in line.values() if isinstance(value, str)], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="</s>", eos_token="</s>",
                                                pad_token="</s>")  # fmt: skip


def model_of(options, device: torch.device, dtype: torch.dtype):
    """Return the model of --model_name, or one of a --shape with random weights, on the device, without dropout."""
    if not options.shape:
        return load_model(options.model_name, dtype=dtype).to(device)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(SHAPES[options.shape](), dtype=dtype)
    return without_dropout(model).train()
