"""A language model asked where rules cannot decide: over an OpenAI-compatible address, yes or no, each question once.

Rules prove equality, rarely its opposite. What they call wrong is undecided, unless a letter stands against another letter. Verdicts are kept in
a file by model, question, gold and answer, so that nothing is asked or paid for twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from eureka_megatron.errors import UserError
from eureka_megatron.evaluation.verdict import Verdict

ATTEMPTS = 5  # temperatures 0, 0.5 … 2, as the original's
KEY = "OPENAI_API_KEY"
_PROMPT = """Here are a question, its correct answer, and the answer that a student gave. Is the student's answer the correct one? Another form of the
same value counts (a fraction for a decimal, 50 cm for 0.5 m), an option's letter stands for its text, and missing units are forgiven. Do not
solve the question yourself. Reply with one word, yes or no.

Question: {question}
Correct answer: {gold}
Student's answer: {answer}"""


def undecided(verdict: Verdict, gold: str) -> bool:
    """Whether rules leave room for doubt. Two different letters do not; no extraction at all is no answer."""
    answer = (verdict.extraction or "").strip()
    letters = len(answer) == 1 and answer.isalpha() and len(gold.strip()) == 1 and gold.strip().isalpha()
    return not verdict.correct and bool(answer) and not letters


@dataclass(frozen=True)
class Question:
    """Example: Question("What is the area?", "2500 \\pi cm^2", "7854 square centimetres")."""

    text: str
    gold: str
    answer: str


class JudgeModel:
    """Asks `model` at `url`, e.g. "http://127.0.0.1:8000/v1"; the key is that of the environment variable OPENAI_API_KEY.

    Attributes:
        asked, cached, failed: questions that the server answered, that the file answered, and that stayed without a yes or no.
    """

    def __init__(self, url: str, model: str, cache: Path, *, workers: int = 16, timeout_seconds: float = 60.0) -> None:
        from openai import OpenAI

        self.model, self._cache, self._workers = model, cache, workers
        self.asked = self.cached = self.failed = 0
        key = os.environ.get(KEY) or "none"
        self._client = OpenAI(base_url=url, api_key=key, timeout=timeout_seconds, max_retries=3)
        self._known: dict[str, bool] = {}
        for line in cache.read_text(encoding="utf-8").splitlines() if cache.exists() else ():
            try:
                found = json.loads(line)
                self._known[found["key"]] = bool(found["correct"])
            except (ValueError, KeyError, TypeError):
                continue  # cut short by a kill
        if cache.exists() and not cache.read_bytes().endswith(b"\n"):
            with cache.open("a", encoding="utf-8") as file:
                file.write("\n")

    def ask(self, questions: Mapping[Any, Question]) -> dict[Any, bool | None]:
        """Verdicts by the questions' names; None where no yes or no came.

        Raises:
            UserError: the address does not answer, or refuses key or model.
        """
        keys = {name: self._key(question) for name, question in questions.items()}
        new = {key: questions[name] for name, key in keys.items() if key not in self._known}
        self.cached += sum(key in self._known for key in keys.values())
        with ThreadPoolExecutor(self._workers) as pool, self._cache.open("a", encoding="utf-8") as file:
            for key, verdict in zip(new, pool.map(self._one, new.values()), strict=True):
                if verdict is None:
                    self.failed += 1
                    continue
                self.asked += 1
                self._known[key] = verdict
                file.write(json.dumps({"key": key, "model": self.model, "correct": verdict}) + "\n")
                file.flush()
        return {name: self._known.get(key) for name, key in keys.items()}

    def _key(self, question: Question) -> str:
        text = json.dumps([self.model, question.text, question.gold, question.answer])
        return blake2b(text.encode(), digest_size=16).hexdigest()

    def _one(self, question: Question) -> bool | None:
        from openai import APIConnectionError, APIStatusError

        prompt = _PROMPT.format(question=question.text, gold=question.gold, answer=question.answer)
        for attempt in range(ATTEMPTS):
            try:
                reply = self._client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": prompt}],
                    temperature=attempt * 0.5,
                    max_tokens=256,
                )
            except (APIConnectionError, APIStatusError) as error:
                raise UserError(f"--judge-url {self._client.base_url}: {str(error).splitlines()[0][:200]}") from error
            word = (reply.choices[0].message.content or "").strip().strip(".*").lower() if reply.choices else ""
            if word in ("yes", "no"):
                return word == "yes"
        return None
