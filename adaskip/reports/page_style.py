"""The look of the report page: system fonts, light and dark, narrow screens, paper."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--paper:#fbfbf9;--card:#fff;--ink:#1c2430;--soft:#5a6675;
--line:#dfe3e8;--accent:#0b5f93;--bad:#a3341f;--stripe:#f4f6f8}
@media (prefers-color-scheme:dark){:root{--paper:#14181f;--card:#1b212a;--ink:#e4e9f0;
--soft:#9aa7b8;--line:#323b48;--accent:#6cbcf0;--bad:#ff9a85;--stripe:#202732}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
header,main,footer,nav{max-width:74rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.5rem}
header p{margin:0;color:var(--soft);font-size:.85rem;letter-spacing:.06em;text-transform:uppercase}
h1{margin:.1rem 0 1rem;font-size:2.1rem;line-height:1.2}
h2{margin:2.75rem 0 .5rem;font-size:1.5rem;line-height:1.25}
h3{margin:2rem 0 .25rem;font-size:1.15rem}
section>p{max-width:46rem;color:var(--soft);font-size:.93rem}
dl{display:flex;flex-wrap:wrap;gap:.6rem 2.2rem;margin:0}
dt{color:var(--soft);font-size:.8rem}
dd{margin:0;font-weight:600}
nav{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin-top:1.2rem;
padding-top:.55rem;padding-bottom:.55rem;background:var(--paper);
border-bottom:1px solid var(--line)}
a{color:var(--accent);text-decoration:none}
a:hover{text-decoration:underline}
section{scroll-margin-top:3.2rem}
figure{margin:1rem 0}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
caption{padding:.7rem .9rem .2rem;text-align:left;font-weight:600}
th,td{padding:.42rem .9rem;text-align:right;white-space:nowrap;font-weight:400}
thead th{color:var(--soft);font-size:.8rem;border-bottom:1px solid var(--line);
vertical-align:bottom}
tr.groups th{padding-bottom:0;border:0;color:var(--ink);font-weight:600;text-align:left}
th.text,td.text,tbody th{text-align:left}
tbody th{font-weight:600}
tbody tr:nth-child(even){background:var(--stripe)}
tr.first>*{border-top:1px solid var(--line)}
.edge{border-left:1px solid var(--line)}
td b{color:var(--accent)}
.drawing{padding:.8rem .6rem}
.drawing svg{display:block;max-width:none;height:auto}
.picture{background:#fff;border:1px solid var(--line);border-radius:10px;padding:.8rem}
.picture img{display:block;width:100%;max-width:60rem;height:auto;margin:0 auto}
.picture figcaption{color:#4a5563}
figcaption{padding:.5rem .3rem 0;color:var(--soft);font-size:.88rem}
li{margin:.25rem 0}
.failed{color:var(--bad)}
footer{padding-top:2rem;padding-bottom:3rem;color:var(--soft);font-size:.85rem}
@media (max-width:40rem){h1{font-size:1.6rem}h2{font-size:1.3rem}th,td{padding:.4rem .6rem}}
@media print{:root{--paper:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#bbb;--stripe:#fff;
--accent:#000}body{font-size:10pt}nav{display:none}header,main,footer{max-width:none;padding:0}
.scroll{overflow:visible;border:0}table{font-size:7.5pt}th,td{padding:2pt 3pt;white-space:normal}
.drawing svg{max-width:100%}figure,tr{break-inside:avoid}h2,h3{break-after:avoid}}
""".strip()
