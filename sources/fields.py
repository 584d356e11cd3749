"""The names of fields in published data sets, as `normal_name` writes them. The first that has a value counts."""

from __future__ import annotations

PROMPT_FIELDS = ("prompt", "question", "instruction", "goal", "query", "behavior", "problem", "input", "inputs")
RESPONSE_FIELDS = (
    "response", "best_answer", "answer", "output", "right_answer", "completion", "target", "correct_answer", "gt",
    "ground_truth", "correct_answers", "answers", "solution", "outputs", "targets", "reply",
)  # fmt: skip
TRUE_ANSWER_FIELDS = ("correct_answers", "answers")  # lists of true answers, kept whole
TALK_FIELDS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat")
PARAPHRASED_FIELDS = ("paraphrased_answer",)  # the two of TOFU's *_perturbed sets
PERTURBED_FIELDS = ("perturbed_answer",)
CHOICE_FIELDS = ("choices", "options")
INDEX_FIELDS = ("answer", "answer_index", "answer_idx", "answerkey", "answer_key", "correct_answer", "correct",
                "correct_option", "label", "gold")  # fmt: skip
PREFERENCE_FIELDS = ("chosen", "rejected")
CATEGORY_FIELDS = ("category", "semanticcategory", "harm_category", "categories")
CONTEXT_FIELDS = ("input", "context", "contextstring")  # the text that an instruction is about (Alpaca, Dolly)
SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
TEXT_FIELDS = ("text", "content", "document", "passage", "body", "story")

# Words in a field's name that make it look like an answer, unless its last word says that it is about one.
ANSWER_WORDS = frozenset({
    "answer", "answers", "response", "responses", "completion", "completions", "output", "outputs", "target",
    "targets", "reply", "replies", "solution", "solutions", "gt", "chosen", "rejected", "wanted", "assistant",
    "gold", "truth", "generation", "generations",
})  # fmt: skip
ABOUT_WORDS = frozenset({
    "id", "ids", "source", "model", "type", "category", "level", "format", "length", "len", "hash", "sha256",
    "start", "end", "language", "lang", "tokens", "score", "name", "index", "idx", "key", "safe", "url",
})  # fmt: skip
# Fields that tell about a row: text in them is no answer.
ROW_WORDS = frozenset({
    "id", "ids", "index", "idx", "source", "model", "type", "category", "categories", "subject", "topic",
    "topics", "tag", "tags", "language", "lang", "title", "url", "link", "date", "author", "name", "key",
    "hash", "sha256", "split", "version", "license", "dataset", "task", "difficulty", "level", "label",
    "labels", "focus", "note", "notes", "comment", "behaviorid", "semanticcategory", "functionalcategory",
})  # fmt: skip


def normal_name(name) -> str:
    """Return a field's name in lower case with "_" for spaces and hyphens: "Best Answer" is "best_answer"."""
    return str(name).strip().lower().replace(" ", "_").replace("-", "_")
