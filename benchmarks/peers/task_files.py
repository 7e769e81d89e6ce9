"""Writes the tasks of tasks.py: YAML files for lm-eval, and their questions as JSON lines.

- last_word: the last word of a passage, as in LAMBADA (Paperno et al. 2016): a word that stood in the
  passage before, so that the passage tells it.
- continuation: the true second half of a docstring among those of three others.
- json_answer, instruction (chat): JSON with given keys, and answers of a given form.
- code: a function to complete after `return`, which must pass its assertions.

The passages come from held-out prose (peers/prose.py).
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Words of a passage, and questions of each task made from prose.
WORDS, QUESTIONS = (40, 90), 300
#: Tasks that need a chat template.
CHAT_TASKS = ("json_answer", "instruction")
TASKS = ("last_word", "continuation", *CHAT_TASKS, "code")

NAMES = ("Ada", "Bruno", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana", "Igor", "Jana")
CITIES = ("Berlin", "Lagos", "Lima", "Oslo", "Osaka", "Paris", "Quito", "Riga", "Seoul", "Tunis")
#: Request and the form of the answer; {} is a topic.
INSTRUCTIONS = (
    ("Write exactly three bullet points about {}. Begin each line with a hyphen.",
     r"(- [^\n]+\n*){3}"),
    ("List three words about {}, separated by commas, and nothing else.",
     r"[^\n,]+,[^\n,]+,[^\n,]+"),
    ("Write one sentence about {} in upper case letters only.", r"[^a-z\n]+"),
    ("Write a numbered list of two facts about {}.", r"1\.[^\n]+\n+2\.[^\n]+\n*"),
    ("Write a question about {}. End with a question mark.", r"[^\n]+\?"),
)  # fmt: skip
TOPICS = ("tea", "trains", "the moon", "honey", "rivers", "glass", "maps", "snow")
#: Signature, docstring, and assertions of functions to complete.
FUNCTIONS = (
    ("add(a, b)", "Returns the sum of a and b.", "assert add(2, 3) == 5"),
    ("double(x)", "Returns x times two.", "assert double(7) == 14"),
    ("square(x)", "Returns the square of x.", "assert square(9) == 81"),
    ("is_even(n)", "Returns True if n is even.", "assert is_even(4) and not is_even(5)"),
    ("is_odd(n)", "Returns True if n is odd.", "assert is_odd(3) and not is_odd(8)"),
    ("largest(values)", "Returns the largest of a list of numbers.",
     "assert largest([3, 9, 2]) == 9"),
    ("smallest(values)", "Returns the smallest of a list of numbers.",
     "assert smallest([3, 9, 2]) == 2"),
    ("total(values)", "Returns the sum of a list of numbers.", "assert total([1, 2, 3]) == 6"),
    ("mean(values)", "Returns the mean of a list of numbers.", "assert mean([2, 4]) == 3"),
    ("count_words(text)", "Returns the number of words in a text.",
     "assert count_words('a b c') == 3"),
    ("reverse(text)", "Returns the text with its letters in reverse order.",
     "assert reverse('abc') == 'cba'"),
    ("upper(text)", "Returns the text in upper case.", "assert upper('ab') == 'AB'"),
    ("first(items)", "Returns the first item of a list.", "assert first([4, 5]) == 4"),
    ("last(items)", "Returns the last item of a list.", "assert last([4, 5]) == 5"),
    ("absolute(x)", "Returns the absolute value of x.", "assert absolute(-3) == 3"),
    ("join_words(words)", "Returns the words joined by single spaces.",
     "assert join_words(['a', 'b']) == 'a b'"),
    ("contains(items, x)", "Returns True if x is in the list items.",
     "assert contains([1, 2], 2) and not contains([1], 2)"),
    ("length(text)", "Returns the number of letters in a text.", "assert length('abcd') == 4"),
    ("power(a, b)", "Returns a to the power of b.", "assert power(2, 5) == 32"),
    ("factorial(n)", "Returns the factorial of n.", "assert factorial(5) == 120"),
    ("is_empty(items)", "Returns True if the list is empty.",
     "assert is_empty([]) and not is_empty([1])"),
    ("sort_descending(values)", "Returns the numbers from largest to smallest.",
     "assert sort_descending([1, 3, 2]) == [3, 2, 1]"),
    ("to_celsius(f)", "Converts degrees Fahrenheit to Celsius.",
     "assert abs(to_celsius(212) - 100) < 1e-6"),
    ("unique(items)", "Returns the items without repetitions, in their order.",
     "assert list(unique([1, 2, 1])) == [1, 2]"),
)  # fmt: skip


def write_tasks(folder: Path, prose: str) -> None:
    """Writes all task files to a folder.

    Args:
        folder: empty folder.
        prose: held-out docstrings, with empty lines between them.
    """
    rng = random.Random(0)
    passages = [text for part in prose.split("\n\n") if (text := " ".join(part.split()))]
    _write(folder, "last_word", [*_last_words(passages)][:QUESTIONS], _LIKELIHOOD)
    _write(folder, "continuation", [*_continuations(passages, rng)][:QUESTIONS], _CHOICE)
    _write(folder, "json_answer", [*_json_questions(rng)], _generated("json_is_valid", 60))
    _write(folder, "instruction", [*_instructions()], _generated("format_is_followed", 80))
    _write(folder, "code", [*_functions()], _generated("code_runs", 80))
    shutil.copy(Path(__file__).parents[1] / "tasks" / "checks.py", folder)


def _last_words(passages: list[str]) -> Iterator[dict[str, Any]]:
    for passage in passages:
        words = passage.rstrip(".").split(" ")
        if not WORDS[0] <= len(words) <= WORDS[1] or not re.fullmatch(r"[a-z]{5,}", words[-1]):
            continue
        context = " ".join(words[:-1])
        if re.search(rf"\b{words[-1]}\b", context):
            yield {"context": context, "word": words[-1]}


def _continuations(passages: list[str], rng: random.Random) -> Iterator[dict[str, Any]]:
    halves = []
    for passage in passages:
        sentences = re.split(r"(?<=\.) (?=[A-Z])", passage)
        if len(sentences) >= 2 and all(8 <= len(s.split(" ")) <= 40 for s in sentences[:2]):
            halves.append((sentences[0], sentences[1]))
    for index, (first, second) in enumerate(halves):
        others = [s for i, (_, s) in enumerate(halves) if i != index and s != second]
        choices = [second, *rng.sample(others, 3)]
        rng.shuffle(choices)
        yield {"context": first, "choices": choices, "right": choices.index(second)}


def _json_questions(rng: random.Random) -> Iterator[dict[str, Any]]:
    for name in NAMES:
        for city in rng.sample(CITIES, 5):
            age = rng.randrange(20, 70)
            yield {
                "prompt": "Reply with one JSON object with the keys name, city and age, and nothing "
                f"else: {name} lives in {city} and is {age} years old.",
                "expected": {"name": name, "city": city, "age": age},
            }


def _instructions() -> Iterator[dict[str, Any]]:
    for topic in TOPICS:
        for request, pattern in INSTRUCTIONS:
            yield {"prompt": request.format(topic), "pattern": pattern}


def _functions() -> Iterator[dict[str, Any]]:
    for signature, docstring, test in FUNCTIONS:
        yield {"prompt": f'def {signature}:\n    """{docstring}"""\n    return', "test": test}


_LIKELIHOOD = """output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: " {{word}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
_CHOICE = """output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: right
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
#: Check -> metrics that it returns.
METRICS = {
    "json_is_valid": ("valid", "has_keys", "right"),
    "format_is_followed": ("followed",),
    "code_runs": ("parses", "passes"),
}


def _generated(check: str, tokens: int) -> str:
    metrics = "".join(
        f"  - {{metric: {name}, aggregation: mean, higher_is_better: true}}\n"
        for name in METRICS[check]
    )
    return (
        'output_type: generate_until\ndoc_to_text: "{{prompt}}"\ndoc_to_target: ""\n'
        f"generation_kwargs: {{max_gen_toks: {tokens}, do_sample: false, until: []}}\n"
        f"process_results: !function checks.{check}\nmetric_list:\n{metrics}"
    )


def _write(folder: Path, task: str, documents: list[dict[str, Any]], settings: str) -> None:
    """Writes the questions of a task and its settings."""
    file = folder / f"{task}.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    head = (
        f"task: {task}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\n"
        "test_split: test\nnum_fewshot: 0\n"
    )
    (folder / f"{task}.yaml").write_text(head + settings)
