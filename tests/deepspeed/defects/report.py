"""Write docs/deepspeed-defects.md from the scripts: python -m tests.deepspeed.defects.report."""

from pathlib import Path

from tests.deepspeed.defects.cases import DEFECTS, Defect

DOCUMENT = Path(__file__).parents[3] / "docs/deepspeed-defects.md"

_HEAD = """# Defects of DeepSpeed, and `repair`

Each of these makes a training end with other weights than one process, without a word. `arsg_dist` corrects them for
ARSG, and for other optimizers if it is asked to, before `deepspeed.initialize`:

```python
import arsg_dist.deepspeed

arsg_dist.deepspeed.repair(optimizers=(torch.optim.AdamW,))
```

- Named are classes, with those derived from them. `repair()` without any ends it.
- With it come the repairs of `safe_get_full_*` and `safe_set_full_*` and of gradients on NVMe.
- Before 0.19.8, at stage 3 on several CPU ranks, `GatheredParameters` and the step await one gather of many. They are
  all awaited once `arsg_dist.deepspeed` is imported, whichever the optimizer: it changes no value that was right.
- DeepSpeed's `FusedAdam` at stage 0 in bf16 or fp16 is not repaired: `initialize` refuses it.
- With a DeepSpeed that has changed a method which a repair depends on, `repair` raises `ValueError` and names it.

"Seen in" is about DeepSpeed 0.18.0 and later, with torch 2.13.0, on the CPU; older were not tried
([versions](deepspeed.md#versions)).

"""

_UPDATES = "# Updates of micro-batches of one gradient for each parameter; None: the parameter is not used.\n"

_SCRIPT = """
## The script

Put the settings of a defect in the place of the comment, and run `deepspeed --num_accelerators RANKS defect.py`.
Weights begin at 1; shown is one element of each parameter, as all of its elements are alike.

```python
{script}```

This page is written by `python -m tests.deepspeed.defects.report`; `pytest tests/deepspeed/test_defects.py` runs each
script.
"""


def text() -> str:
    """The document."""
    lines = ["| defect | DeepSpeed | one process | seen in |", "|---|---|---|---|"]
    for defect in DEFECTS.values():
        link = "".join(c for c in defect.title.lower().replace(" ", "-") if c.isalnum() or c in "-_")
        lines.append(
            f"| [{defect.title}](#{link}) | {_listed(defect.shown)} | {_listed(defect.right)} | {seen_in(defect)} |"
        )
    before, _, after = _parts(next(iter(DEFECTS.values())))
    script = _SCRIPT.format(script=f"{before}# The settings of a defect\n{_UPDATES}{after}")
    return _HEAD + "\n".join(lines) + "\n" + "".join(_report(defect) for defect in DEFECTS.values()) + script


def seen_in(defect: Defect) -> str:
    """The versions that have a defect."""
    return f"{defect.since} to {defect.until or '0.19.8'}"


def _listed(weights: list[float]) -> str:
    return ", ".join(str(weight) for weight in weights)


def _parts(defect: Defect) -> tuple[str, str, str]:
    """A script's lines before its settings, these, and what all scripts have behind them."""
    before, begin, rest = defect.script().partition("CONFIG = ")
    settings, end, after = rest.partition("\n]\n\n\nclass Model")
    return before, begin + settings + end[:3], end[3:] + after


def _report(defect: Defect) -> str:
    """The text of a report to DeepSpeed's developers."""
    return f"""
## {defect.title}

{defect.says}

- Where: {defect.where}
- Remedy: {defect.remedy}
- Settings, for {defect.ranks} rank{"s" if defect.ranks > 1 else ""}:

```python
{_parts(defect)[1].replace(_UPDATES, "")}```
"""


if __name__ == "__main__":
    DOCUMENT.write_text(text())
