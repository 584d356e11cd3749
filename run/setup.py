"""Build a run's Setup from its options (processes, rows, model, own answers, reference); save and resume it."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from data_module import Sequence, Sides, make_sequence, read_sides, split_sides
from engine import checkpoint
from engine.adapters import (
    add_lora,
    check_layers,
    check_save_path,
    enable_gradient_checkpointing,
    freeze,
    read_adapter,
    restrict_trainable,
)
from engine.compiled_layers import KnownGraphs
from engine.generation import generate_missing_responses
from engine.loading import load_for_training, refuse_bad_quantisation
from engine.optimizer import MasterWeightAdamW, refuse_missing_8bit
from engine.paths import refuse_no_file, refuse_no_folder
from engine.processes import (
    gather_to_main_cpu,
    possible_parts,
    refuse_idle_processes,
    shard,
    start_processes,
)
from engine.reference import ReferenceCache
from engine.run_metadata import RunMetadata
from engine.saving import SaveForm, came_rounded, choose_save_form, gather_weights, lock_output_dir, write_model
from engine.state import TrainingState
from engine.trained_on import TrainedOn
from engine.tree import AnswerLogitsModel, wrap_model
from evaluation.dev_evaluator import DevEvaluator
from evaluation.metrics.texts import is_empty
from method.draws import Mismatch, Stop
from method.recipe import Recipe, read_recipe
from method.sampler import UnlearnBatchSampler
from method.step import PreparedStep, prepare_step
from method.terms import Term, layers_of, sequences_needing_reference
from options import UnlearnOptions
from prompts.formatter import PromptFormatter
from prompts.tokenizer import load_tokenizer
from prompts.windows import TextCutter, fit_windows
from run.account import SourceAccount, held_out_line
from run.adversary import refuse_no_matrix
from run.asked import ask_about_forget_rows
from run.levels import with_levels
from run.levers import refuse_levers
from run.neighbours_file import Neighbours, add_neighbours
from run.rows import development_rows, log_account, read_chain, without_seen
from run.texts import has_text, refuse_terms_without_prompts
from run.tracker import TrackedLog
from run.warm_up import warm_up
from sources.rows import Row, read_texts
from utils import RunLog, UsageError, atomic_dir, log, pick_dtype

PROBE_CHARACTERS = 200  # of a passage, in place of the prompts that layouts are compared on


@dataclasses.dataclass
class Setup:
    """All objects of a run.

    `newest`: the checkpoint to resume from, or None. `wrapped`: the model as several processes call it. `started`: the
    start of this process, in seconds since the epoch; a resume moves it back by the seconds already spent.
    `graphs`: of the compiled layers, if they are compiled.
    """

    options: UnlearnOptions
    recipe: Recipe
    accelerator: Accelerator
    metadata: RunMetadata
    run_log: RunLog
    newest: Path | None
    started: float
    formatter: PromptFormatter
    sampler: UnlearnBatchSampler
    dev_rows: dict[str, list[Row]]
    trained_on: TrainedOn  # by the runs that made --model_name
    neighbours: Neighbours | None = None  # of --make_neighbours
    account: list[SourceAccount] = dataclasses.field(default_factory=list)
    answer_model: AnswerLogitsModel | None = None
    layout_line: str = ""
    adapters: object = None
    save_form: SaveForm | None = None
    optimizer: MasterWeightAdamW | None = None
    reference: ReferenceCache | None = None
    evaluator: DevEvaluator | None = None
    wrapped: torch.nn.Module | None = None
    graphs: KnownGraphs | None = None

    @property
    def save_dir(self) -> Path:
        return Path(self.options.model_save_dir)

    @property
    def model(self):
        return self.answer_model.model

    def layout(self, sequences):
        """Return the sequences as a Batch in main memory."""
        return self.answer_model.layout(
            sequences, self.recipe.layout.pack_tokens, self.formatter.tokenizer.pad_token_id
        )

    def prepare_step(self, step: int) -> PreparedStep:
        """Return a step as the host prepares it: this process's sequences, laid out, and what is asked of them."""
        sequences = self.sampler.sequences(step, self.formatter)

        def prepared(some: list[Sequence], terms: list[Term] = self.recipe.terms) -> PreparedStep:
            return prepare_step(some, terms, self.layout, self.reference, self.accelerator,
                                num_parts=self.options.gradient_accumulation)  # fmt: skip

        if not self.recipe.perturbed.at(step):
            return prepared(sequences)
        forget = {draw.name for draw in self.sampler.draws if draw.side == "forget"}
        others = prepared([s for s in sequences if s.draw not in forget])
        others.forget = prepared([s for s in sequences if s.draw in forget])
        if adversary := self.recipe.adversary:
            others.relearned = prepared(adversary.draw.sequences(step, self.sampler, self.formatter), [adversary])
        return others


