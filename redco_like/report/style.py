"""The look of the page: colours that stay apart for colour-blind readers, light and dark, wide, narrow and printed.

Colours follow Okabe and Ito (2008) and Paul Tol's muted scheme; what waits is vermilion everywhere on the page.
"""

CSS = """
:root{color-scheme:light dark;--bg:#fffffb;--fg:#1d1f21;--soft:#62666b;--faint:#e4e4de;--card:#f6f6f0;
--forward:#3f74a8;--backward:#9cc9e6;--weight:#2f8f5b;--exposed:#d55e00;--hidden:#f4cba6;--optimizer:#aa4499;
--offload:#8a6d3b;--idle:#ebebe5;--bubble:#c6c6bf;--params:#3b2f8f;--gradients:#7fb8d6;--activations:#ddaa33;
--transient:#8f9195;--on-dark:#fff;--on-light:#16222c;--limit:#b00020;--winner:#1d1f21}
@media (prefers-color-scheme:dark){:root{--bg:#15171a;--fg:#e9e8e3;--soft:#a2a6ab;--faint:#30343a;--card:#1e2125;
--forward:#4f86bd;--backward:#a5d3ee;--weight:#45ad76;--exposed:#f2813a;--hidden:#7a4f30;--optimizer:#cf72c0;
--offload:#b8935a;--idle:#262a2f;--bubble:#555b62;--params:#8d7df0;--gradients:#86c5e6;--activations:#e2b94c;
--transient:#8b9097;--on-dark:#fff;--on-light:#101820;--limit:#ff6b7d;--winner:#fff}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 -apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,
"Liberation Sans",sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1024px;margin:0 auto;padding:28px 32px 64px}
h1{font-size:30px;line-height:1.2;margin:2px 0 6px;font-weight:650;letter-spacing:-.01em;overflow-wrap:anywhere}
h3{font-size:15px;margin:24px 0 2px;font-weight:650}
h2{font-size:18px;margin:0 0 2px;font-weight:650}
section{margin-top:44px}
p{margin:0 0 10px;text-wrap:pretty}
.eyebrow,.soft{color:var(--soft)}
.eyebrow{font-size:13px;margin:0}
.label{display:inline-block;border:1px solid var(--soft);border-radius:3px;padding:0 5px;font-size:12px;
line-height:17px;color:var(--soft)}
.winner-line{font-size:18px;margin:14px 0 4px;max-width:none}
.warn{border-left:3px solid var(--exposed);padding-left:10px}
.stats{display:grid;grid-template-columns:repeat(4,1fr);gap:0 28px;margin:20px 0 16px}
.stats div{border-top:1px solid var(--fg);padding-top:8px}
.stats dt{font-size:13px;color:var(--soft)}
.stats dd{margin:0}
.stats .big{font-size:27px;line-height:1.25;font-weight:600;letter-spacing:-.01em}
.stats .sub{font-size:13px;color:var(--soft);text-wrap:balance}
figure{margin:10px 0 0}
.caption{font-size:13px;margin-top:6px}
svg{display:block;width:100%;height:auto;overflow:visible}
.narrow{display:none}
.narrow svg{max-width:560px}
.keys{display:flex;flex-wrap:wrap;gap:2px 18px;margin:6px 0 10px;padding:0;list-style:none;font-size:13px}
.keys i{display:inline-block;width:12px;height:12px;margin-right:6px;vertical-align:-1px;border-radius:1px}
text{font-size:12px;fill:var(--fg)}
text.small,text.tick{fill:var(--soft)}
text.small{font-size:11.5px}
text.name{font-size:12px}
text.strong{font-weight:650;fill:var(--fg)}
text.mark{paint-order:stroke;stroke:var(--bg);stroke-width:3px}
text.limit-text{fill:var(--limit)}
text.on{font-size:11px;fill:var(--on-dark);pointer-events:none}
text.on.backward,text.on.score,text.on.hidden{fill:var(--on-light)}
.axis{stroke:var(--soft);stroke-width:1}
.grid{stroke:var(--faint);stroke-width:1}
.rule{stroke:var(--faint);stroke-width:1}
.break{stroke:var(--soft);stroke-width:1}
.limit{stroke:var(--limit);stroke-width:1.2;stroke-dasharray:4 3}
.whisker,.limit,.grid,.front,.mark{pointer-events:none}
.whisker{stroke:var(--fg);stroke-width:1.2}
.block{stroke:var(--bg);stroke-width:.7}
.block:hover{stroke:var(--fg);stroke-width:1.2}
.odd{fill-opacity:.62}
.idle{fill:var(--idle)}
KIND_RULES
.front{fill:none;stroke:var(--soft);stroke-width:1}
circle{cursor:default;outline-offset:3px}
.point{fill:var(--bg);stroke:var(--forward);stroke-width:1.6}
.runner{fill:var(--bg);stroke:var(--winner);stroke-width:1.6}
.winner{fill:var(--winner);stroke:var(--bg);stroke-width:1.5}
.scroll{overflow-x:auto;margin-top:10px}
table{border-collapse:collapse;font-size:13px;line-height:1.35}
table.full{width:100%}
th{font-weight:500;color:var(--soft);text-align:left;vertical-align:bottom;border-bottom:1px solid var(--fg)}
th,td{padding:5px 12px 5px 0;vertical-align:top}
th.group{text-align:center;border-bottom-color:var(--faint)}
th:last-child,td:last-child{padding-right:0}
td{border-bottom:1px solid var(--faint)}
.n{text-align:right}
td.n{white-space:nowrap}
.nowrap{white-space:nowrap}
th.none{border-bottom:0}
.more{color:var(--soft);font-weight:400;min-width:200px}
tr.best td{font-weight:650}
td b{font-weight:650}
code,pre{font:12.5px/1.45 ui-monospace,SFMono-Regular,Menlo,"Liberation Mono",monospace}
td code{overflow-wrap:anywhere}
pre{background:var(--card);padding:12px;overflow-x:auto;border-radius:4px}
details{margin-top:12px}
summary{cursor:pointer;color:var(--fg)}
#tip{position:fixed;z-index:9;max-width:min(340px,90vw);background:var(--fg);color:var(--bg);font-size:12.5px;line-height:1.4;
padding:6px 9px;border-radius:4px;white-space:pre-line;pointer-events:none}
#tip[hidden]{display:none}
footer{margin-top:48px;color:var(--soft);font-size:13px}
@media (max-width:720px){main{padding:18px 16px 48px}.wide{display:none}.narrow{display:block}h1{font-size:25px}
.stats{grid-template-columns:repeat(2,1fr);gap:14px 18px}section{margin-top:36px}.stats .big{font-size:23px}}
@page{margin:14mm}
@media print{h2,h3{break-after:avoid}tr{break-inside:avoid}.scroll{overflow:visible}
.full{font-size:9.5px}.full th,.full td{padding-right:6px}.more{min-width:110px}
:root{color-scheme:light;--bg:#fff;--fg:#000;--soft:#444;--faint:#ddd}main{max-width:none;padding:0}
.wide{display:block}.narrow{display:none}.stats{grid-template-columns:repeat(4,1fr)}
section{break-inside:avoid-page;margin-top:26px}section.long{break-inside:auto}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}#tip{display:none}}
"""

