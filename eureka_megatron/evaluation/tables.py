"""summary.json as tables for a person: every number with its interval and the name of its rule, published ones beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from eureka_megatron.evaluation.scores import REFERENCES

MOST_VALUES = 40  # of a group, in the table; all are in summary.json


def show(summary: Mapping[str, Mapping[str, Any]], console: Console | None = None) -> None:
    """Print the scores of every benchmark, then those of its groups."""
    console = console or Console(highlight=False, soft_wrap=True)
    console.print(_scores(summary))
    for name, found in summary.items():
        for line in _remarks(name, found):
            console.print(Text(line))
        if tables := _groups(name, found):
            console.print(Group(*tables))


def _scores(summary: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("benchmark", "rule", "rows", "score", "95 %", "pass@k", title="scores in per cent")
    for name, found in summary.items():
        for rule, score in found["scores"].items():
            passed = "  ".join(f"{k}: {100 * value:.1f}" for k, value in score.get("pass", {}).items())
            table.add_row(
                name, Text(rule), str(score["rows"]), f"{100 * score['accuracy']:.1f}", _interval(score), passed
            )
            for kind in ("strict", "loose") if isinstance(score.get("wemath"), dict) else ():
                four = score["wemath"][kind]
                counts = " ".join(f"{part} {four[part]}" for part in ("IK", "IG", "CM", "RM"))
                table.add_row("", Text(f"{rule}, {kind}"), "", f"{100 * four['score']:.1f}", "", counts)
        for model, score in REFERENCES.get(name, {}).items():
            table.add_row("", Text(f"published: {model}", style="dim"), "", f"{score:.1f}", "", "")
    return table


def _remarks(name: str, found: Mapping[str, Any]) -> list[str]:
    lines = []
    if found["unanswered"]:
        lines.append(
            f'{name}: {found["unanswered"]} answers could not be asked for and count as wrong ("error" in answers.jsonl)'
        )
    if found["truncated"]:
        lines.append(
            f"{name}: {found['truncated']} answers were cut off at max_tokens={found['protocol']['max_tokens']}"
        )
    for score in found["scores"].values():
        if isinstance(score.get("wemath"), str):
            lines.append(f"no four-way metric: {score['wemath']}")
            break
    if "judge_model" in found:
        asked = found["judge_model"]
        lines.append(
            f"judge model: {asked['asked']} asked, {asked['cached']} from the cache, {asked['failed']} without yes or no"
        )
    return lines


def _groups(name: str, found: Mapping[str, Any]) -> list[Table]:
    rules = list(found["groups"])
    tables = []
    for column, values in found["groups"][rules[0]].items():
        if len(values) < 2 or len(values) > MOST_VALUES:
            continue
        table = _table(
            column, "rows", *(word for rule in rules for word in (rule, "95 %")), title=f"{name} by {column}"
        )
        for value in values:
            scores = [found["groups"][rule][column][value] for rule in rules]
            cells = [cell for score in scores for cell in (f"{100 * score['accuracy']:.1f}", _interval(score))]
            table.add_row(Text(value[:60]), str(scores[0]["rows"]), *cells)
        tables.append(table)
    return tables


def _interval(score: Mapping[str, Any]) -> str:
    return f"{100 * score['low']:.1f}–{100 * score['high']:.1f}"


def _table(*columns: str, title: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number == 0 or column == "rule" else "right")
    return table
