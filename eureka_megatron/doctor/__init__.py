"""`eureka doctor`: what this machine has and lacks, what is lost without it, and the command that mends it.

Nothing heavy is imported here: versions come from package metadata, the driver's from nvidia-smi, and one child process imports torch and
torchvision, because only an import tells whether their builds fit each other and the driver. It runs in half an installation too.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from eureka_megatron.doctor.checks import CHECKS
from eureka_megatron.doctor.finding import Finding
from eureka_megatron.doctor.gpu import Machine, ask_driver, read_probe, start_probe


def run_doctor(*, as_json: bool = False) -> int:
    """Print the findings. Returns 0 when everything required is there, else 1."""
    findings = examine()
    ready = not any(finding.blocks for finding in findings)
    if as_json:
        print(json.dumps({"ready": ready, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print_table(findings)
    return 0 if ready else 1


def examine(folder: Path | str = ".") -> list[Finding]:
    """All findings about this machine; `folder` is where runs would be written."""
    probe = start_probe()
    driver = ask_driver()  # while the child imports torch
    machine = Machine(Path(folder), driver, read_probe(probe))
    return [check.find(machine) for check in CHECKS]


def _print_table(findings: list[Finding]) -> None:
    blocking = [finding.name for finding in findings if finding.blocks and finding.name != "RAY_ADDRESS"]
    reasons = [f"{', '.join(blocking)} required"] if blocking else []
    reasons += ["RAY_ADDRESS leads nowhere" for finding in findings if finding.blocks and finding.name == "RAY_ADDRESS"]
    verdict = f"Not ready: {'; '.join(reasons)}." if reasons else "Everything required is here."
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:  # of all commands this one must run in half an installation
        for finding in findings:
            print(f"{_mark(finding):8}{finding.name}: {finding.found}. Without it: {finding.lost}. Fix: {finding.fix}")
        print(verdict)
        return
    styles = {"ok": "green", "MISSING": "bold red"}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("", "what", "found", "lost without it", "what mends it"):
        table.add_column(heading)
    for finding in findings:
        mark, good = _mark(finding), finding.status == "present"
        advice = ("", "") if good else (Text(finding.lost), Text(finding.fix))
        table.add_row(Text(mark, style=styles.get(mark, "yellow")), finding.name, Text(finding.found), *advice)
    # A file or a pipe has no width; lines broken at 80 would be hard to read there.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)
    console.print(f"\n{verdict}", style="bold red" if reasons else "green", highlight=False)


def _mark(finding: Finding) -> str:
    if finding.blocks:
        return "MISSING"
    return {"present": "ok", "limited": "low", "absent": "–"}[finding.status]