KINDS = {
    "compute": "forward",
    "forward": "forward",
    "backward": "backward",
    "weight": "weight",
    "exposed": "exposed",
    "hidden": "hidden",
    "optimizer": "optimizer",
    "offload": "offload",
    "bubble": "bubble",
    "params": "params",
    "gradients": "gradients",
    "activations": "activations",
    "transient": "transient",
    "generate": "weight",
    "score": "backward",
    "train": "forward",
    "reallocate": "exposed",
    "onload": "offload",
}
"""Kind of a block -> the colour it has."""

JS = """
(()=>{const tip=document.getElementById('tip');
const place=(x,y)=>{const w=tip.offsetWidth,h=tip.offsetHeight;
tip.style.left=Math.max(6,Math.min(x+14,innerWidth-w-6))+'px';tip.style.top=(y+18+h>innerHeight?y-h-10:y+18)+'px'};
const show=e=>{const on=e.target.closest&&e.target.closest('[data-tip]');tip.hidden=!on;if(!on)return;
tip.textContent=on.dataset.tip;const box=on.getBoundingClientRect();
place(e.clientX===undefined?box.right:e.clientX,e.clientY===undefined?box.bottom:e.clientY)};
for(const name of ['pointermove','pointerdown','focusin'])document.addEventListener(name,show);
document.addEventListener('scroll',()=>{tip.hidden=true},{passive:true});
document.addEventListener('focusout',()=>{tip.hidden=true});
addEventListener('beforeprint',()=>document.querySelectorAll('details.print').forEach(d=>{d.open=true}))})();
"""


def css() -> str:
    """The style sheet, with a colour for every kind of block."""
    rules = "".join(f".block.{k},i.{k}{{fill:var(--{c});background:var(--{c})}}" for k, c in KINDS.items())
    more = (
        "i.idle{background:var(--idle)}i.point,i.runner,i.winner{border-radius:50%;"
        "border:2px solid;width:11px;height:11px}"
        "i.point{border-color:var(--forward)}i.runner{border-color:var(--winner)}i.winner{background:var(--winner);border-color:var(--winner)}"
    )
    return CSS.replace("KIND_RULES", rules + more)