def prepare(options: UnlearnOptions, held: contextlib.ExitStack, sides: Sides | None = None) -> Setup:
    """Read rows and model, and cache the original's answers and states. Raises UsageError before any training.

    sides: the rows, if they are read already (None: those that the options name). `held` closes the lock of the output
    folder at the end of the run.
    """
    started = time.time()
    refuse_no_file("--log_file", options.log_file)
    refuse_no_file("--log_file", RunLog.twin(options.log_file))
    if options.cache_dir != "none":
        refuse_no_folder("--cache_dir", options.cache_dir)
    accelerator = start_processes(options)
    refuse_missing_8bit(options)
    held.callback(lock_output_dir(Path(options.model_save_dir), options, accelerator).close)
    recipe = read_recipe(options)
    refuse_levers(recipe, options, accelerator.num_processes)
    refuse_start_adapter(options)
    sides = sides or read_sides(options)
    tokenizer = load_tokenizer(options.model_name, trust_remote_code=options.trust_remote_code)
    refuse_bad_quantisation(options)
    holdout = [row for source in read_texts(options.holdout_text, "--holdout_text") for row in source.rows]
    neighbours = None
    if options.make_neighbours:
        sides, neighbours = add_neighbours(options, sides, tokenizer, accelerator.device)
    metadata = RunMetadata(options, {side: rows for side in ("forget", "normal", "unseen")
                                      if (rows := sides.rows(side)) or side != "unseen"}
                                     | ({"holdout": holdout} if holdout else {}))  # fmt: skip
    newest = checkpoint.resumable(options, metadata) if options.resume else None
    # data and tokenizer have loaded: a mistyped name must not overwrite an earlier log
    run_log = TrackedLog(options, write=accelerator.is_main_process and not options.dry_run, resume=bool(newest))
    held.callback(run_log.close)
    if neighbours:
        neighbours.warn(options.make_neighbours)
    formatter = PromptFormatter.of(tokenizer, options.model_name, options, options.max_answer_tokens)
    formatter.check_turns(sides.rows("forget") + sides.rows("normal") + sides.rows("unseen"))
    trained_on = read_chain(options.model_name)
    cutter = TextCutter.of(formatter, options)
    splits = without_seen(split_sides(sides, options, cutter), trained_on)
    log.info(held_out_line(splits))
    sampler = UnlearnBatchSampler(
        *([parts["train"] for parts in splits[side] if parts["train"]] for side in ("forget", "normal")),
        recipe.draws,
        seed=options.seed, steps=options.max_unlearn_steps, wording=recipe.wording,
    )  # fmt: skip
    refuse_terms_without_prompts(recipe.terms, options, sampler.rows)
    setup = Setup(
        options, recipe, accelerator, metadata, run_log, newest, started, formatter, sampler,
        development_rows(sides, splits, options, recipe.dev.prompts), trained_on, neighbours,
    )  # fmt: skip
    refuse_idle_processes(accelerator, sampler.examples_per_step())
    load_weights(setup)
    setup.account = log_account(run_log, sampler, formatter, options, sides, splits)
    passages = [make_sequence("holdout", 0, row, formatter) for document in holdout for row in cutter.cut(document)]
    terms = with_levels(recipe.terms, passages, setup.answer_model, setup.layout)
    setup.recipe = dataclasses.replace(recipe, terms=terms)
    ask_original(setup)
    log_notes(setup)
    return setup


