"""How report.html looks, by day and by night."""

CSS = """
:root { --paper: #fff; --ink: #1c1f24; --quiet: #666d78; --line: #e6e8eb; --raised: #f5f6f8; --link: #0072b2;
  --good: #009e73; --bad: #d55e00; --open: #8a919c; --add: #e3f5ec; --del: #fdeae2; --check: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181d; --ink: #e8eaed; --quiet: #98a1ad; --line: #2a2f37;
  --raised: #1c2027; --link: #56b4e9; --good: #2fbf95; --bad: #f0803c; --open: #7c8591; --add: #12352a;
  --del: #41241a; --check: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 2.2rem 1.4rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
h1 { font-size: 1.9rem; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 0.6rem; }
h3 { font-size: 0.78rem; margin: 1.2rem 0 0.3rem; color: var(--quiet); font-weight: 600; }
header p, .note, footer { color: var(--quiet); font-size: 0.87rem; margin: 0.2rem 0; }
code, pre { font: 0.8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.verdict { font-size: 1.22rem; line-height: 1.45; margin: 1.4rem 0 1.2rem; padding: 0.9rem 1.1rem;
  background: var(--raised); border-left: 4px solid var(--open); border-radius: 3px; }
.verdict.good { border-color: var(--good); }
.verdict.bad { border-color: var(--bad); }
picture img { width: 100%; height: auto; display: block; margin-top: 0.6rem; }
.claim { display: flex; flex-wrap: wrap; gap: 1rem 2.4rem; align-items: center; margin: 0 0 1.4rem; }
.claim svg { width: 340px; max-width: 100%; font-size: 11px; }
.claim svg text { fill: var(--quiet); }
.claim svg line { stroke-width: 3; stroke-linecap: round; }
.claim svg .test { stroke: var(--ink); fill: var(--ink); }
.claim svg .val { stroke: var(--open); fill: var(--open); }
.claim svg .zero { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 3 3; }
table { border-collapse: collapse; font-size: 0.87rem; }
th, td { text-align: right; padding: 0.25rem 0 0.25rem 1.4rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--quiet); font-weight: 500; }
dl { margin: 0; }
dt { color: var(--quiet); font-size: 0.76rem; }
dd { margin: 0; }
.tiles { display: flex; flex-wrap: wrap; gap: 0.6rem; margin-top: 1.4rem; }
.tiles div { flex: 1 1 8rem; background: var(--raised); border-radius: 6px; padding: 0.6rem 0.9rem; }
.tiles dd { font-size: 1.25rem; font-weight: 600; }
.filters { display: flex; flex-wrap: wrap; gap: 0.4rem; margin-bottom: 0.8rem; }
.filters input { position: absolute; opacity: 0; }
.filters label { padding: 0.2rem 0.8rem; border: 1px solid var(--line); border-radius: 99px; cursor: pointer;
  font-size: 0.85rem; }
.filters b { color: var(--quiet); font-weight: 500; margin-left: 0.2rem; }
.filters input:checked + label { background: var(--ink); color: var(--paper); border-color: var(--ink); }
.filters input:focus-visible + label { outline: 2px solid var(--link); outline-offset: 2px; }
body:has(#show-kept:checked) details:not(.kept), body:has(#show-discarded:checked) details:not(.discarded),
body:has(#show-failed:checked) details:not(.failed), body:has(#show-checks:checked) details:not(.checks)
  { display: none; }
.cells { display: grid; grid-template-columns: 2.6rem 9.2rem minmax(0, 1fr) 5.2rem 5.2rem 5.4rem 4.4rem;
  gap: 0.6rem; padding: 0.4rem 0.5rem; border-bottom: 1px solid var(--line); align-items: baseline; }
.cells span:nth-child(n+4) { text-align: right; }
.cells span:nth-child(1) { color: var(--quiet); }
.cells span:nth-child(3) { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.head { color: var(--quiet); font-size: 0.78rem; }
summary { cursor: pointer; list-style: none; font-size: 0.9rem; }
summary::-webkit-details-marker { display: none; }
summary:hover, details[open] > summary { background: var(--raised); }
details[open] > summary span:nth-child(3) { white-space: normal; font-weight: 600; }
summary span:nth-child(2)::before { content: ""; display: inline-block; width: 0.55rem; height: 0.55rem;
  margin-right: 0.5rem; border-radius: 50%; background: var(--open); }
.kept > summary span:nth-child(2)::before { background: var(--good); }
.failed > summary span:nth-child(2)::before { background: var(--bad); border-radius: 0; }
.checks > summary span:nth-child(2)::before { background: var(--check); transform: rotate(45deg) scale(0.85);
  border-radius: 0; }
.folded { padding: 0.8rem 0.5rem 1.4rem 3.7rem; border-bottom: 1px solid var(--line); }
.figures { display: flex; flex-wrap: wrap; gap: 0.5rem 1.8rem; font-size: 0.87rem; }
.prose { margin: 0; max-width: 75ch; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { margin: 0; padding: 0.7rem 0.9rem; background: var(--raised); border-radius: 6px; overflow-x: auto;
  max-height: 34rem; }
.diff { padding: 0.5rem 0; }
.diff span { display: block; padding: 0 0.9rem; min-width: max-content; }
.diff .add { background: var(--add); }
.diff .del { background: var(--del); }
.diff .hunk { color: var(--quiet); }
footer { margin-top: 2.4rem; }
@media (max-width: 760px) { .cells { grid-template-columns: 2.2rem 1.4rem minmax(0, 1fr) 4.6rem; }
  .cells span:nth-child(n+5) { display: none; } .cells span:nth-child(2) { overflow: hidden; white-space: nowrap; }
  .folded { padding-left: 0.5rem; } }
@media print { .filters { display: none; } }
"""
