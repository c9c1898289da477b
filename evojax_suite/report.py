"""A static page for a run: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path

from evojax_suite.results import write_atomically

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 0 auto; padding: 1rem;
       color: #1a1a1a; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd;
       text-align: left; font-weight: normal } thead th { border-bottom: 2px solid #888 }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere } th { min-width: 6rem }
img { max-width: 100%; height: auto } figure { margin: 1rem 0 } figcaption { color: #555 }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem }
"""


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>"
        + f"<th>{html.escape(row[0])}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def write(
    path: Path,
    title: str,
    lead: str,
    tables: list[tuple[str, list[str], list[list[str]]]],
    figures: list[tuple[Path, str]],
    command: str,
    config: dict,
) -> None:
    """Write the page.

    lead: one sentence with the result. tables: (heading, header, rows of text). figures: (PNG,
    caption). command: what repeats the run.
    """
    parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>"]
    for heading, header, rows in tables:
        parts.append(f"<h2>{html.escape(heading)}</h2>{_table(header, rows)}")
    for picture, caption in figures:
        data = base64.b64encode(picture.read_bytes()).decode()
        text = html.escape(caption)
        parts.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{text}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    parts.append(f"<h2>Repeat it</h2><pre>{html.escape(command)}</pre>")
    settings = html.escape(json.dumps(config, indent=2))
    parts.append(
        f"<h2>Settings</h2><details><summary>config.json</summary><pre>{settings}</pre></details>"
    )
    write_atomically(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n",
    )
