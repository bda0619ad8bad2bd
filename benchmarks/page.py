"""The page of paper.py: tables and figures as one HTML file that loads nothing else."""

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path

import report

OURS = "fused"
STYLE = """
body { margin: 0; background: #f6f7f9; color: #1d2329; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1400px; margin: 0 auto; padding: 24px; }
h1 { margin: 8px 0 0; font-size: 28px; } h2 { margin: 36px 0 12px; font-size: 20px; }
.lead { color: #5b6770; margin: 0 0 16px; }
.notice { background: #fff4d6; border-left: 4px solid #d9a514; padding: 10px 14px; margin: 16px 0; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.card { background: white; border-radius: 8px; padding: 12px 18px; box-shadow: 0 1px 3px #0002; }
.card b { display: block; font-size: 24px; color: #d1495b; }
.scroll { overflow-x: auto; background: white; border-radius: 8px; box-shadow: 0 1px 3px #0002; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid #eceef1; }
th { text-align: right; font-weight: 600; color: #5b6770; font-size: 13px; vertical-align: bottom; }
th:first-child, td:first-child, th:last-child, td.text { text-align: left; }
td.text { color: #5b6770; font-size: 13px; white-space: normal; min-width: 150px; }
td small { color: #8a949c; display: block; font-size: 11px; }
tr.part td { background: #eef1f4; font-weight: 600; text-align: left; }
.ours { color: #b3293c; font-weight: 600; }
figure { margin: 0 0 24px; background: white; border-radius: 8px; padding: 12px; box-shadow: 0 1px 3px #0002; }
figure img { display: block; max-width: 100%; margin: 0 auto; }
figcaption { color: #5b6770; font-size: 13px; text-align: center; }
.note { color: #5b6770; font-size: 13px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; font-size: 13px; color: #5b6770; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Figure:
    path: Path  # of a PNG
    caption: str


def html(facts: dict[str, str], found: dict[str, list[dict]], backends: list[str], pictures: list[Figure]) -> str:
    """The page, from the records of paper.py."""
    settings, _, reduced = facts["settings"].partition("; REDUCED: ")
    notice = f'<p class="notice"><b>A reduced run.</b> {escape(reduced)}.</p>' if reduced else ""
    parts = [
        "<h1>Patches Are All You Need? &ndash; on this machine</h1>",
        f'<p class="lead">{escape(facts["device"])} &middot; {escape(settings)}</p>',
        notice,
        _cards(found["tables"]),
        "<h2>Tables 1 and 2</h2>",
        _table(found["tables"], backends),
        "<h2>Figures</h2>",
        *(_figure(picture) for picture in pictures),
        "<h2>How it was measured</h2>",
        "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()) + "</dl>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>Patches Are All You Need? - {escape(facts['device'])}</title>\n<style>{STYLE}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(filter(None, parts)) + "\n</main>\n</body>\n</html>\n"
    )


def _cards(records: list[dict]) -> str:
    """The best of ours, in large figures."""
    ours = [line for line in records if line["over_best_other"]]
    if not ours:
        return ""
    fastest = max(ours, key=lambda line: line["over_best_other"])
    slowest = min(ours, key=lambda line: line["over_best_other"])
    cards = [
        (f"{report.number(fastest['over_best_other'])}x", f"the best other backend, at most: {fastest['model']}"),
        (f"{report.number(slowest['over_best_other'])}x", f"at least: {slowest['model']}"),
        (f"{len(ours)} of {sum(line['model'].startswith('convmixer') for line in records)}", "ConvMixers timed"),
    ]
    inside = "".join(f'<div class="card"><b>{escape(figure)}</b>{escape(text)}</div>' for figure, text in cards)
    return f'<div class="cards">{inside}</div>'


def _table(records: list[dict], backends: list[str]) -> str:
    header = ["network", "parameters", "paper", "GFLOP", *backends, "ours / best<br>other"]
    header += ["RTX 8000<br>(paper)", "top-1 %<br>(paper)", "remark"]
    cells = "".join(f"<th>{title}</th>" for title in header)
    lines = [f"<thead><tr>{cells}</tr></thead>", "<tbody>"]
    shown = None
    for line in records:
        part = "ConvMixer" if line["model"].startswith("convmixer") else "The paper's other networks"
        if part != shown:
            lines.append(f'<tr class="part"><td colspan="{len(header)}">{escape(part)}, images per second</td></tr>')
            shown = part
        lines.append(_row(line, backends))
    note = "&#9679; also in the paper's Table 1. A1: with A1-style regularisation. GFLOP: an image of 224x224. "
    note += "Bars: shares of the row's fastest."
    return f'<div class="scroll"><table>{"".join(lines)}</tbody></table></div><p class="note">{note}</p>'


def _row(line: dict, backends: list[str]) -> str:
    paper = line["paper"]
    best = max((rate for rate in line["rates"].values() if rate), default=None)
    parameters = f"{line['parameters']:,}".replace(",", "&thinsp;") if line["parameters"] else "&ndash;"
    network = escape(paper["network"]) + (" &#9679;" if paper["in_table1"] == "yes" else "")
    cells = [f"<td>{network}<small>{escape(line['model'])}</small></td>", f"<td>{parameters}</td>"]
    cells += [f"<td>{escape(paper['params_millions'])}&thinsp;M</td>", f"<td>{report.number(line['gflop'])}</td>"]
    for backend in backends:
        rate = line["rates"][backend]
        if rate is None:
            cells.append("<td>&ndash;</td>")
            continue
        share = 100 * rate / best
        colour = "#fbdfe3" if backend == OURS else "#e3eaf4"
        bar = f"background: linear-gradient(90deg, {colour} {share:.0f}%, transparent {share:.0f}%)"
        kind = ' class="ours"' if backend == OURS else ""
        cells.append(f'<td{kind} style="{bar}">{report.number(rate)}</td>')
    over = line["over_best_other"]
    cells.append(f'<td class="ours">{report.number(over)}x</td>' if over else "<td></td>")
    accuracies = [paper["top1_percent"], paper["top1_a1_percent"] and f"{paper['top1_a1_percent']} (A1)"]
    accuracy = "<br>".join(map(escape, filter(None, accuracies)))
    cells += [f"<td>{escape(paper['rtx8000_images_per_second']) or '&ndash;'}</td>", f"<td>{accuracy}</td>"]
    return f'<tr>{"".join(cells)}<td class="text">{escape(line["remark"])}</td></tr>'


def _figure(picture: Figure) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    caption = escape(picture.caption)
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
