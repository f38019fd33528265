# SPDX-License-Identifier: Apache-2.0
"""The looks of pages: light and dark, and nothing that has to be fetched."""

LIGHT = {
    "ink": "#1f2328",
    "dim": "#59636e",
    "back": "#ffffff",
    "line": "#d0d7de",
    "local": "#d4d9df",
    "reused": "#9ec9f5",
    "seam": "#f2a24e",
    "gap": "#fbe3c4",
    "copy": "#dcc2f5",
    "computed": "#f6f8fa",
}
DARK = {
    "ink": "#e6edf3",
    "dim": "#9198a1",
    "back": "#0d1117",
    "line": "#3d444d",
    "local": "#434b55",
    "reused": "#1f5fa3",
    "seam": "#a8611a",
    "gap": "#4a3218",
    "copy": "#573a75",
    "computed": "#161b22",
}


def _variables(colours: dict[str, str]) -> str:
    return ":root{" + ";".join(f"--{name}:{value}" for name, value in colours.items()) + "}"


STYLE = f"""
{_variables(LIGHT)}
@media(prefers-color-scheme:dark){{{_variables(DARK)}}}
*{{box-sizing:border-box}}
"""
STYLE += """
body{margin:0 auto;padding:1.5rem;max-width:64rem;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0 0 .5rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
p{margin:.4rem 0}.dim,footer{color:var(--dim)}footer{margin-top:2rem;font-size:.85rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--dim);white-space:nowrap}td:first-child,th:first-child,.word{text-align:left}
td{font-variant-numeric:tabular-nums}tr.total td{font-weight:600}
.local{background:var(--local)}.reused{background:var(--reused)}.seam{background:var(--seam)}
.gap{background:var(--gap)}.copy{background:var(--copy)}.computed{background:var(--computed)}
figure{margin:1rem 0}figcaption{color:var(--dim)}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;margin:.5rem 0;padding:0}
.legend i{display:inline-block;width:.9em;height:.9em;margin-right:.4em;vertical-align:-.1em;
border:1px solid var(--line)}
.strip{display:flex;height:1.6rem;border:1px solid var(--line);border-radius:3px;overflow:hidden}
.strip b{min-width:1px}.bars{display:grid;grid-template-columns:9rem 1fr;gap:.3rem .8rem;
align-items:center;margin:1rem 0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid var(--line);border-radius:3px;
padding:.8rem;margin:.8rem 0;max-height:40rem;overflow-y:auto;
font:12.5px/1.55 ui-monospace,monospace}
"""


def page(title: str, content: str) -> str:
    """A whole page; ``content`` is HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>{content}</body></html>\n"
    )
