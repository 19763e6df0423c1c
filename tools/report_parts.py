"""Pieces of tools/report.py's page: numbers as text, and HTML elements from plain values. All text
is escaped here.
"""

import base64
import dataclasses
import html
import io
import json
import math
from collections.abc import Sequence

from PIL import Image

PERCENT = ("dice", "jaccard")  # shown in %; the other metrics are distances


def number(value: float | None, metric: str) -> str:
    """Dice and Jaccard in percent with one decimal, distances with two."""
    if value is None or math.isnan(value):
        return "–"
    return f"{100 * value:.1f}" if metric in PERCENT else f"{value:.2f}"


def p_value(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.01 else f"{value:.3f}"


def minus(text: str) -> str:
    return text.replace("-", "−")


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def short(value) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def escape(text: str) -> str:
    return html.escape(text, quote=True)


def paragraph(text: str) -> str:
    return f"<p class='soft'>{escape(text)}</p>"


def warning(heading: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return (
        '<div class="findings" '
        f'role="note"><strong>{escape(heading)}</strong><ul>{items}</ul></div>'
    )


def grid(drawn: Sequence[str]) -> str:
    return (
        "<div "
        f'class="grid">{"".join(f"<figure class=chart>{each}</figure>" for each in drawn)}</div>'
    )


def inline(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A plain table; the first column names the rows."""
    head = "".join(f"<th scope=col>{escape(text)}</th>" for text in header)
    body = "".join(
        "<tr><th "
        f"scope=row>{escape(row[0])}</th>"
        f"{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    content = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{content}</div>'


@dataclasses.dataclass
class Cell:
    """What a sortable table shows, and what it sorts by: a number, text, or None for undefined,
    which comes last.
    """

    text: str
    value: float | str | None
    style: str = ""
    note: str = ""


def score_cell(value: float | None, metric: str, note: str = "") -> Cell:
    known = value is not None and not math.isnan(value)
    return Cell(
        number(value, metric),
        value if known else None,
        "bar" if known and metric in PERCENT else "",
        note,
    )


def sortable(header: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str) -> str:
    """A table that a script in the page sorts; the first column names the rows and is text."""
    head = "".join(
        f"<th scope=col aria-sort=none data-kind={'text' if k == 0 else 'number'}>"
        f'<button type="button">{escape(text)}</button></th>'
        for k, text in enumerate(header)
    )
    body = []
    for row in rows:
        cells = []
        for k, cell in enumerate(row):
            value = f"{cell.value:.6g}" if isinstance(cell.value, float) else str(cell.value)
            value = "" if cell.value is None else value
            attributes = f' data-v="{escape(value)}"'
            attributes += f' class="{cell.style}"' if cell.style else ""
            attributes += f' style="--v:{100 * cell.value:.1f}"' if cell.style == "bar" else ""
            attributes += f' title="{escape(cell.note)}"' if cell.note else ""
            tag = "th scope=row" if k == 0 else "td"
            cells.append(f"<{tag}{attributes}>{escape(cell.text)}</{tag.split()[0]}>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        '<div class="scroll tall" tabindex="0"><table '
        f'class="sortable"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