def refuse_start_adapter(options: UnlearnOptions) -> None:
    """Raise UsageError if there is no such adapter, or the run trains none that could go on from it."""
    if not options.start_adapter:
        return
    if options.shard or not options.use_lora:
        raise UsageError("--start_adapter: adapters go on in a run that trains some: add --use_lora, leave out --shard")
    if not (Path(options.start_adapter) / "adapter_config.json").is_file():
        raise UsageError(f"--start_adapter {options.start_adapter}: has no adapter_config.json; name the folder "
                         "'adapter' of what a run with --use_lora saved")  # fmt: skip


def refuse_nothing_to_train(setup: Setup, sequences: list[Sequence]) -> None:
    """Say which terms have no sequence among these. Raises UsageError if no term with a weight has one."""
    drawn = {sequence.draw for sequence in sequences}
    silent = [term for term in setup.recipe.terms if term.draw.name not in drawn]
    if not any(term.weight for term in setup.recipe.terms if term not in silent):
        raise UsageError("no row gives a sequence to train on: the terms are "
                         f"{', '.join(term.name for term in silent)}; give rows with what they draw")  # fmt: skip
    for term in silent:
        log.warning("%s: no row gives it a sequence, so it does nothing in this run", term.name)


def log_notes(setup: Setup) -> None:
    """Log what a user may not expect: fewer gradient parts than asked, and defaults that changed (CHANGELOG.md)."""
    recipe, asked = setup.recipe, setup.options.gradient_accumulation
    sequences = setup.sampler.sequences(0, setup.formatter)
    parts = possible_parts(sequences, asked, setup.accelerator.num_processes)
    if 0 < parts < asked:
        log.info("--gradient_accumulation %d: a step's rows fill %d parts, so it runs in %d", asked, parts, parts)
    for term in recipe.terms:
        if term.objective.note:
            log.info("%s: %s is %s", term.name, term.loss, term.objective.note)
    if setup.options.method == "selective":
        log.info("log: the terms' fields are %s (earlier versions: bad_loss, random_loss, normal_loss, first_token_kl)",
                 ", ".join(term.field for term in recipe.terms))  # fmt: skip
    if {Mismatch, Stop} <= {type(draw) for draw in setup.sampler.draws}:
        log.info("the terms of the draws mismatch and stop have a mean each (earlier versions: one for both)")
    if recipe.trainable.frozen_layers:
        log.info("frozen_layers: all that feeds the first trained layer is frozen, and under --gradient_checkpointing "
                 "nothing of it runs twice (earlier versions: not so)")  # fmt: skip
    if any(getattr(draw, "prefill_tokens", 0) for draw in setup.sampler.draws):
        log.info("prefill_tokens: the last token of a prefix has a target too (earlier versions: none)")
    if recipe.own_answers.temperature and setup.metadata.has_own_answers:
        log.info("own answers depend on seed and prompt only (earlier versions: also on the other prompts of a batch)")


