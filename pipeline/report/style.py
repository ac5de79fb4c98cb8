"""The page's style. It is part of the file, as all else: nothing is fetched, and no script runs.

Colours are of equal weight for eyes that tell red from green badly (after Okabe and Ito), darkened on white and
lightened on black until they stand out from it 3 : 1. On paper the page is light.
"""

from __future__ import annotations

_LIGHT = """
  --ground: #ffffff; --text: #1c1f23; --soft: #565d66; --rule: #dde1e6; --panel: #f5f6f8; --warn: #8a4b00;
  --c0: #0068a8; --c1: #c24a00; --c2: #00795a; --c3: #9c3f7c; --c4: #7d6200; --c5: #4f5660;
"""
_DARK = """
  --ground: #15181c; --text: #e6e8eb; --soft: #a4abb4; --rule: #343a42; --panel: #1e2228; --warn: #f2b36b;
  --c0: #62b5f2; --c1: #f58f4f; --c2: #3fcaa0; --c3: #e79bcd; --c4: #dcc04a; --c5: #b4bac2;
"""

STYLE = (
    ":root {" + _LIGHT + "color-scheme: light; }\n"
    "@media screen and (prefers-color-scheme: dark) { :root {" + _DARK + "color-scheme: dark; } }\n"
    """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 54rem; background: var(--ground); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif;
  overflow-wrap: break-word; -webkit-text-size-adjust: 100%; }
h1, h2, h3 { line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h1 { font-size: 2rem; }
h2 { font-size: 1.35rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: .5rem 0; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, "Liberation Mono", monospace; font-size: .875em; }
code { overflow-wrap: anywhere; }
.kicker { margin: 0; color: var(--soft); }
.lead { font-size: 1.2rem; line-height: 1.4; margin: .75rem 0 1rem; }
.note { color: var(--soft); font-size: .875rem; }
.warning { color: var(--warn); font-weight: 600; }
header dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1rem 0; }
header dt { color: var(--soft); }
dd { margin: 0; }
.stages { list-style: none; margin: 1rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .5rem; }
.stages li { background: var(--panel); border: 1px solid var(--rule); border-radius: .4rem; padding: .3rem .6rem;
  font-size: .9rem; }
.stages .stale { color: var(--warn); }
.stages .not-started { color: var(--soft); border-style: dashed; }
.sign { display: inline-block; min-width: 1.1em; margin-right: .25em; font-weight: 700; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; overflow-wrap: normal; }
tbody th { font-weight: 600; }
td.number, .whole { white-space: nowrap; }
.number { text-align: right; padding-left: .3rem; }
.digest { display: inline-block; min-width: 16rem; }
figure { margin: 1.25rem 0; break-inside: avoid; }
figcaption { font-weight: 600; margin-bottom: .25rem; }
figure > svg, .panels svg, .wide svg, .narrow svg { display: block; width: 100%; height: auto; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: .75rem 2rem; }
.panels > * { margin: .5rem 0; break-inside: avoid; min-width: 0; }
.panel-title { margin: 0 0 .25rem; font-size: .9rem; }
.narrow { display: none; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: .25rem 0; padding: 0;
  font-size: .875rem; }
.legend li { display: flex; align-items: center; gap: .4rem; min-width: 0; overflow-wrap: anywhere; }
.swatch { flex: none; width: 34px; height: 16px; }
text { font-size: 12px; fill: var(--text); }
.tick, .axis-label, .value { fill: var(--soft); }
.name { font-weight: 600; }
.grid { stroke: var(--rule); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.reference { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 5 4; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); }
.s3 { --c: var(--c3); } .s4 { --c: var(--c4); } .s5 { --c: var(--c5); }
.line, .raw { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.raw { stroke-width: 1; stroke-opacity: .32; }
.mark { fill: var(--c); stroke: var(--ground); stroke-width: 1; }
.dot, .bar { fill: var(--c); }
.bar { fill-opacity: .75; }
.whisker { stroke: var(--c); stroke-width: 2; }
.heads { stroke: var(--text); stroke-width: 1.2; }
article { border: 1px solid var(--rule); border-radius: .5rem; padding: .9rem 1rem; margin: 1rem 0;
  break-inside: avoid; }
.dialogue-and-summaries { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr));
  gap: .75rem 1.5rem; align-items: start; }
blockquote { margin: 0; padding: .6rem .8rem; background: var(--panel); border-radius: .4rem; white-space: pre-wrap;
  font-size: .92rem; overflow-wrap: anywhere; min-width: 0; }
article dl { margin: 0; min-width: 0; }
article dt { color: var(--soft); font-size: .85rem; }
article dd { margin: 0 0 .5rem; overflow-wrap: anywhere; }
.patch { display: inline-block; width: .7em; height: .7em; margin-right: .4em; background: var(--c); border-radius: 2px;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
details { border: 1px solid var(--rule); border-radius: .4rem; padding: .45rem .8rem; margin: .5rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .75rem 0 .25rem; }
footer { margin-top: 2.5rem; padding-top: .75rem; border-top: 1px solid var(--rule); color: var(--soft);
  font-size: .875rem; }
@media screen and (max-width: 40rem) {
  h1 { font-size: 1.6rem; }
  .lead { font-size: 1.1rem; }
  .wide { display: none; }
  .narrow { display: block; }
  .narrow svg, .panels svg { max-width: 30rem !important; }
  header dl { grid-template-columns: 1fr; gap: 0; }
  header dd { margin-bottom: .4rem; }
  .scroll tbody th, .scroll thead th:first-child { position: sticky; left: 0; background: var(--ground); }
}
@media print {
  @page { margin: 1.5cm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding-right: .45rem; }
  .digest { min-width: 0; }
  pre { columns: 3; font-size: 6.5pt; }
  details::details-content { display: block; content-visibility: visible; block-size: auto; }
}
"""
)
