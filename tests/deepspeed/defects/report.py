"""Write docs/deepspeed-defects.md from the scripts: python -m tests.deepspeed.defects.report."""

from pathlib import Path

from tests.deepspeed.defects.cases import DEFECTS, Defect

DOCUMENT = Path(__file__).parents[3] / "docs/deepspeed-defects.md"

_HEAD = """# Defects of DeepSpeed, and `repair`

Each of these makes a training under DeepSpeed end with other weights than one process, without a word. `arsg_dist`
mends them for its own optimizer, and for others if it is asked to, before `deepspeed.initialize`:

```python
import arsg_dist.deepspeed

arsg_dist.deepspeed.repair(optimizers=(torch.optim.AdamW,))
```

- Named are classes; those derived from them are meant, too. `repair()` without any ends it. Off by default: engines of
  other optimizers then run as DeepSpeed has them.
- With it come the repairs of `safe_get_full_*` and `safe_set_full_*` and of gradients on NVMe
  ([deepspeed.md](deepspeed.md)).
- DeepSpeed's `FusedAdam` at stage 0 in bf16 or fp16 has a wrapper of its own, which is not repaired: `initialize`
  refuses it.
- With a DeepSpeed that has changed a method which a repair depends on, `repair` raises `ValueError` and names it.

This document is written by `python -m tests.deepspeed.defects.report`. `pytest tests/deepspeed/test_defects.py` runs
each script below with the DeepSpeed that is installed: as it is, repaired, and repaired for another optimizer. Weights
begin at 1; shown is one element of each parameter, as all of its elements are alike. "Seen in" is about DeepSpeed
0.18.0 and later; older were not tried. [deepspeed.md](deepspeed.md) has the versions that the scripts were run with.

"""


def text() -> str:
    """The document."""
    lines = ["| defect | DeepSpeed | one process | seen in |", "|---|---|---|---|"]
    for defect in DEFECTS.values():
        link = "".join(c for c in defect.title.lower().replace(" ", "-") if c.isalnum() or c in "-_")
        lines.append(
            f"| [{defect.title}](#{link}) | {_listed(defect.shown)} | {_listed(defect.right)} | {seen_in(defect)} |"
        )
    return _HEAD + "\n".join(lines) + "\n" + "".join(_report(defect) for defect in DEFECTS.values())


def seen_in(defect: Defect) -> str:
    """The versions that have a defect."""
    return f"{defect.since} to {defect.until or '0.19.8'}"


def _listed(weights: list[float]) -> str:
    return ", ".join(str(weight) for weight in weights)


def _report(defect: Defect) -> str:
    """The text of a report to DeepSpeed's developers."""
    return f"""
## {defect.title}

{defect.says}

- Where: {defect.where}
- Seen in: DeepSpeed {seen_in(defect)}, torch 2.13.0, on the CPU
- The script ends with {_listed(defect.shown)}; one process with {_listed(defect.right)}
- Remedy: {defect.remedy}

`deepspeed --num_accelerators {defect.ranks} defect.py`, where defect.py is

```python
{defect.script()}```
"""


if __name__ == "__main__":
    DOCUMENT.write_text(text())