def load_weights(setup: Setup) -> None:
    """Load the model, add its adapters, shard it, and build its optimizer."""
    options, recipe, accelerator, formatter = setup.options, setup.recipe, setup.accelerator, setup.formatter
    dtype = pick_dtype(options.dtype, accelerator.device)
    model, base_fingerprint = load_for_training(options, accelerator.device, dtype)
    setup.save_form = choose_save_form(options, model, dtype)
    setup.metadata.set_base_model(base_fingerprint, dtype)
    answer_tokens = max(options.max_answer_tokens, setup.sampler.answer_tokens("normal"), recipe.dev.tokens)
    formatter.fit(model.config, answer_tokens)
    if has_text(setup.sampler.rows):
        fit_windows(formatter, model.config, options.text_window)
    first_rows = [source[0] for sources in setup.sampler.rows.values() for source in sources]
    prompts = [row.prompt or row.key[:PROBE_CHARACTERS] for row in first_rows]
    answer_model, setup.layout_line = wrap_model(model, formatter, prompts, recipe.layout.pack_tokens)
    if not answer_model.packed:
        setup.layout_line += "; the original stays in memory as a second model"
    frozen = freeze(model, recipe.trainable.frozen_layers)
    setup.adapters = add_lora(model, recipe.lora, frozen) if options.use_lora else None
    restrict_trainable(model, recipe.trainable.parameters)
    check_layers(model, layers_of(recipe.terms))
    probe = torch.tensor([formatter.prompt(prompts[0])[-8:]], device=next(model.parameters()).device)  # (1, T)
    check_save_path(model, setup.adapters, probe, recipe.lora.targets)
    if options.gradient_checkpointing:
        enable_gradient_checkpointing(model, recipe.trainable.frozen_layers)
    if options.shard:
        if not answer_model.packed:
            raise UsageError(f"--shard needs the packed layout, and this model does not take it ({setup.layout_line})")
        shard(answer_model, dtype, accelerator.device.type)
    masters = torch.float32 if options.shard else dtype  # a sharded model's parameters are the fp32 masters
    setup.optimizer, setup.answer_model = MasterWeightAdamW(model, recipe.optimizer, masters), answer_model
    refuse_no_matrix(setup)
    name, count = str(dtype).removeprefix("torch."), accelerator.num_processes
    setup.run_log.event(
        "model", f"{options.model_name} in {name} on {accelerator.device}, template {formatter.style}, "
        f"{setup.layout_line}; {count} process{'es, the model sharded over them' if options.shard else ''}",
        packed=answer_model.packed, dtype=name, processes=count, shard=options.shard,
    )  # fmt: skip
    log.info(setup.save_form.line())
    if setup.optimizer.not_fused and accelerator.device.type == "cuda":
        log.info("the update goes through the weights in parts: %s", setup.optimizer.not_fused)
    if options.deterministic and accelerator.device.type == "cuda":
        log.info("deterministic: torch's kernels give the same bits on this GPU and these packages; it warns of those "
                 "that do not, and another GPU, batch layout or number of processes rounds otherwise")  # fmt: skip
    if came_rounded(options.model_name):
        log.info("%s was saved in bf16: the fp32 rests of that run's weights are not in it", options.model_name)


def ask_original(setup: Setup) -> None:
    """Generate the original's own answers, then cache its states for all sequences that need them."""
    options, recipe, sampler = setup.options, setup.recipe, setup.sampler

    def bar(items, label: str):
        return tqdm(items, desc=label, leave=False, disable=None)  # disable=None: a bar on a terminal, none in a file

    def answer(rows: list[Row], tokens: int) -> list[Row]:
        if options.dry_run:  # the plan needs only lengths
            return [row if row.response else dataclasses.replace(row, response=f"own answer {row.prompt[:30]} " * 8)
                    for row in rows]  # fmt: skip
        answered = generate_missing_responses(
            rows, setup.answer_model.generator, setup.formatter, fingerprint=setup.metadata.base_model, tokens=tokens,
            temperature=recipe.own_answers.temperature, seed=options.seed, batch_size=recipe.own_answers.batch_size,
            cache_dir=None if options.cache_dir == "none" else options.cache_dir,
            progress=lambda chunks: bar(chunks, "own answers"),
        )  # fmt: skip
        setup.metadata.add_answers([new for new, old in zip(answered, rows, strict=True) if old.response is None])
        return answered

    ask_about_forget_rows(setup, bar)
    forget = sampler.rows["forget"]
    asked = [(s, i) for s, i in sampler.answered_rows("forget") if forget[s][i].response is None]
    sampler.fill_responses(answer)
    if asked and not options.dry_run and all(is_empty(forget[s][i].response) for s, i in asked):
        log.warning("%s: all of its own answers to %d forget prompts are empty, so nothing of them is unlearned: give "
                    "rows with a response, or another model", options.model_name, len(asked))  # fmt: skip
    normal_tokens = sampler.answer_tokens("normal") or options.max_answer_tokens
    setup.evaluator = DevEvaluator(
        answer(setup.dev_rows["forget"], options.max_answer_tokens), answer(setup.dev_rows["normal"], normal_tokens),
        setup.formatter, answer_tokens=recipe.dev.tokens, pack_tokens=recipe.layout.pack_tokens,
        batch_size=recipe.own_answers.batch_size,
    )  # fmt: skip
    if options.dry_run:
        refuse_nothing_to_train(setup, [s for step in range(min(20, sampler.steps)) for s in
                                        sampler.sequences(step, setup.formatter)])  # fmt: skip
        return
    scheduled = [s for step in range(options.max_unlearn_steps) for s in sampler.sequences(step, setup.formatter)]
    refuse_nothing_to_train(setup, scheduled)
    setup.reference = ReferenceCache(
        setup.answer_model, sequences_needing_reference(scheduled, recipe.terms), recipe.layout.pack_tokens,
        setup.formatter.tokenizer.pad_token_id, layers=layers_of(recipe.terms),
        progress=lambda chunks: bar(chunks, "reference"),
    )  # fmt: skip
    dev_normal = [s for s in setup.evaluator.sequences if s.draw == "normal"]
    setup.reference.precompute(setup.answer_model, dev_normal)
    mib, seconds = setup.reference.bytes() / 2**20, time.time() - setup.started
    setup.run_log.event("reference", f"the original's states: {mib:.0f} MiB, ready after {seconds:.0f} s",
                        mib=mib, seconds=seconds)  # fmt: skip
    setup.run_log.event("objective", "minimised: " + ", ".join(f"{t.weight:g} x {t.name}" for t in recipe.terms),
                        terms=[t.describe() for t in recipe.terms])  # fmt: skip
    if options.start_adapter:  # only now: what was asked of the original was asked without them
        start_from_adapter(setup)
    setup.wrapped = setup.answer_model if options.shard else setup.accelerator.prepare(setup.answer_model)
    warm_up(setup)


