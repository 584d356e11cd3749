"""The model card: README.md of a model folder, with the metadata that the hub reads.

The card holds no prompt and no answer, since it goes where the model goes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import jinja2
import yaml

from engine.paths import read_args
from evaluation.page.tables import group_table, worst_attack_line
from evaluation.page.wording import sentence
from hub import cached_file
from sources.containers import RECORD_KINDS, TEXT_KINDS, kind_of
from sources.folders import HUB
from utils import atomic_write_text

CARD = "README.md"
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name on the hub


def write_model_card(folder: Path, report: dict | None = None) -> None:
    """Write README.md of a model folder from its unlearn_args.json and, once evaluated, the figures of its report."""
    made = read_args(folder)
    assert made, folder
    options = {"recipe": None, **made["options"]}  # a folder made before recipes has none
    sides = {side: listed(options, side) for side in ("forget", "normal")}
    is_moved = report and Path(report["before"]).exists()  # a name that was relative to another folder is no hub name
    base = report["before"] if is_moved else options["model_name"]
    stated = front_matter(folder / CARD).get("base_model")  # by an earlier card, of the machine that made the model
    data = metadata(base, [spec for specs in sides.values() for spec in specs], stated)
    card = _cards.get_template("model_card.md").render(
        front_matter=yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000),
        metadata=data,
        options=options,
        sides=sides,
        run=made["run"],
        terms=made.get("terms", []),
        report=report,
        rows=group_table(report | {"groups": [g for g in report["groups"] if g["counts"]]}).rows if report else [],
        worst_attack=worst_attack_line(report) if report else "",
    )
    atomic_write_text(folder / CARD, card)


def listed(options: dict, side: str) -> list[str]:
    """Return the data and texts of a side as they were named, each once: a file named twice only weighs more."""
    return list(dict.fromkeys([*options[f"{side}_data"], *options.get(f"{side}_text", [])]))


def metadata(model_name: str, specs: list[str], stated: str | None = None) -> dict:
    """Return what the hub reads of the card. What is not known is left out: the base model and the licence of a
    local folder of unknown origin, and data that is no hub data set. stated: the base model of an earlier card."""
    data: dict = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["machine-unlearning"]}
    if base := hub_model(model_name, stated):
        data |= {"base_model": base, "base_model_relation": "finetune"}
    data |= licence(model_name)
    if datasets := list(dict.fromkeys(filter(None, map(hub_dataset, specs)))):
        data["datasets"] = datasets
    return data


def hub_model(name: str, stated: str | None = None) -> str | None:
    """Return the hub name of a model; of a local folder, the one that its own files say it came from, else None.

    A name that is no folder is one of the hub if the model was downloaded to this machine, or if an earlier card
    states it: `models/mine` looks like a hub name, and is none once its folder is elsewhere.
    """
    folder = Path(name)
    if not folder.exists():
        is_known = name == stated or cached_file(name, "config.json")
        return name if is_known and REPOSITORY.fullmatch(name) else None
    for file, field in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        origin = read_json(folder / file).get(field)
        if isinstance(origin, str) and hub_model_of_text(origin):
            return origin
    origin = front_matter(folder / CARD).get("base_model")
    return origin if isinstance(origin, str) and REPOSITORY.fullmatch(origin) else None


def hub_model_of_text(name: str) -> bool:
    """Return whether a name that stands in a file of a model is a hub name that is known on this machine."""
    return bool(REPOSITORY.fullmatch(name)) and not Path(name).exists() and cached_file(name, "config.json") is not None


def hub_dataset(spec: str) -> str | None:
    """Return the hub name of a data set as --forget_data takes it (owner/name:CONFIG:SPLIT); None for a file or a
    folder, and for one without an owner, which may be a file that is gone."""
    hub = HUB.fullmatch(spec)
    is_file = kind_of(Path(spec)) in RECORD_KINDS + TEXT_KINDS
    is_local = is_file or Path(spec).exists() or Path(spec.partition(":")[0]).exists()
    return None if is_local or not hub or not hub["owned"] else hub["name"]


def licence(model_name: str) -> dict:
    """Return the licence of the base model as its own card says, {} if its card is not on this machine."""
    folder = Path(model_name)
    card = front_matter(folder / CARD if folder.is_dir() else cached_file(model_name, CARD))
    kept = {name: card[name] for name in ("license", "license_name", "license_link") if isinstance(card.get(name), str)}
    return kept if "license" in kept else {}


def front_matter(file: Path | None) -> dict:
    """Return the metadata of a card; {} if there is no such file or it has none that can be read."""
    try:
        found = FRONT_MATTER.match(file.read_text(encoding="utf-8")) if file else None
        data = yaml.safe_load(found[1]) if found else None
        return data if isinstance(data, dict) else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}


def read_json(file: Path) -> dict:
    """Return the object in a JSON file; {} if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


# --------------------------------------------------------------------------------------------- Markdown
def code(text) -> str:
    """Return a text as inline code of a table or a line: whatever a name holds, it stays a name."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def plain(text) -> str:
    """Return a text as one line of Markdown that shows it as it is: no tag, no link, no new column."""
    return re.sub(r"([\\`*_\[\]<>|#!])", r"\\\1", " ".join(str(text).split()))


_cards = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent.parent / "templates"),
    autoescape=False,  # noqa: S701 - Markdown; `code` and `plain` keep its names inert
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_cards.filters |= {"code": code, "plain": plain, "sentence": sentence}
