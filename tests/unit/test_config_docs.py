"""docs/configuration.md is current and tells every key with its comment."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_current():
    command = [sys.executable, "tools/write_config_docs.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_rows_carry_type_bounds_default_and_comment():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert (
        "| `path` | path | **required** | Hugging Face directory, one in Megatron's format (converted, or a training checkpoint), or a "
        "hub id such as Qwen/Qwen2.5-VL-7B-Instruct (@REVISION may follow): weights, config, tokenizer, processor |"
        in page
    )
    assert "| `clip_grad` | number, ≥ 0 | `1.0` | 0: no clipping |" in page
    assert "| `betas` | 2 × number | `[0.9, 0.95]` |  |" in page
    assert "## algorithm.filter" in page