def start_from_adapter(setup: Setup) -> None:
    """Give the adapters the weights of an earlier run's. Raises UsageError if they are not of these adapters."""
    optimizer, folder = setup.optimizer, setup.options.start_adapter
    weights = read_adapter(folder, optimizer.names, setup.recipe.lora)
    pairs = zip(optimizer.names, weights, optimizer.parameters, strict=True)
    if wrong := [names[0] for names, weight, parameter in pairs if weight.shape != parameter.shape]:
        raise UsageError(f"--start_adapter {folder}: {wrong[0]} has another shape there; name the model that it was "
                         "trained on")  # fmt: skip
    optimizer.restore([w.to(p.device) for w, p in zip(weights, optimizer.parameters, strict=True)])
    setup.run_log.event("start", f"the adapters go on from {folder}; what is compared is compared with "
                        f"{setup.options.model_name} itself", adapter=folder)  # fmt: skip


# ------------------------------------------------------------------------------------- checkpoints of a run
def save_checkpoint(setup: Setup, state: TrainingState) -> None:
    """Write a checkpoint of the run. Every process must call it, since sharded tensors are gathered."""
    options, optimizer = setup.options, setup.optimizer
    tensors, weights = optimizer.state(masters=False), gather_weights(setup.model, optimizer, setup.adapters)
    saved = dataclasses.replace(state, seconds=time.time() - setup.started)
    if state.best is not None:
        gathered = [gather_to_main_cpu(tensor) for tensor in state.best.weights]
        saved.best = dataclasses.replace(state.best, weights=gathered)
    for name in checkpoint.LISTS:
        if (tensors_of_run := getattr(state, name)) is not None:
            setattr(saved, name, [gather_to_main_cpu(tensor) for tensor in tensors_of_run])
    if setup.accelerator.is_main_process:
        folder = checkpoint.folder_of(setup.save_dir)
        path = folder / f"step-{state.step:06d}"
        with atomic_dir(path) as partial:
            write_model(partial, setup.model, weights, setup.adapters, setup.formatter.tokenizer, options)
            setup.trained_on.with_run(setup.sampler.trained_keys(state.step)).write(partial)  # it may become a base
            checkpoint.write_state(partial, saved, tensors, optimizer.progress(), setup.metadata.identity(),
                                   weights=weights, names=optimizer.names)  # fmt: skip
        checkpoint.prune_checkpoints(folder, setup.recipe.checkpoints.keep, path)
    setup.accelerator.wait_for_everyone()


def resume_or_start(setup: Setup) -> TrainingState:
    """Return the state of the newest checkpoint, or the state of a new run."""
    options, folder = setup.options, checkpoint.folder_of(setup.save_dir)
    if setup.newest:
        state = checkpoint.read_state(setup.newest, setup.optimizer, setup.metadata.identity())
        setup.started -= state.seconds
        setup.run_log.event("resume", f"resumed after step {state.step}, from {setup.newest}", step=state.step)
        return state
    if options.resume:
        log.info("--resume: no valid checkpoint of this run in %s; the run starts at step 0", folder)
    if options.overwrite and setup.accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    return TrainingState()
